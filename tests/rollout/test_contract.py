"""What an environment may return and raise, and what is said of the rest: with environments as users write them."""

from __future__ import annotations

import math
from decimal import Decimal
from fractions import Fraction
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch

from rl_lora.config import EnvConfig
from rl_lora.envs import SingleTurnEnv, TextEnv
from rl_lora.envs.text import Problem
from rl_lora.rewards import Score
from rl_lora.rollout.contract import StepResult, TaskError, reset_env, step_env
from rl_lora.rollout.environments import environment
from rl_lora.system.user_code import user_frames
from tests.tiny_reward import RAISES

INFINITE = float("inf")


class Given(TextEnv):
    """Returns what it is given."""

    def __init__(self, start: Any = ("Say it.", {}), result: Any = ("", 1.0, True, False, {})) -> None:
        super().__init__()
        self.given, self.result = start, result

    def start(self, seed: int) -> Any:
        raise NotImplementedError

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        return self.given

    def step(self, action: str) -> Any:
        if isinstance(self.result, BaseException):
            raise self.result
        return self.result


def outcome(reward: Any = 1.0, **info: Any) -> StepResult:
    return step_env(Given(result=("", reward, True, False, info)), 3, "four")


@pytest.mark.parametrize(
    "value",
    [
        *(
            1,
            0.5,
            True,
            np.float32(0.5),
            np.int64(2),
            np.bool_(True),
            np.array(0.5),
            np.array([0.5]),
            torch.tensor(0.5),
        ),
        *(np.array([0.5]), torch.tensor([True]), torch.tensor(1, dtype=torch.bfloat16), Fraction(1, 2), Decimal("0.5")),
    ],
)
def test_rewards_and_their_parts_are_numbers_of_python_numpy_or_torch(value: Any) -> None:
    found = outcome(value, reward_parts={"part": value})
    assert found.reward == found.reward_parts["part"] == (value.item() if hasattr(value, "item") else float(value))
    assert type(found.reward) is float


@pytest.mark.parametrize(
    "value",
    [
        *(None, "1.0", float("nan"), INFINITE, -INFINITE, 1j, np.float64("nan"), np.complex64(1), 10**400, b"1", [1.0]),
        *({}, np.array([1.0, 2.0]), torch.tensor([1.0, 2.0]), torch.tensor(INFINITE), np.str_("1.0")),
    ],
)
def test_anything_else_is_an_error_that_names_environment_seed_value_and_reply(value: Any) -> None:
    for reward, info, what in ((value, {}, "the reward"), (1.0, {"reward_parts": {"p": value}}, "reward part 'p'")):
        with pytest.raises(TaskError) as error:
            outcome(reward, **info)
        message = str(error.value)
        assert message.startswith("Given, seed 3: ")
        assert f"{what} must be a finite number, got {value!r}"[:60] in message
        assert "the reply was 'four'" in message


@pytest.mark.parametrize(
    ("value", "meant"),
    [(True, True), (np.bool_(False), False), (0, False), (1.0, True), (torch.tensor(True), True), (None, None)],
)
def test_a_verdict_is_a_bool_and_none_is_no_verdict(value: Any, meant: bool | None) -> None:
    assert outcome(is_success=value).success is meant
    assert outcome().success is None


@pytest.mark.parametrize("value", ["False", "true", 0.5, 2, [], {}, np.array([True, False]), float("nan")])
def test_nothing_else_is_a_verdict(value: Any) -> None:
    with pytest.raises(TaskError, match=r"Given, seed 3: info\['is_success'\] must be True or False, got "):
        outcome(is_success=value)
    if not isinstance(value, np.ndarray):
        with pytest.raises(ValueError, match="success must be True, False or None, got "):
            Score(1.0, success=value)


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (("", 1.0, True, False, None), "the info of step() must be a dict, got None"),
        (("", 1.0, True, False, {"reward_parts": None}), "info['reward_parts'] must be a dict, got None"),
        (("", 1.0, True, {}), "step() must return (observation, reward, terminated, truncated, info), got ('', 1.0"),
        (1.0, "step() must return (observation, reward, terminated, truncated, info), got 1.0"),
        (None, "terminated, truncated, info), got None"),
        (
            (None, 0.0, False, False, {}),
            "gives NoneType observations; a text environment gives str, or messages",
        ),
        (
            (b"go on", 0.0, False, False, {}),
            "gives bytes observations; a text environment gives str, or messages with roles, got b'go on'",
        ),
        (("", 0.0, "False", False, {}), "terminated must be True or False, got 'False'"),
        (("", 0.0, False, None, {}), "truncated must be True or False, got None"),
    ],
)
def test_what_step_returns_is_as_gymnasium_has_it(result: Any, message: str) -> None:
    with pytest.raises(TaskError) as error:
        step_env(Given(result=result), 3, "four")
    assert message in str(error.value)
    assert "Given, seed 3: " in str(error.value)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("Say it.", "Given, seed 3: reset() must return (observation, info), got 'Say it.'"),
        (("Say it.",), "got ('Say it.',)"),
        (("Say it.", None), "the info of reset() must be a dict, got None"),
        ((None, {}), "Given gives NoneType observations; a text environment gives str"),
    ],
)
def test_what_reset_returns_is_as_gymnasium_has_it(given: Any, message: str) -> None:
    with pytest.raises(TaskError) as error:
        reset_env(Given(given), 3)
    assert message in str(error.value)


@pytest.mark.parametrize("start", ["Say it.", "ab", None, ("Say it.", {}, {})])
def test_a_start_that_returns_something_else_than_text_and_info_is_told_so(start: Any) -> None:
    class Wrong(TextEnv):
        def start(self, seed: int) -> Any:
            return start

        def step(self, action: str) -> Any:
            raise AssertionError

    with pytest.raises(TaskError, match=r"Wrong, seed 3: start\(\) must return \(observation, info\), got "):
        reset_env(Wrong(), 3)


def test_what_is_raised_comes_with_environment_seed_reply_and_the_users_own_lines() -> None:
    class Faulty(TextEnv):
        def start(self, seed: int) -> tuple[str, dict[str, Any]]:
            return "Say 3", {}

        def step(self, action: str) -> Any:
            return "", float(int(action) == 3), True, False, {}

    with pytest.raises(TaskError) as error:
        step_env(Faulty(), 5, "x" * 1000)
    message = str(error.value)
    assert "Faulty, seed 5: step() raised ValueError: invalid literal for int() with base 10: 'xxx" in message
    assert "the reply was 'xxxx" in message
    assert "(1002 characters)" in message
    assert f'File "{__file__}", line ' in message
    assert "float(int(action) == 3)" in message
    assert error.value.reason.startswith("step() raised ValueError: invalid literal")


class Late(BaseException):
    """As the time-outs of some libraries are."""


class Judged(SingleTurnEnv):
    def problem(self, seed: int) -> Problem:
        return Problem("Say it.", {})


def test_what_a_reward_function_raises_comes_with_its_own_lines_and_no_others() -> None:
    env = gym.wrappers.TimeLimit(Judged("tests.tiny_reward:keyed"), 5)
    reset_env(env, 5)
    with pytest.raises(TaskError) as error:
        step_env(env, 5, "four")
    message = str(error.value)
    assert "Judged, seed 5: the reward function tests.tiny_reward.keyed raised KeyError: 'answer'" in message
    assert "the reply was 'four'" in message
    assert RAISES in message
    assert message.count('File "') == 1


@pytest.mark.parametrize("ends", [SystemExit(0), SystemExit("bye"), GeneratorExit(), Late()])
def test_no_exception_of_a_users_code_ends_the_run_as_if_it_were_finished(ends: BaseException) -> None:
    with pytest.raises(TaskError, match=f"Given, seed 3: step.. raised {type(ends).__name__}"):
        step_env(Given(result=ends), 3, "four")

    def judge(completion: str, reference: Any) -> float:
        raise ends

    env = Judged(judge)
    reset_env(env, 3)
    with pytest.raises(TaskError, match=f"Judged, seed 3: .*raised {type(ends).__name__}"):
        step_env(env, 3, "four")


class Unmade(TextEnv):
    """Raises what it is told while it is made."""

    def __init__(self, what: str = "") -> None:
        super().__init__()
        if what == "exit":
            raise SystemExit(0)
        len({"a key": [], "a type": 5}[what])  # type: ignore[arg-type]

    def start(self, seed: int) -> tuple[str, dict[str, Any]]:
        raise NotImplementedError

    def step(self, action: str) -> Any:
        raise NotImplementedError

    def close(self) -> None:
        raise OSError("closed already")


gym.register(id="Unmade-v0", entry_point="tests.rollout.test_contract:Unmade")


@pytest.mark.parametrize(
    ("what", "said"), [("exit", "SystemExit: 0"), ("other", "KeyError: 'other'"), ("a type", "TypeError: object of")]
)
def test_an_environment_that_cannot_be_made_is_an_error_with_its_own_lines(what: str, said: str) -> None:
    with pytest.raises(ValueError, match="making it raised ") as error:
        environment(EnvConfig("Unmade-v0", {"what": what}))
    assert f"environment 'Unmade-v0': making it raised {said}" in str(error.value)
    assert "test_contract.py, line " in str(error.value)
    with pytest.raises(ValueError, match=r"environment 'Unmade-v0' does not take \{'wht': 'exit'\}"):
        environment(EnvConfig("Unmade-v0", {"wht": "exit"}))


def test_an_environment_that_cannot_be_closed_costs_nothing() -> None:
    with pytest.warns(UserWarning, match=r"Unmade-v0: close\(\) raised OSError: closed already"):
        environment(EnvConfig("Unmade-v0", {"what": "a key"}))


def test_half_a_character_is_no_text() -> None:
    with pytest.raises(TaskError, match=r"Given gives a text that is no Unicode: .*'a\\ud800b'"):
        reset_env(Given(("a\ud800b", {})), 3)


class Speechless(Exception):
    def __str__(self) -> str:
        raise RuntimeError


def test_an_exception_is_told_whatever_its_message() -> None:
    with pytest.raises(TaskError, match=r"raised Speechless: <a message that raises RuntimeError>"):
        step_env(Given(result=Speechless()), 3, "four")
    with pytest.raises(TaskError, match=r"raised ValueError: x+\.\.\. \(1000000 characters\)"):
        step_env(Given(result=ValueError("x" * 1_000_000)), 3, "four")


def test_ctrl_c_inside_a_users_code_is_ctrl_c() -> None:
    with pytest.raises(KeyboardInterrupt):
        step_env(Given(result=KeyboardInterrupt()), 3, "four")


def test_lines_that_a_dataclass_made_are_not_shown_as_a_users() -> None:
    def score() -> Score:
        return Score(math.nan)

    with pytest.raises(ValueError, match="finite") as error:
        score()
    assert [frame.name for frame in user_frames(error.value)][-1] == "score"
