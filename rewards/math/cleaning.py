"""What only changes how an answer looks: delimiters, markdown, typography, spacing and sizing commands.

Every answer and every reference goes through `clean` once, before anything is read.
"""

from __future__ import annotations

import re

from rl_lora.rewards.math.characters import ascii_text
from rl_lora.rewards.math.lines import equations_as_list
from rl_lora.rewards.math.words import digits

# What changes only how a formula looks.
_SPACING = re.compile(r"(?<!\\)\\[,;:> ]|\\(?:quad|qquad|displaystyle|textstyle|limits|thinspace)(?![a-zA-Z])|~")
_THOUSANDS_SPACE = re.compile(r"(?<![0-9.])([1-9][0-9]{0,2})((?:(?:\\,|\\ |\{\\,\}|~| )[0-9]{3})+)(?![0-9/])")
_SIZING = re.compile(r"\\(?:left|right)(?![a-zA-Z])\s*\.?|\\(?:big|Big|bigg|Bigg)[lrm]?(?![a-zA-Z])")
_FRACTION_COMMAND = re.compile(r"\\(?:[dtcs]|nice)frac(?![a-zA-Z])")
_SKIP = re.compile(
    r"\\[hv]space\*?\s*\{[^{}]*\}|\\[hv]?phantom\s*\{[^{}]*\}|\\(?:label|tag)\*?\s*\{[^{}]*\}"
    r"|\\(?:hskip|kern|mkern|mskip)\s*-?[0-9.]+\s*(?:pt|em|ex|mm|cm|in|mu)(?![a-zA-Z])"
)
_FONT_BRACED = re.compile(r"\{\s*\\(?:rm|bf|it|sf|tt)\s+([^{}]*)\}")
_FONT_OF = re.compile(r"\\(?:rm|bf|it|sf|tt)\s*(?=\{)")
_FONT = re.compile(
    r"\\(?:tiny|scriptsize|footnotesize|small|normalsize|large|Large|LARGE|huge|Huge|bf|rm|it|sf|tt|sl|sc|em|bfseries"
    r"|itshape|rmfamily|sffamily|ttfamily|boldmath|mathstrut|strut|nobreak|allowbreak|noindent|centering|hfill|hfil"
    r"|relax|blacksquare|bigstar|checkmark|qed|nonumber|notag|scriptstyle|scriptscriptstyle|nolimits|medspace|thickspace|negthinspace|enspace|enskip)"
    r"(?![a-zA-Z])"
)
_BOLD_FORMULA = re.compile(
    r"\\(?:ensuremath(?=\s*\{)|(?:mathbf|mathit|mathsf|mathtt|mathnormal|pmb)(?=\s*\{[^{}]*[\\+=^*/(<>-]))"
)
_THOUSANDS = re.compile(r"(?<![0-9.,])[1-9][0-9]{0,2}(?:,[0-9]{3})+(?![0-9]|,[0-9])")
_CIS = re.compile(r"\\(?:operatorname|text|mathrm)\s*\{\s*cis\s*\}|\\cis(?![a-zA-Z])")
_PRIME = re.compile(r"\^\s*(?:\{\s*\\prime\s*\}|\\prime(?![a-zA-Z]))")
_COMBINATION = re.compile(
    r"(?:\{\s*\}\s*)?[_^]\s*\{?([0-9]+)\}?\s*(?:\\(?:mathrm|text|rm)\s*\{)?\s*C\}?\s*_\s*\{?([0-9]+)\}?"
)
_CHOSEN = re.compile(
    r"(?:\\(?:mathrm|text|rm)\s*\{\s*C\s*\}|C)\s*_\s*\{?([0-9]+)\}?\s*\^\s*\{?([0-9]+)\}?|([0-9]+)\s*C\s*([0-9]+)"
    r"|nCr\s*\(\s*([0-9]+)\s*,\s*([0-9]+)\s*\)"
)
_ARRANGED = re.compile(
    r"(?:\{\s*\}\s*)?_\s*\{?([0-9]+)\}?\s*P\s*_\s*\{?([0-9]+)\}?|[AP]\s*_\s*\{?([0-9]+)\}?\s*\^\s*\{?([0-9]+)\}?"
    r"|nPr\s*\(\s*([0-9]+)\s*,\s*([0-9]+)\s*\)"
)
_SOLIDUS = re.compile(r"(?:\{\s*\}\s*)?\^\s*\{?([0-9]+)\}?\s*/\s*(?:\{\s*\}\s*)?_\s*\{?([0-9]+)\}?")
_DIFFERENTIAL = re.compile(r"\\(?:mathrm|text|rm)\s*\{\s*d\s*\}(?=\s*[a-zA-Z}\\^])")
_NOT_EQUAL = re.compile(r"\\not\s*=")
_BLACKBOARD = re.compile(r"\\mathbb\s+([A-Z])")
_AS_TEXT = re.compile(
    r"\\(?:texttt|textsf|textsc|textup|textmd|textsl|textnormal|emph|uline|hbox|mathtt|mathnormal)(?=\s*\{)"
)
# What a number may be dressed in; a currency in front and "million" behind it.
_COLOR = re.compile(
    r"\\(?:text)?color\s*\{[a-zA-Z]*\}|\\(?:underline|bm|boldsymbol|smash|rlap|llap|centerline|framebox|makebox)(?=\s*\{)"
    r"|\\(?:colorbox|raisebox|scalebox)\s*\{[^{}]*\}(?=\s*\{)"
)
_DRESSED = re.compile(
    r"\\(?:mathbf|mathrm|mathit|mathsf|mathcal|mathscr|text|textbf)\s*\{\s*([-+]?[0-9][0-9.,/]*)\s*\}"
)
_WORDED = re.compile(
    r"\\(?:text|mbox|mathrm)\s*\{"
    r"\s*((?:(?:doz(?:ens?)?|hundred|thousand|million|billion|trillion)\b[a-z ]*|Rs\.?|USD|\\?\$))\s*\}"
)
_RAISED_ORDINAL = re.compile(
    r"(?<=[0-9])\s*(?:\^\s*\{?\s*(?:\\(?:text|mathrm|textrm|rm|mathit)\s*\{?)?|\\(?:text|mathrm|textrm)\s*\{)\s*(st|nd|rd|th)(?![a-zA-Z])\s*\}{0,2}"
)
_OVER = re.compile(r"\{([^{}]*)\}\s*\\over(?![a-z])\s*\{([^{}]*)\}|\{([^{}]*?)\s*\\over(?![a-z])\s*([^{}]*)\}")
_CHOOSE = re.compile(r"\{([^{}]*?)\s*\\choose(?![a-zA-Z])\s*([^{}]*)\}")
_EXCLAIMED = re.compile(  # not the factorial of n
    r"(?:.*[\s'{-])?(?:[^\W\d_]{4,}|[^\W\d_a-z][a-z]+|[A-Z]{3,}|(?i:yes|no))\}?\s*!+"
)
_LEADING = re.compile(
    r"^(?:\\approx(?![a-z])|\\sim(?![a-z])|\\(?:equiv|to|rightarrow|cdot)(?![a-z])|=)\s*"
    r"|^(?:\\(?:text|mbox|textrm)\s*\{\s*)?(?:approximately|approx\.?|about|roughly|around|circa)[\s~]*\}?\s*(?=[-$\\]*[0-9])"
)
_WRAPPED = re.compile(r"(?:\\(?:text|mbox|textbf|textit|textrm|mathrm|mathbf|mathit)\s*)\{|\{(?=\s*\\)")
_DELIMITERS = (
    ("$$", "$$"),
    ("$", "$"),
    (r"\(", r"\)"),
    (r"\[", r"\]"),
    ("**", "**"),
    ("__", "__"),
    ("`", "`"),
    ("*", "*"),
)


def clean(text: str) -> str:
    """The text without what changes only its looks: delimiters, markdown, spacing and sizing commands, a full stop."""
    if not text.isascii():
        text = ascii_text(text)
    text = equations_as_list(text)
    if r"\begin" not in text:
        text = text.replace("\\\\", "\\")  # escaped once too often; in a matrix it ends a row
    text = _strip_delimiters(re.sub(r"\\!\s*", "", text))
    if "\\" in text:
        text = _undressed(text)
    text = re.sub(r"(?<!\\)\$([^$]+)(?<!\\)\$", r" \1 ", text)  # "$125$ miles"
    text = _THOUSANDS_SPACE.sub(lambda n: n[1] + re.sub(r"[^0-9]", "", n[2]), text)
    text = _SPACING.sub(" ", _WORDED.sub(r" \1 ", _DRESSED.sub(r"\1", _COLOR.sub("", text))))
    if "_" in text and "/" in text:
        text = _SOLIDUS.sub(r"\\frac{\1}{\2}", text)
    if "C" in text or "P" in text or "A" in text:
        text = _counted(text)
    if "C" in text:
        text = re.sub(r"^" + _COMBINATION.pattern + "$", r"\\binom{\1}{\2}", text)
    if "^" in text or "{" in text:
        text = _RAISED_ORDINAL.sub(r"\1", text)
    text = _SIZING.sub("", _FRACTION_COMMAND.sub(r"\\frac", text))
    text = _CHOOSE.sub(r"\\binom{\1}{\2}", _OVER.sub(r"\\frac{\1\3}{\2\4}", text))
    text = re.sub(r"\s*\{\s*,\s*\}\s*", ",", text).replace(r"\lbrace", r"\{").replace(r"\rbrace", r"\}")
    if "," in text:
        text = _without_thousands(text)
    return digits(_strip_delimiters(text.replace("\n", " ")))


def _counted(text: str) -> str:
    """C_6^2, 6C2 and nCr(6,2) as binomials; A_6^2, P_6^2 and nPr(6,2) as quotients of factorials."""
    chosen, arranged = _CHOSEN.fullmatch(text), _ARRANGED.fullmatch(text)
    numbers = [part for part in ((chosen or arranged).groups() if chosen or arranged else ()) if part]  # type: ignore[union-attr]
    if len(numbers) != 2 or max(map(len, numbers)) > 3 or int(numbers[0]) < int(numbers[1]):
        return text
    n, k = map(int, numbers)
    return rf"\binom{{{n}}}{{{k}}}" if chosen else rf"\frac{{{n}!}}{{{n - k}!}}"


def _without_thousands(text: str) -> str:
    """Formulas without the commas of thousands: V = 1,152\\pi. Between brackets a comma is kept: (3,125) is a pair."""
    kept, end = [], 0
    for match in _THOUSANDS.finditer(text):
        before = text[: match.start()]
        open_brackets = sum(before.count(mark) for mark in "([") - sum(before.count(mark) for mark in ")]")
        if open_brackets <= 0 and before.count(r"\{") <= before.count(r"\}") and not before.startswith("{"):
            kept += [text[end : match.start()], match[0].replace(",", "")]
            end = match.end()
    return "".join(kept) + text[end:]


def _undressed(text: str) -> str:
    """LaTeX without commands of size, font and space, and with one command for text."""
    text = _PRIME.sub("'", _CIS.sub(" cis ", _SKIP.sub(" ", text)))
    text = _FONT_BRACED.sub(r"\\mathrm{\1}", text)
    text = _BLACKBOARD.sub(r"\\mathbb{\1}", _DIFFERENTIAL.sub("d", text))
    text = _NOT_EQUAL.sub(r"\\neq ", text)
    text = _FONT_OF.sub(r"\\mathrm", text)
    text = _FONT.sub(" ", text)
    text = _BOLD_FORMULA.sub("", text)
    return _AS_TEXT.sub(r"\\text", text).replace(r"\textdollar", r"\$").replace(r"\textdegree", r"^\circ ")


def _strip_delimiters(text: str) -> str:
    """Take off pairs of delimiters around the whole text, and what a sentence leaves behind a number."""
    while True:
        before = text
        text = _LEADING.sub("", text.strip().rstrip(".,;:")).strip()
        if text.endswith("!") and _EXCLAIMED.fullmatch(text):
            text = text.rstrip("!").rstrip()
        if text.endswith("\\") and not text.endswith("\\\\"):  # what is left of a "\\ " at the end
            text = text[:-1].rstrip()
        if (wrapped := _WRAPPED.match(text)) and _closes_at_the_end(text, wrapped.end()):
            text = text[wrapped.end() : -1]
        for opening, closing in _DELIMITERS:
            inner = text[len(opening) : -len(closing)]
            enclosed = text.startswith(opening) and text.endswith(closing) and len(text) >= len(opening + closing)
            if (
                enclosed
                and opening not in inner.replace(r"\$", "")
                and closing not in inner.replace(r"\$", "")
                and not inner.endswith("\\")
            ):
                text = inner
        if text == before:
            return text


def _closes_at_the_end(text: str, start: int) -> bool:
    """Whether the brace before `start` is closed by the last character."""
    depth = 1
    for match in re.finditer(r"\\.|[{}]", text[start:]):
        depth += {"{": 1, "}": -1}.get(match[0], 0)
        if depth == 0:
            return start + match.end() == len(text)
    return False
