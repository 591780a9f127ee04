r"""Names of quantities before an equals sign: x, "Total cost", f_{\max}, \bar{x}, V_1:V_2, \frac{PQ}{RS}, P(A \cap B).

A name says of what a value is the value, so that \text{Area} = 18 is answered by 18. An equation between variables
(x^2 = 25, x + y = 7, \frac{y}{x} = 2) is none, and neither its right side.
"""

from __future__ import annotations

import re

_INDEX = r"(?:_\s*(?:\{(?:[^{}]|\{[^{}]*\})*\}|\\[a-zA-Z]+(?:\{[^{}]*\})?|\w)|\^\s*(?:\{?\*\}?|\{?\\prime\}?)|')*"
_WORDS = r"(?:\\(?:text|mathrm|mbox|operatorname|textbf|textit)\s*\{[^{}]*[a-zA-Z]{2}[^{}]*\}\s*)+"
_PLAIN_WORDS = r"[A-Z]?[a-z]{3,}(?:\s+[A-Za-z]{2,}){0,4}"
_MARKED = r"\\(?:bar|hat|vec|overline|tilde|dot|overrightarrow|widehat)\s*(?:\{[^{}]*\}|[a-zA-Z])"
_SEGMENT = r"(?:m\s*)?(?:\\(?:angle|triangle)\s*)?\|?[A-Z]{1,4}'?\|?|\[[A-Z]{3,6}\]|m?\\angle\s*[A-Z]{1,3}"
_VALUE_OF = (
    r"(?:[a-zA-Z]|\\(?:Pr|mathbb\s*\{?[PE]\}?|det|deg|gcd|lcm))(?:_\{?\w+\}?)?"
    r"(?:\^\{?(?:-1|\(\w+\))\}?)?'{0,3}\s*\([^()]*\)"
)
_TRIGONOMETRIC = r"\\(?:sin|cos|tan|cot|sec|csc)\s*(?:\(?\s*(?:\\angle\s*)?(?:[A-Z]{1,3}|\\[a-z]+)\s*\)?)"
_DERIVATIVE = r"\\frac\s*\{d\^?2?\s*[a-z]\}\s*\{d\s*[a-z](?:\^2)?\}"
_OF_NAMES = r"(?:[A-Z]{1,4}|[A-Za-z]_\{?\w+\}?|[A-Z]'?|\[[A-Z]{3,6}\]|\\angle\s*[A-Z]{1,3}|[a-zA-Z]\([0-9]+\))"
_NAME = re.compile(
    rf"\\(?:max|min)\s+[a-zA-Z](?:\([a-zA-Z]\))?|\|\s*{_MARKED}\s*\||{_WORDS}(?:_\{{?\w+\}}?)?(?:\([^()]*\))?|{_PLAIN_WORDS}|{_MARKED}{_INDEX}|{_SEGMENT}|{_VALUE_OF}|{_TRIGONOMETRIC}"
    rf"|(?:[a-zA-Z]|\\(?!(?:frac|sqrt|sum|int|prod|lim|log|ln|binom|pi)(?![a-zA-Z]))[a-zA-Z]+){_INDEX}|{_DERIVATIVE}"
    rf"|\\frac\s*\{{\s*{_OF_NAMES}\s*\}}\s*\{{\s*{_OF_NAMES}\s*\}}|{_OF_NAMES}(?:\s*[:/]\s*{_OF_NAMES})+"
)


def is_name(text: str) -> bool:
    """Whether a text names one quantity (or a ratio of two that are named in capitals or with an index)."""
    return len(text) <= 80 and _NAME.fullmatch(text.strip()) is not None
