"""What the math verifier promises of words around a value: labels, short sentences, JSON, HTML, other languages, joined
boxes. Random numbers; the oracle is the number that was put in. Sentences that settle on nothing stay wrong."""

from __future__ import annotations

import random

import pytest

from rl_lora.rewards import Outcome, verify

RIGHT, WRONG = Outcome.CORRECT, Outcome.WRONG
NAMED = r"""
    Total: @|Ans: @|Ans. @|<b>@</b>|Result: **@**|Solution: @|Answer 77@|<p>The answer is <strong>@</strong>.</p>
    \boxed{\text{The answer is } @}|\boxed{\text{Answer: } @}|<answer>He has @ stamps.</answer>|Perimeter = @
    \boxed{\text{Perimeter: } @}|\boxed{\text{There are } @ \text{ stamps}}|\boxed{She earns \$@}|Number of trees: @
    **Total:** @
    <answer>The total is @</answer>|#### The answer is @|\boxed{\text{Total cost} = @}|<answer>Total: @</answer>
    {"answer": @}|{"reasoning": "2+2", "answer": "@"}|{"final_answer": "@"}|So the end: {"answer": @}|Final result: @
    <answer>The sum of 2 and 5 is @.</answer>|\boxed{\text{Maria needs } @ \text{ more minutes}}|Cost: $@|Area = @ cm^2
    答案：@|所以答案是@。|正确答案为@|最终答案：@个|Ответ: @.|Respuesta: @|Réponse : @|Antwort: @|答：@|答案是 $@$
""".replace("\n", "|").split("|")
UNSETTLED = r"""
    \boxed{\text{The answer is not } @}|\boxed{\text{at least } @}|<answer>He has @ or more stamps.</answer>
    <answer>He has not @ stamps.</answer>|<answer>He has between 1 and @ stamps.</answer>|\boxed{\text{Not: } @}
    <answer>He has @ and a half stamps.</answer>|<answer>He has twice @ stamps.</answer>|\boxed{\text{less than } @}
    <answer>He has @ boxes of 12 stamps.</answer>|<answer>Either @ or 1.</answer>|{"guess": @, "answer": 1}
    {"answer": "not @"}|<answer>He has two boxes of @ stamps.</answer>|\boxed{\text{negative } @}
    \boxed{\text{half of } @}|\boxed{sqrt @}
    答案不是@。|答案可能是@|答案是@或1|答案是3分之@|答案是@万|Ответ: не @|\boxed{\sin @}|<answer>more than @</answer>
    \boxed{\text{He has } @ \text{ dozen}}|\boxed{@!}
    <answer>@ is not enough</answer>|Wrong answer: not @|<answer>Question @</answer>|<answer>2 times @</answer>
""".replace("\n", "|").split("|")


def outcome(completion: str, reference: object) -> Outcome:
    return verify(completion, reference).outcome


def test_the_value_that_a_label_or_a_short_sentence_names_is_the_answer() -> None:
    draw = random.Random(0)
    for form in filter(None, map(str.strip, NAMED)):
        n = draw.randrange(20, 999)
        value = n if "77@" not in form else int(f"77{n}")
        completion = form.replace("@", str(n))
        assert outcome(completion, value) is RIGHT, completion
        assert outcome(completion, value + 1) is WRONG, completion


def test_a_sentence_that_settles_on_no_value_is_no_answer() -> None:
    draw = random.Random(1)
    for form in filter(None, map(str.strip, UNSETTLED)):
        n = draw.randrange(20, 999)
        completion = form.replace("@", str(n))
        assert outcome(completion, n) is not RIGHT, completion


@pytest.mark.parametrize(
    ("completion", "reference", "right"),
    [
        (r"$\frac{1}{5} + \frac{2}{5} = \frac{3}{5}$", r"\frac{3}{5}", True),
        ("$4^2 - 3 = 13$", "13 cm", True),
        ("$4^2 - 3 = 13$", "16", False),
        ('{"final_answer": "y^3"}', "y^3", True),
        ('{"answer": "\\\\frac{1}{2}"}', "0.5", True),
        ("正确答案是C。", "C", True),
        ("正确答案是C。", "B", False),
        ("故选：D", "D", True),
        ("答案不是C。", "C", False),
        ("<answer>Buenos Aires!</answer>", "Buenos Aires", True),
        (r"\boxed{No!}", "No", True),
        (r"\boxed{No!}", "Yes", False),
        (r"\boxed{n!}", "n", False),
        (r"\boxed{ab!}", "ab", False),
        ("We expand.\n#### y^2 - 5y + 6", "y^2-5y+6", True),
        ("We expand.\n#### x = 5", "5", True),
        ("#### B", "B", True),
        ("It is 7.\n#### Final remarks", "7", True),
        ("It is 7.\n#### a) x = 2", "7", False),
        (r"So \boxed{y+8}, or \boxed{8+y}.", "y+8", True),
        (r"Thus $\boxed{0.4}$, or $\boxed{\frac{2}{5}}$.", "0.4", True),
        (r"\boxed{0.4}, or \boxed{\frac{2}{7}}", "0.4", False),
        (r"\boxed{18} or \boxed{17}", "17", False),
        (r"$a_1 = \boxed{6}$ and $a_2 = \boxed{-3}$", "6, -3", True),
        (r"$a_1 = \boxed{6}$ and $a_2 = \boxed{-3}$", "-3", False),
        (r"$\theta_1 = \boxed{6}$, $\theta_2 = \boxed{-3}$", "-3, 6", True),
        (r"\boxed{19}", "Total: 19", True),
        (r"\boxed{19}", r"\text{Total cost: } 19", True),
        (r"\boxed{18}", "Total: 19", False),
        (r"x<sup>2</sup>+1", "x^2+1", True),
    ],
)
def test_places_and_labels_of_other_kinds(completion: str, reference: str, right: bool) -> None:
    assert (outcome(completion, reference) is RIGHT) == right
