"""From the text of a formula to its tokens: numbers, commands, names and signs."""

from __future__ import annotations

import re

from rl_lora.rewards.math.formula import Unreadable

_TOKEN = re.compile(
    r"\s*(?:(?P<number>(?:[1-9][0-9]{0,2}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)(?![eE][-+]?[0-9])"
    r"|(?P<command>\\(?:[a-zA-Z]+|[{}|%$]))|(?P<word>[a-zA-Z]+)|(?P<operator>\*\*|[-+*/^_(){}\[\]|!',:]))"
)
_FUNCTION_NAMES = (
    "sin cos tan cot sec csc sinh cosh tanh arcsin arccos arctan arccot asin acos atan ln log lg exp abs floor ceil cis"
)
FUNCTIONS = frozenset(_FUNCTION_NAMES.split())
OF_SEVERAL = frozenset(("gcd", "lcm", "max", "min"))
CONSTANTS = {"pi": ("constant", "pi"), "e": ("constant", "e"), "i": ("constant", "i"), "imath": ("constant", "i")}
_GREEK_NAMES = """
    alpha beta gamma delta epsilon varepsilon zeta eta theta vartheta iota kappa lambda mu nu xi rho sigma tau upsilon
    phi varphi chi psi omega Gamma Delta Theta Lambda Xi Sigma Phi Psi Omega ell hbar varrho varsigma
"""
VARIANTS = {"varepsilon": "epsilon", "varphi": "phi", "vartheta": "theta", "varrho": "rho"}
GREEK = frozenset(_GREEK_NAMES.split())
_SPELLED_GREEK = frozenset(name for name in GREEK if len(name) > 2 and name != "ell")
CLOSING = {"(": ")", "{": "}", "[": "]"}
_STYLE_NAMES = """
    mathrm mathbf mathit mathsf mathbb text textbf textit boldsymbol operatorname vec hat mathcal mathfrak mathscr tilde
    texttt
"""
STYLES = frozenset(_STYLE_NAMES.split())


_SHORT_WORDS = "for not and are all any the but per has was its yes out off non via let nor when where with"
_WORDS = frozenset(_SHORT_WORDS.split())


def _is_word(letters: str, behind: str) -> bool:
    """Whether letters are a short word rather than factors: those of "7t for t > 0", or of "5 of 0" before a number."""
    before_number = 2 <= len(letters) <= 3 and re.match(r"\s+[0-9]", behind)
    return letters in _WORDS or (bool(before_number) and letters not in FUNCTIONS and letters not in ("pi", "mod"))


class Tokens:
    """The tokens of a formula, and a place among them. Raises Unreadable for what is none."""

    def __init__(self, text: str) -> None:
        self.tokens: list[str] = []
        self.kinds: list[str] = []
        position = 0
        text = text.rstrip()
        if r"\vec" in text and r"\times" in text:
            raise Unreadable("a product of vectors")
        while position < len(text):
            match = _TOKEN.match(text, position)
            if match is None:
                raise Unreadable(f"{text[position]!r} is not part of a formula")
            kind = str(match.lastgroup)
            if kind == "word" and _is_word(match["word"], text[match.end() :]):
                raise Unreadable(f"{match['word']!r} is a word")
            self._add(kind, match[kind])
            position = match.end()
        self.at = 0
        self.depth = 0
        self.bars = 0

    def _add(self, kind: str, token: str) -> None:
        if kind != "word" or token in FUNCTIONS | OF_SEVERAL or token in ("pi", "sqrt") or token in _SPELLED_GREEK:
            self.tokens.append(token)
            self.kinds.append(kind)
        elif (
            match := None if self._in_index() else re.match(r"sqrt|pi|arcsin|arccos|arctan|sin|cos|tan|ln|log", token)
        ):  # "pir", "sinx"
            self._add("word", match[0])
            self._add("word", token[match.end() :])
        elif (
            match := None if self._in_index() else re.search(r"(?:sqrt|sin|cos|tan|ln|log|pi)$", token)
        ):  # "xsin", "rpi"
            self._add("word", token[: match.start()])
            self._add("word", match[0])
        elif self._in_index():
            self.tokens.append(token)
            self.kinds.append(kind)
        elif len(token) > 3:
            raise Unreadable(f"{token!r} is a word")
        else:
            self.tokens.extend(token)
            self.kinds.extend("word" for _ in token)

    def _in_index(self) -> bool:
        r"""Whether a word is the index of a name: the end of T_{\text{hot}}, v_\text{max} or v_{max}."""
        ahead = [token.lstrip("\\") for token in self.tokens[-4:]]
        while len(ahead) > 1 and (ahead[-1] == "{" or ahead[-1] in STYLES):
            ahead.pop()
        return bool(self.tokens) and self.tokens[-1] == "{" and ahead[-1:] == ["_"]

    def peek(self) -> str:
        return self.tokens[self.at] if self.at < len(self.tokens) else ""

    def kind(self) -> str:
        return self.kinds[self.at] if self.at < len(self.kinds) else ""

    def next(self) -> str:
        self.at += 1
        return self.tokens[self.at - 1]

    def take(self, *tokens: str) -> bool:
        if self.peek() in tokens:
            self.at += 1
            return True
        return False

    def expect(self, token: str) -> None:
        if not self.take(token):
            raise Unreadable(f"expected {token!r}, got {self.peek()!r}")
