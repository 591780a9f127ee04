"""What only changes how an answer looks: delimiters, markdown, typography, spacing and sizing commands.

Every answer and every reference goes through `clean` once, before anything is read.
"""

from __future__ import annotations

import re

from rewards.math_words import digits

# Typography on the left, what it means on the right. Digits of other scripts are deliberately absent.
_CHARACTERS = str.maketrans(
    {
        "\N{MINUS SIGN}": "-",
        "\N{EN DASH}": "-",
        "\N{FIGURE DASH}": "-",
        "\N{NON-BREAKING HYPHEN}": "-",
        "\N{NO-BREAK SPACE}": " ",
        "\N{NARROW NO-BREAK SPACE}": " ",
        "\N{THIN SPACE}": " ",
        "\N{ZERO WIDTH SPACE}": "",
        "×": r"\times ",
        "⋅": r"\cdot ",
        "·": r"\cdot ",
        "∙": r"\cdot ",
        "÷": "/",
        "∕": "/",
        "⁄": "/",
        "√": "sqrt ",
        "∞": r"\infty ",
        "±": r"\pm ",
        "∓": r"\mp ",
        "≤": r"\le ",
        "≥": r"\ge ",
        "≠": r"\ne ",
        "≈": r"\approx ",
        "∪": r"\cup ",
        "∩": r"\cap ",
        "∈": r"\in ",
        "∅": r"\emptyset ",
        "°": r"^\circ ",
        "½": r"\frac{1}{2}",
        "⅓": r"\frac{1}{3}",
        "⅔": r"\frac{2}{3}",
        "¼": r"\frac{1}{4}",
        "¾": r"\frac{3}{4}",
        "⅕": r"\frac{1}{5}",
        "⅛": r"\frac{1}{8}",
        "\N{RIGHT SINGLE QUOTATION MARK}": "'",
    }
)
_GREEK = {"α": "alpha", "β": "beta", "γ": "gamma", "δ": "delta", "ε": "epsilon", "θ": "theta", "λ": "lambda", "μ": "mu"}
_GREEK |= {"ρ": "rho", "σ": "sigma", "τ": "tau", "φ": "phi", "ω": "omega", "Δ": "Delta", "Ω": "Omega", "π": "pi"}
_CHARACTERS |= str.maketrans({letter: rf"\{name} " for letter, name in _GREEK.items()})
_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺", "0123456789-+")
_SUPERSCRIPT_RUN = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺]+")

# What changes only how a formula looks.
_SPACING = re.compile(r"(?<!\\)\\[,;:> ]|\\(?:quad|qquad|displaystyle|textstyle|limits|thinspace)(?![a-zA-Z])|~")
_THOUSANDS_SPACE = re.compile(r"(?<![0-9.])([0-9]{1,3})((?:(?:\\,|\\ |\{\\,\}|~| )[0-9]{3})+)(?![0-9/])")
_SIZING = re.compile(r"\\(?:left|right)(?![a-zA-Z])\s*\.?|\\(?:big|Big|bigg|Bigg)[lrm]?(?![a-zA-Z])")
_FRACTION_COMMAND = re.compile(r"\\[dtc]frac(?![a-zA-Z])")
# What a number may be dressed in; a currency in front and "million" behind it.
_COLOR = re.compile(r"\\(?:text)?color\s*\{[a-zA-Z]*\}|\\(?:underline|bm|boldsymbol)(?=\s*\{)")
_DRESSED = re.compile(r"\\(?:mathbf|mathrm|mathit|mathsf|text|textbf)\s*\{\s*([-+]?[0-9][0-9.,/]*)\s*\}")
_WORDED = re.compile(
    r"\\(?:text|mbox|mathrm)\s*\{\s*((?:(?:hundred|thousand|million|billion|trillion)\b[a-z ]*|Rs\.?|USD|\\?\$))\s*\}"
)
_RAISED_ORDINAL = re.compile(
    r"(?<=[0-9])\s*\^\s*\{?\s*(?:\\(?:text|mathrm|textrm|rm|mathit)\s*\{?)?\s*(st|nd|rd|th)(?![a-zA-Z])\s*\}{0,2}"
)
_OVER = re.compile(r"\{([^{}]*)\}\s*\\over(?![a-z])\s*\{([^{}]*)\}|\{([^{}]*?)\s*\\over(?![a-z])\s*([^{}]*)\}")
_CHOOSE = re.compile(r"\{([^{}]*?)\s*\\choose(?![a-zA-Z])\s*([^{}]*)\}")
_LEADING = re.compile(r"^(?:\\approx(?![a-z])|\\sim(?![a-z])|\\equiv(?![a-z])|=)\s*")
_WRAPPED = re.compile(r"\\(?:text|mbox|textbf|textit|textrm|mathrm|mathbf)\s*\{([^{}]*)\}")
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
    text = text.translate(_CHARACTERS)
    text = _SUPERSCRIPT_RUN.sub(lambda run: "^{" + run.group().translate(_SUPERSCRIPTS) + "}", text)
    if r"\begin" not in text:
        text = text.replace("\\\\", "\\")  # escaped once too often; in a matrix it ends a row
    text = _strip_delimiters(re.sub(r"\\!\s*", "", text))
    text = re.sub(r"(?<!\\)\$([^$]+)(?<!\\)\$", r" \1 ", text)  # "$125$ miles"
    text = _THOUSANDS_SPACE.sub(lambda n: n[1] + re.sub(r"[^0-9]", "", n[2]), text)
    text = _SPACING.sub(" ", _WORDED.sub(r" \1 ", _DRESSED.sub(r"\1", _COLOR.sub("", text))))
    if "^" in text:
        text = _RAISED_ORDINAL.sub(r"\1", text)
    text = _SIZING.sub("", _FRACTION_COMMAND.sub(r"\\frac", text))
    text = _CHOOSE.sub(r"\\binom{\1}{\2}", _OVER.sub(r"\\frac{\1\3}{\2\4}", text))
    text = re.sub(r"\s*\{\s*,\s*\}\s*", ",", text).replace(r"\lbrace", r"\{").replace(r"\rbrace", r"\}")
    return digits(_strip_delimiters(text))


def _strip_delimiters(text: str) -> str:
    """Take off pairs of delimiters around the whole text, and what a sentence leaves behind a number."""
    while True:
        before = text
        text = _LEADING.sub("", text.strip().rstrip(".,;:")).strip()
        if text.endswith("\\") and not text.endswith("\\\\"):  # what is left of a "\\ " at the end
            text = text[:-1].rstrip()
        if wrapped := _WRAPPED.fullmatch(text):
            text = wrapped[1]
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
