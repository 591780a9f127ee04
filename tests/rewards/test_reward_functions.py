"""Reward functions as people write them: by the names of their parameters, in batches, as coroutines."""

from __future__ import annotations

import ast
import asyncio
import functools
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rl_lora.rewards import Case, Judge, Reply, RewardError, Score, Unscorable, WeightedSum, code_of, resolve, score
from rl_lora.rewards.signature import read
from tests import ROOT

ROW = {"prompt": "2 + 2?", "answer": 4, "level": "easy", "tags": ["sum"]}
CASE = Case(4, "2 + 2?", ROW)
CHAT = Case(4, [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2 + 2?"}], ROW)


def judged(reward: Any, *texts: str, case: Case = CASE, ids: bool = True) -> list[Any]:
    """The values of the replies, or why there is none."""
    replies = [Reply(text, tuple(range(len(text))) if ids else None) for text in texts]
    verdicts = Judge(resolve(reward), ROW).start(case, replies)()
    return [str(verdict) if isinstance(verdict, Unscorable) else verdict.value for verdict in verdicts]


@pytest.mark.parametrize(
    ("reward", "given"),
    [
        (lambda completion, reference: (completion, reference), ("4", 4)),
        (lambda text, target: (text, target), ("4", 4)),
        (lambda text, target=None: (text, target), ("4", 4)),
        (lambda a: a, "4"),
        (lambda completion: completion, "4"),
        (lambda reference, completion: (reference, completion), (4, "4")),
        (lambda prompt, completion: (prompt, completion), ("2 + 2?", "4")),
        (lambda completion, prompt: (completion, prompt), ("4", "2 + 2?")),
        (lambda completion, level: (completion, level), ("4", "easy")),
        (lambda completion, answer, tags: (completion, answer, tags), ("4", 4, ["sum"])),
        (lambda response, reference, level: (response, reference, level), ("4", 4, "easy")),
        (lambda completion, reference, scale=3, level=None: (scale, level), (3, "easy")),
        (lambda completion, record: record, ROW),
        (lambda completion, **kwargs: kwargs, ROW),
        (lambda completion, level, **kwargs: sorted(kwargs), ["answer", "prompt", "tags"]),
        (lambda **kwargs: kwargs["completion"], "4"),
        (lambda *args: args, ("4", 4)),
        (lambda completion, *, answer: answer, 4),
        (lambda answer, reference: (answer, reference), ("4", 4)),
    ],
)
def test_a_function_gets_what_its_parameters_are_named_after(reward: Callable[..., Any], given: Any) -> None:
    assert read(reward, "own", ROW).call(reward, CASE, [Reply("4")], {}) == given


def test_a_wrapper_gets_by_position_what_it_had_by_position() -> None:
    def own(completion: str, reference: Any, level: str = "") -> float:
        return float(len(completion) + reference + len(level))

    @functools.wraps(own)
    def wrapper(c: str, r: Any, **kwargs: Any) -> float:
        return own(c, r, **kwargs)

    assert judged(wrapper, "4") == [9.0]


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (
            lambda completion, reference, dificulty: 0.0,
            "'dificulty'.*no such column.*'answer', 'level', 'prompt', 'tags'",
        ),
        (lambda completion, *, target: 0.0, "'target'.*no such column"),
        (lambda completions, target: [0.0], "'target'.*no such column"),
        (lambda prompt, reply: 0.0, "begins with 'prompt'.*'completion'"),
        (lambda completion, completions: 0.0, "one completion and a batch"),
        (lambda: 0.0, "cannot be called with"),
        ({"own": {"function": lambda c, r: 0.0, "scale": 2}}, "does not take 'scale'"),
    ],
)
def test_what_a_function_wants_and_the_data_have_not_is_said_before_it_is_called(reward: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        judged(reward, "4")


def test_a_function_cannot_change_the_data_for_others() -> None:
    def greedy(completion: str, record: dict[str, Any], tags: list[str]) -> float:
        record.clear()
        tags.append("more")
        return 0.0

    row = {**ROW, "tags": ["sum"]}
    Judge(greedy, row).start(Case(4, "2 + 2?", row), [Reply("4")])()
    assert row == ROW


def test_an_option_is_not_overwritten_by_a_column_and_a_built_in_never_takes_one() -> None:
    def scaled(completion: str, level: str = "none") -> float:
        return float(len(level))

    assert judged({"own": {"function": scaled, "level": "by hand"}}, "4") == [7.0]
    assert judged(scaled, "4") == [4.0]
    row = {**ROW, "strict": True}
    (verdict,) = Judge(resolve("numeric"), row).start(Case(4, "?", row), [Reply("it is 4")])()
    assert isinstance(verdict, Score)
    assert verdict.value == 1.0


# ---- batches ----------------------------------------------------------------------------------------------------


def test_a_batch_function_is_called_once_with_lists() -> None:
    seen: list[Any] = []

    def batch(completions: list[str], prompts: list[str], answer: list[int], **kwargs: Any) -> list[float]:
        seen.append((completions, prompts, answer, {k: v for k, v in kwargs.items() if not callable(v)}))
        return [float(len(text)) for text in completions]

    assert judged(batch, "a", "bcd") == [1.0, 3.0]
    rest = {"level": ["easy"] * 2, "tags": [["sum"]] * 2, "completion_ids": [[0], [0, 1, 2]]}
    assert seen == [(["a", "bcd"], ["2 + 2?"] * 2, [4, 4], rest)]


def test_completions_of_a_conversation_are_messages_as_trl_has_them() -> None:
    def batch(prompts: Any, completions: Any) -> list[float]:
        assert prompts == [CHAT.prompt] * 2
        assert completions == [[{"role": "assistant", "content": text}] for text in ("a", "b")]
        return [0.0, 1.0]

    assert judged(batch, "a", "b", case=CHAT) == [0.0, 1.0]


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ([1.0], "returned 1 reward for 2 completions"),
        (1.0, "must return a list of numbers or Scores, got 1.0"),
        (None, "must return a list"),
        ({"a": 1, "b": 2}, "must return a list"),
        (iter([1.0, 2.0]), "must return a list"),
        ("ab", "must return a list"),
        ([1.0, "2"], "must return a number or a Score, got '2'"),
        ([1.0, float("nan")], "must return a finite number"),
    ],
)
def test_a_batch_that_is_no_list_of_numbers_is_refused_naming_the_function(returned: Any, message: str) -> None:
    def batch(completions: list[str]) -> Any:
        return returned

    with pytest.raises(RewardError, match=f"batch.*{message}"):
        judged(batch, "a", "b")


def test_none_in_a_batch_is_not_applicable_alone_and_left_out_of_a_sum() -> None:
    def maths(completions: list[str], **kwargs: Any) -> list[float | None]:
        return [None if text == "code" else 1.0 for text in completions]

    def code(completions: list[str], **kwargs: Any) -> list[float | None]:
        return [2.0 if text == "code" else None for text in completions]

    (number, reason) = judged(maths, "x", "code")
    assert number == 1.0
    assert "returned None: not applicable" in reason
    assert judged([maths, code], "x", "code") == [1.0, 2.0]
    assert judged([maths, code, "length"], "code") == [3.0]
    (reason,) = judged([maths, maths], "code")
    assert "not applicable" in reason


def test_scores_numpy_and_torch_are_lists_and_metrics_are_parts() -> None:
    numpy = np

    def batch(completions: list[str], log_metric: Any, log_extra: Any) -> Any:
        log_metric("mean_length", 2.0)
        log_extra("text", completions)
        return [Score(0.5, success=True), 1.0]

    first, second = Judge(batch).start(CASE, [Reply("a"), Reply("b")])()
    assert first == Score(0.5, {"mean_length": 2.0}, True)
    assert second == Score(1.0, {"mean_length": 2.0})
    assert judged(lambda completions: numpy.array([0.0, 1.0]), "a", "b") == [0.0, 1.0]
    assert judged(lambda completions: torch.tensor([0.0, 1.0]), "a", "b") == [0.0, 1.0]


def test_what_a_batch_function_raises_is_of_all_its_replies() -> None:
    def down(completions: list[str]) -> list[float]:
        raise Unscorable("503")

    def broken(completions: list[str]) -> list[float]:
        raise KeyError("answer")

    assert judged(down, "a", "b") == ["503", "503"]
    with pytest.raises(RewardError, match=r"broken raised KeyError: 'answer'"):
        judged(broken, "a", "b")


def test_batch_and_single_functions_add_up() -> None:
    reward = {
        "numeric": 1.0,
        "long": {"function": lambda completions: [float(len(c)) for c in completions], "weight": 2},
    }
    assert judged(reward, "4", "none") == [3.0, 8.0]
    assert isinstance(resolve(reward), WeightedSum)


# ---- TRL --------------------------------------------------------------------------------------------------------


def accuracy(completions: list[list[dict[str, str]]], answer: list[Any], **kwargs: Any) -> list[float]:
    return [float(c[0]["content"].strip() == str(a)) for c, a in zip(completions, answer, strict=True)]


def think_format(completions: list[list[dict[str, str]]], **kwargs: Any) -> list[float]:
    return [float(bool(re.match(r"^<think>.*</think>", c[0]["content"], re.DOTALL))) for c in completions]


class SoftOverlong:
    """Of the form of TRL's punishment: an object, of token ids only."""

    def __init__(self, longest: int, margin: int):
        self.longest, self.margin = longest, margin

    def __call__(self, completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
        return [min(0.0, (self.longest - self.margin - len(ids)) / self.margin) for ids in completion_ids]


def test_reward_functions_written_for_trl_run_unchanged() -> None:
    assert judged(accuracy, "4", "5", case=CHAT) == [1.0, 0.0]
    assert judged(think_format, "<think>so</think>4", "4", case=CHAT) == [1.0, 0.0]
    assert judged(SoftOverlong(8, 4), "abc", "abcdef") == [0.0, -0.5]
    assert judged([accuracy, think_format, SoftOverlong(8, 4)], "4", case=CHAT) == [1.0]


def test_token_ids_that_are_not_known_are_said_to_be_missing() -> None:
    with pytest.raises(RewardError, match="SoftOverlong wants 'completion_ids', which is not known here"):
        judged(SoftOverlong(8, 4), "abc", ids=False)


def test_the_functions_that_trl_ships_run_unchanged() -> None:
    trl = pytest.importorskip("trl.rewards", reason="trl is not installed")
    row = {"solution": [r"$\frac{1}{3}$"]}
    case = Case(None, CHAT.prompt, {"solution": r"$\frac{1}{3}$"})

    def values(reward: Any, *texts: str) -> list[Any]:
        verdicts = Judge(reward, row).start(case, [Reply(text, tuple(range(len(text)))) for text in texts])()
        return [verdict.value if isinstance(verdict, Score) else None for verdict in verdicts]

    assert values(trl.accuracy_reward, r"\boxed{\frac{1}{3}}", r"\boxed{\frac{1}{2}}") == [1.0, 0.0]
    assert values(trl.think_format_reward, "<think>\nso\n</think>\n3", "3") == [1.0, 0.0]
    assert values(trl.reasoning_accuracy_reward, r"</think> \boxed{\frac{1}{3}}", r"\boxed{\frac{1}{3}}") == [1.0, 0.0]
    assert values(trl.get_soft_overlong_punishment(8, 4), "abc", "abcdef") == [0, -0.5]
    assert values(trl.get_repetition_penalty_reward(2, -1.0), "abc") == [0.0]
    both = resolve([trl.accuracy_reward, trl.think_format_reward])
    assert values(both, "<think>a</think>" + r"\boxed{\frac{1}{3}}") == [2.0]


# ---- coroutines -------------------------------------------------------------------------------------------------


async def waiting(completion: str, reference: Any) -> float:
    await asyncio.sleep(0.01)
    return float(str(reference) in completion)


def test_async_functions_are_awaited_one_at_a_time_in_batches_and_in_sums() -> None:
    async def batch(completions: list[str], answer: list[int], **kwargs: Any) -> list[float]:
        await asyncio.sleep(0)
        return [float(len(c)) for c in completions]

    async def lost(completion: str, reference: Any) -> float:
        raise Unscorable("timed out")

    assert score(waiting, "4", 4).value == 1.0
    assert judged(waiting, "4", "5") == [1.0, 0.0]
    assert judged(lambda c, r: waiting(c, r), "4") == [1.0]
    assert judged(batch, "4", "55") == [1.0, 2.0]
    assert judged([waiting, batch], "4") == [2.0]
    assert judged(lost, "4") == ["timed out"]


def test_all_coroutines_share_a_loop_that_outlives_them_and_a_failing_one_is_named() -> None:
    loops = set()

    async def noting(completion: str, reference: Any) -> float:
        loops.add((asyncio.get_running_loop(), threading.current_thread()))
        return 0.0

    async def leaving(completion: str, reference: Any) -> float:
        raise SystemExit(0)

    judged(noting, "a", "b")
    with pytest.raises(RewardError, match=r"leaving raised RuntimeError: it raised SystemExit: 0"):
        judged(leaving, "a")
    judged(noting, "c")
    assert len(loops) == 1


def test_a_function_that_forgets_to_return_is_told_how_to_abstain() -> None:
    with pytest.raises(RewardError, match=r"got None; .*raises rewards\.Unscorable"):
        judged(lambda completion, reference: None, "a")


# ---- what a function judges with --------------------------------------------------------------------------------


def test_the_code_of_a_function_changes_with_its_source_what_it_holds_and_its_options() -> None:
    def limit(n: int) -> Callable[..., float]:
        return lambda completion: float(len(completion) < n)

    def optioned(completion: str, a: int) -> float:
        return float(a)

    first, second = (lambda completion: 1.0), (lambda completion: 2.0)
    different: list[Any] = [first, second, limit(2), limit(3), SoftOverlong(8, 4), SoftOverlong(9, 4)]
    different += [functools.partial(optioned, a=1), functools.partial(optioned, a=2)]
    assert len({code_of(reward) for reward in different}) == len(different)
    assert code_of(limit(2)) == code_of(limit(2))
    typed: list[dict[str, Any]] = [{"__name__": "typed"}, {"__name__": "typed"}]
    exec("def own(completion): return 1.0", typed[0])
    exec("def own(completion): return 2.0", typed[1])
    assert code_of(typed[0]["own"]) != code_of(typed[1]["own"])


def test_of_a_script_that_is_run_only_what_the_function_uses_is_its_code(tmp_path: Path) -> None:
    script = """
import sys
sys.path.insert(0, {root!r})
from rewards import code_of
STEPS = 20
LIMIT = 5
def worth(n): return float(n < LIMIT)
def size(completion): return worth(len(completion))
class Sized:
    def __call__(self, completion): return size(completion)
print(repr((code_of(size), code_of(Sized()))))
""".replace("{root!r}", repr(str(ROOT)))

    def code(old: str = "", new: str = "") -> str:
        path = tmp_path / "script.py"
        path.write_text(script.replace(old, new) if old else script)
        return subprocess.run([sys.executable, path], capture_output=True, text=True, check=True).stdout

    first = code()
    assert code("STEPS = 20", "STEPS = 40") == first
    for old, new in (("LIMIT = 5", "LIMIT = 6"), ("n < LIMIT", "n > LIMIT"), ("(len(c", "(-len(c")):
        one, other = ast.literal_eval(code(old, new)), ast.literal_eval(first)
        assert one[0] != other[0]
        assert one[1] != other[1]


def test_calling_by_name_costs_little() -> None:
    judge = Judge(lambda completion, reference: 1.0)
    start = time.process_time()
    for _ in range(2000):
        judge.start(CASE, [Reply("4")])()
    assert time.process_time() - start < 1.0


@pytest.mark.parametrize(
    "value", [np.array([1.0]), np.array(1), np.float16(1), torch.tensor([[1.0]]), Fraction(1), Decimal("1")]
)
def test_one_number_is_a_reward_in_whatever_it_is_wrapped(value: Any) -> None:
    (found,) = judged(lambda completion, reference: value, "a")
    assert found == 1.0


def test_a_second_parameter_spelled_nearly_like_a_column_is_warned_of() -> None:
    def needs(completion: str, lvel: object) -> float:
        return float(lvel == "the reference")

    with pytest.warns(UserWarning, match="no column 'lvel'.*the column 'level'"):
        judge = Judge(resolve(needs), ["prompt", "answer", "level"])
    (verdict,) = judge.start(Case("the reference", "?"), [Reply("x")])()
    assert isinstance(verdict, Score)
    assert verdict.value == 1.0
