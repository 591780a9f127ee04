"""Where a text says "the answer is" in another language, and whether it denies or bounds the number there."""

from __future__ import annotations

import re

from rl_lora.rewards.math.markers import last_match

_ANSWERS = "respuesta réponse antwort risposta resposta lösung odpowiedź antwoord svar cevap vastaus ответ відповідь"
ANSWER_ELSEWHERE = "|".join(_ANSWERS.split())
_ASCII_ANSWERS = tuple(word for word in _ANSWERS.split() if word.isascii())

_CJK_DENIED = r"(?:不|并不|並不|不会|不可能|可能|也许|或许|大概|大约|大約|约|約)"
_SAID = re.compile(
    rf"(?:答案|答え|正解|結果|结果|最终结果)\s*(?P<not>{_CJK_DENIED}\s*是?)?(?:应该?|應該?)?\s*(?:是|为|為|选|選|は|:|=)+\s*[:,]?\s*"
    rf"|(?<![不别別勿非未])(?:故|应|應|所以|因此)?\s*(?<![不别別勿非未])(?:选择?|選)\s*:?\s*(?=[A-J](?![a-z]))|答案\s+(?=[-$\\0-9])|(?<![^\W_])答\s*:\s*|(?:정답|답)\s*(?:은|는|:)\s*:?\s*"
    rf"|(?<![^\W_])(?:{ANSWER_ELSEWHERE}|الجواب|الإجابة|उत्तर|đáp\s+án|đáp\s+số)"
    r"(?:\s+(?:final\w*|correct[ae]?|corretta|correta|exacte|finale))?"
    r"\s*(?:(?:est?|ist|lautet|beträgt|is|är|é|è|هو|है|là)(?!\w)|(?<=r)\s*(?=:))?\s*[:=]?\s*(?=\S)",
    re.IGNORECASE,
)
_CJK_UNSURE = re.compile(
    r"不是|并非|並非|可能|也许|或许|大概|大约|大約|至少|至多|不超过|不超過|以上|以下|之间|左右|ではない|じゃない|ではありません|未満|超え|아니|아닙"
    r"|이상|이하|미만|초과|보다|분之|分之|大于|小于|超过|多于|少于|接近|不到|不等于"
)
_UNSURE_WORDS = """
    nicht nie niemals kein keine weder als fast beinahe mindestens höchstens zwischen entweder vielleicht keineswegs
    no nunca jamás menos más mas menor mayor casi mínimo máximo entre quizás ni pas jamais moins plus inférieure
    inférieur supérieure supérieur presque peut-être non mai meno più quasi minore maggiore almeno massimo tra fra forse
    não nao mais quase maior talvez niet nooit minder meer dan bijna minstens hoogstens tussen geen nie mniej więcej
    prawie najmniej najwyżej między не ни меньше меньшей крайней больше менее более почти между никогда свыше
    менше більше майже inte aldrig mindre mer nästan minst högst mellan
"""
_UNSURE = "|".join(map(re.escape, _UNSURE_WORDS.split()))
_OR = r"(?:oder|o|ou|или|of|lub|albo|eller|або|veya|noch|и|und|y|et|e|a|bis|до|или|或|和|到)"
_UNSURE_LINE = re.compile(
    rf"[^0-9]*(?<![^\W_])(?:{_UNSURE})(?![^\W_])[^0-9]*[0-9].*|[^0-9]*[0-9.,]+[^0-9]*\s{_OR}\s[^0-9]*[0-9].*|[^0-9]*[0-9.,]+\s+değil.*",
    re.IGNORECASE,
)


def said_elsewhere(text: str) -> re.Match[str] | None:
    """Where a text says "the answer is" in another language, the last time."""
    if text.isascii():
        lowered = text.lower()
        if not any(word in lowered for word in _ASCII_ANSWERS):
            return None
    return last_match(_SAID.finditer(text))


_NOT_ANOTHER = re.compile(
    r"(?<=[0-9$})])[^0-9,]{0,20}?(?:,\s*|\s(?:et|e|y|и|und)\s+)(?:而?不是|nicht|non|no|не|а\s+не|ikke|niet|inte)\s*[^0-9]*[0-9.,]+\W*\Z"
)


def without_another(line: str) -> str:
    """A sentence without the value that it denies behind its own: "26,不是25"."""
    return _NOT_ANOTHER.sub("", line) if len(line) <= 200 else line


_LISTED = re.compile(rf"\s*([0-9]+(?:\.[0-9]+)?)\s+{_OR}\s+([0-9]+(?:\.[0-9]+)?)\W*", re.IGNORECASE)


def listed_elsewhere(line: str) -> str | None:
    """Two numbers with "and" or "or" of another language between them, as a list."""
    match = _LISTED.fullmatch(line)
    return f"{match[1]}, {match[2]}" if match else None


def unsure_elsewhere(line: str) -> bool:
    """Whether a sentence of another language denies or bounds the number that it names, or names two."""
    line = line[:200]
    return denied_near(line) or _UNSURE_LINE.fullmatch(line) is not None


def denied_near(sentence: str) -> bool:
    """Whether a sentence in Chinese, Japanese or Korean denies or bounds a number."""
    return _CJK_UNSURE.search(sentence) is not None
