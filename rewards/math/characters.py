r"""Characters beyond ASCII -> what they mean in LaTeX or ASCII: typography, Unicode mathematics, full-width forms.

Invisible characters and marks such as a tick are dropped. Digits of other scripts, full-width ones too, are
deliberately left as they are: no rule reads them.
"""

from __future__ import annotations

import functools
import re
import unicodedata

_PLAIN = {
    "-": "\N{MINUS SIGN}\N{EN DASH}\N{FIGURE DASH}\N{NON-BREAKING HYPHEN}\N{FULLWIDTH HYPHEN-MINUS}",
    " ": "\N{NO-BREAK SPACE}\N{NARROW NO-BREAK SPACE}\N{THIN SPACE}\N{HAIR SPACE}\N{SIX-PER-EM SPACE}\N{EN SPACE}"
    "\N{EM SPACE}\N{FIGURE SPACE}\N{PUNCTUATION SPACE}\N{MEDIUM MATHEMATICAL SPACE}\N{IDEOGRAPHIC SPACE}【】「」『』",
    "'": "\N{RIGHT SINGLE QUOTATION MARK}\N{LEFT SINGLE QUOTATION MARK}\N{PRIME}",
    "''": "\N{DOUBLE PRIME}",
    '"': "\N{LEFT DOUBLE QUOTATION MARK}\N{RIGHT DOUBLE QUOTATION MARK}",
    "/": "÷∕⁄",
    ":": "∶꞉",
    ". ": "。｡",
    ", ": "，、",
    "; ": "；",
    "%": "٪",
    "...": "…",
    "|": "∣ǀ",
}
_COMMANDS = {
    "times": "×✕",
    "cdot": "⋅·∙•",
    "infty": "∞",
    "pm": "±",
    "mp": "∓",
    "le": "≤⩽≦",
    "ge": "≥⩾≧",
    "ne": "≠",
    "approx": "≈",
    "equiv": "≡",
    "cup": "∪",
    "cap": "∩",
    "in": "∈",
    "notin": "∉",
    "subset": "⊂",
    "subseteq": "⊆",
    "setminus": "∖",
    "emptyset": "∅⌀",
    "langle": "⟨〈〈",
    "rangle": "⟩〉〉",
    "lfloor": "⌊",
    "rfloor": "⌋",
    "lceil": "⌈",
    "rceil": "⌉",
    "sum": "∑",
    "prod": "∏",
    "int": "∫",
    "to": "→",
    "angle": "∠",
    "triangle": "△",
    "perp": "⊥",
    "parallel": "∥",
    "partial": "∂",
    "hbar": "ℏ",
    "ell": "ℓ",
    "mathbb{R}": "ℝ",
    "mathbb{Z}": "ℤ",
    "mathbb{N}": "ℕ",
    "mathbb{Q}": "ℚ",
    "mathbb{C}": "ℂ",
    "alpha": "α",
    "beta": "β",
    "gamma": "γ",
    "delta": "δ",
    "epsilon": "εϵ",
    "zeta": "ζ",
    "eta": "η",
    "theta": "θϑ",
    "kappa": "κ",
    "lambda": "λ",
    "mu": "μµ",
    "nu": "ν",
    "xi": "ξ",
    "pi": "π",
    "rho": "ρ",
    "sigma": "σ",
    "tau": "τ",
    "phi": "φϕ",
    "chi": "χ",
    "psi": "ψ",
    "omega": "ω",
    "Gamma": "Γ",
    "Delta": "Δ∆",
    "Theta": "Θ",
    "Lambda": "Λ",
    "Xi": "Ξ",
    "Pi": "Π",
    "Sigma": "Σ",
    "Phi": "Φ",
    "Psi": "Ψ",
    "Omega": "ΩΩ",
}
_INVISIBLE = "\u00ad\u061c\u180e\u200b\u200c\u200d\u200e\u200f\u2060\u2061\u2062\u2063\u2064\ufe0e\ufe0f\ufeff\u20e3"
"""Direction overrides are not among these: they show a number backwards."""

_TABLE: dict[int, str] = {ord(letter): text for text, letters in _PLAIN.items() for letter in letters}
_TABLE |= {ord(letter): rf"\{name} " for name, letters in _COMMANDS.items() for letter in letters}
_TABLE |= {ord("°"): r"^\circ ", ord("º"): r"^\circ ", ord("˚"): r"^\circ ", ord("√"): "sqrt "} | dict.fromkeys(
    map(ord, _INVISIBLE), ""
)
for _code in range(0xFF01, 0xFF5F):  # full-width ASCII but for its digits
    if not chr(_code).isdigit():
        _TABLE.setdefault(_code, chr(_code - 0xFEE0))
for _code in (*range(0x00BC, 0x00BF), *range(0x2150, 0x215F), 0x2189):
    _above, _, _below = unicodedata.normalize("NFKC", chr(_code)).partition("\N{FRACTION SLASH}")
    _TABLE[_code] = rf"\frac{{{_above}}}{{{_below}}}"
for _code in range(0x1D400, 0x1D800):  # letters and digits in mathematical fonts
    if unicodedata.name(chr(_code), ""):
        _plain = unicodedata.normalize("NFKC", chr(_code))
        _TABLE[_code] = _TABLE.get(ord(_plain), _plain)
_CHARACTERS = str.maketrans(_TABLE)

_RAISED = dict(zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺⁽⁾ⁿⁱˣʸᵃᵇᵏᵐᵗ", "0123456789-+()nixyabkmt", strict=True))
_LOWERED = dict(zip("₀₁₂₃₄₅₆₇₈₉₋₊ₐₑₕᵢⱼₖₗₘₙₒₚᵣₛₜᵤᵥₓ", "0123456789-+aehijklmnoprstuvx", strict=True))
_RUNS = tuple(
    (re.compile(f"[{''.join(letters)}]+"), sign, str.maketrans(letters))
    for sign, letters in (("^", _RAISED), ("_", _LOWERED))
)
_CUBE_ROOT = re.compile(r"([∛∜])\s*([0-9.]+|[a-z]|\([^()]*\))")
_MARK = re.compile(
    "[\u2600-\u26d3\u26d5-\u2714\u2719-\u274b\u274d\u274f-\u2794\u2798-\u27bf\u2b50\U0001f300-\U0001f51e"
    "\U0001f520-\U0001f6aa\U0001f6ac-\U0001faff]"
)
"""Ticks, stars, faces; not what denies (crosses, no-entry signs) or is a number."""
_CJK = r"\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\u0e00-\u0e7f"
_BEFORE_CJK = re.compile(rf"(?<=[0-9A-Za-z}}$)%])(?=[{_CJK}])")
_BEHIND_CJK = re.compile(rf"(?<=[{_CJK}])(?=[0-9A-Za-z\\$(+-])")


def ascii_text(text: str) -> str:
    """The text with every character that has a meaning in mathematics as ASCII, and words of scripts without spaces
    apart from numbers: "是36个" gives "是 36 个"."""
    for run, sign, letters in _RUNS:
        text = run.sub(functools.partial(_shifted, sign, letters), text)
    text = re.sub(r"([0-9])\s*‰", r"\1/1000", text)
    text = _CUBE_ROOT.sub(lambda root: rf"\sqrt[{3 if root[1] == '∛' else 4}]{{{root[2]}}}", text)
    text = _MARK.sub("", text.translate(_CHARACTERS))
    return _BEHIND_CJK.sub(" ", _BEFORE_CJK.sub(" ", text))


def _shifted(sign: str, letters: dict[int, str], run: re.Match[str]) -> str:
    return f"{sign}{{{run[0].translate(letters)}}}"
