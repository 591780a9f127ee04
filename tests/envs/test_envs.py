"""What the environments promise, asked through gymnasium as a trainer asks it."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest
from gymnasium.utils.env_checker import check_env
from hypothesis import given, settings
from hypothesis import strategies as st

from rl_lora import envs
from rl_lora.envs import SingleTurnEnv, TextEnv, TextSpace
from rl_lora.envs.arithmetic import ArithmeticEnv
from rl_lora.envs.prompts import PromptsEnv
from rl_lora.envs.split import split_of
from rl_lora.envs.templates import fill
from rl_lora.rewards import RewardError, Score, Unscorable
from tests import ROOT

ARITHMETIC = "envs:rl_lora/Arithmetic-v0"
PROMPTS = "envs:rl_lora/Prompts-v0"
QUESTION = re.compile(r"What is (\d+) ([-+*]) (\d+)\? Reply with just the number\.")


def parsed(question: str) -> tuple[int, str, int]:
    match = QUESTION.fullmatch(question)
    assert match, question
    return int(match[1]), match[2], int(match[3])


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def sums(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "sums.jsonl", [{"prompt": f"{i} + 1?", "answer": i + 1} for i in range(200)])


# ---- the base ---------------------------------------------------------------------------------------------------


@given(st.text(max_size=40))
def test_a_text_space_holds_every_text_up_to_its_length(text: str) -> None:
    assert text in TextSpace()
    assert (text in TextSpace(20)) == (len(text) <= 20)


def test_a_text_space_holds_nothing_else_and_its_samples() -> None:
    space = TextSpace(10, seed=1)
    assert all(other not in space for other in (None, 5, b"a", ["a"]))
    samples = [space.sample() for _ in range(200)]
    assert all(sample in space for sample in samples)
    assert "" in samples
    assert len(set(samples)) > 50
    assert TextSpace(seed=3).sample() == TextSpace(seed=3).sample()
    assert len(space.sample(mask=(7, None))) == 7


class GuessNumber(TextEnv):
    """Several turns: guess a number from 1 to 7 within three guesses."""

    def start(self, seed: int) -> tuple[str, dict[str, Any]]:
        self.number, self.guesses = seed % 7 + 1, 0
        return "I think of a number from 1 to 7.", {}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        self.guesses += 1
        if not action.isascii() or not action.isdigit():
            return "A number, please.", 0.0, False, self.guesses == 3, {}
        if int(action[:3]) == self.number:
            return "Yes!", 1.0, True, False, {"is_success": True, "reward_parts": {"guesses": float(self.guesses)}}
        hint = "Higher." if int(action[:3]) < self.number else "Lower."
        return hint, 0.0, False, self.guesses == 3, {"is_success": False}


def test_a_multi_turn_game_is_a_subclass_with_start_and_step() -> None:
    env = GuessNumber()
    for seed in range(20):
        env.reset(seed=seed)
        low, high, turns, terminated = 1, 7, 0, False
        while not terminated:
            middle, turns = (low + high) // 2, turns + 1
            answer, reward, terminated, truncated, info = env.step(str(middle))
            assert not truncated
            assert reward == float(terminated)
            low, high = (middle + 1, high) if answer == "Higher." else (low, middle - 1)
        assert turns <= 3
        assert info == {"is_success": True, "reward_parts": {"guesses": turns}}
        env.reset(seed=seed)
        assert [env.step("what?")[2:4] for _ in range(3)] == [(False, False), (False, False), (False, True)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(env, skip_render_check=True)


class Echo(SingleTurnEnv):
    """Asks for a word and hands its reference, a list, to a reward function."""

    def problem(self, seed: int) -> envs.Problem:
        return envs.Problem("Say something.", SHARED)


SHARED = ["a", "b"]


def play(env: gym.Env[str, str], seed: int, answer: str) -> tuple[float, dict[str, Any]]:
    env.reset(seed=seed)
    observation, reward, terminated, truncated, info = env.step(answer)
    assert (observation, terminated, truncated) == ("", True, False)
    return float(reward), info


@pytest.mark.parametrize(
    ("returned", "reward", "info"),
    [
        (0.5, 0.5, {"reward_parts": {}}),
        (Score(0.5, {"a": 1}, success=False), 0.5, {"reward_parts": {"a": 1.0}, "is_success": False}),
        (Score(0.0, success=True), 0.0, {"reward_parts": {}, "is_success": True}),
    ],
)
def test_the_info_of_step_says_what_the_reward_function_said(returned: Any, reward: float, info: Any) -> None:
    assert play(Echo(lambda completion, reference: returned), 0, "x") == (reward, info)


def test_unscorable_is_reported_and_never_a_verdict() -> None:
    def lost(completion: str, reference: Any) -> float:
        raise Unscorable(*completion.split())

    assert play(Echo(lost), 0, "timed-out")[1]["unscorable"] == "timed-out"
    reward, info = play(Echo(lost), 0, "")
    assert reward == 0.0
    assert info["unscorable"]
    assert "is_success" not in info


@pytest.mark.parametrize("returned", [float("nan"), float("inf"), None, "1", KeyError("no"), RuntimeError("boom")])
def test_a_reward_function_that_fails_stops_the_run_naming_environment_seed_and_function(returned: Any) -> None:
    def broken(completion: str, reference: Any) -> Any:
        if isinstance(returned, Exception):
            raise returned
        return returned

    with pytest.raises(ValueError, match=r"Echo, seed 7: .*broken"):
        play(Echo(broken), 7, "x")
    with pytest.raises(RewardError, match=r"rl_lora/Arithmetic-v0, seed 7: .*broken"):
        play(gym.make(ARITHMETIC, reward=broken), 7, "x")


def test_a_reward_function_cannot_change_the_problem_for_others() -> None:
    def greedy(completion: str, reference: Any) -> float:
        reference.clear()
        return 1.0

    play(Echo(greedy), 0, "x")
    assert Echo("format").reset(seed=0)[1]["reference"] == ["a", "b"]


def test_an_episode_is_one_answer_long() -> None:
    env = ArithmeticEnv()
    with pytest.raises(gym.error.ResetNeeded):
        env.step("5")
    play(env, 0, "5")
    with pytest.raises(gym.error.ResetNeeded):
        env.step("5")
    env.reset(seed=0)
    with pytest.raises(ValueError, match="must be a str, got 5"):
        env.step(5)  # type: ignore[arg-type]


def test_fill_replaces_known_names_once_and_nothing_else() -> None:
    assert fill(r"{a} \boxed{} {b!r} {0} {{a}} {c", {"a": "{b}", "b": "x"}) == r"{b} \boxed{} {b!r} {0} {{b}} {c"


@pytest.mark.parametrize("module", ["rl_lora.envs", "rl_lora.rewards", "envs", "rewards"])
def test_environments_and_rewards_know_neither_torch_nor_the_core(module: str) -> None:
    allowed = {"rl_lora", "rl_lora.envs", "rl_lora.rewards", "rl_lora.system"}
    code = f"import sys, {module}; print(*{{'.'.join(name.split('.')[:2]) for name in sys.modules}})"
    imported = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    ours = {name for name in imported.split() if name.partition(".")[0] in ("torch", "transformers", "rl_lora")}
    assert "rl_lora.rewards" in ours
    assert ours <= allowed


def test_short_names_are_the_same_modules_in_a_clone() -> None:
    code = (
        "import envs, rewards.numeric, rl_lora.rewards.numeric, rl_lora.envs\n"
        "from envs.text import TextEnv\n"
        "assert envs is rl_lora.envs and TextEnv is rl_lora.envs.TextEnv\n"
        "assert rewards.numeric is rl_lora.rewards.numeric\n"
        "assert rewards.Unscorable is rl_lora.rewards.Unscorable"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_importing_twice_registers_once() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        importlib.reload(envs)


# ---- both environments ------------------------------------------------------------------------------------------


@pytest.fixture(params=["arithmetic", "prompts", "prompts without references"])
def make(request: pytest.FixtureRequest, sums: Path) -> Callable[[], gym.Env[str, str]]:
    mixed = {"numeric": 1.0, "format": {"weight": 0.1}, "length": 0}
    if request.param == "arithmetic":
        return lambda: gym.make(ARITHMETIC, operations=["+", "-"], digits=[1, 3], reward=mixed)
    if request.param == "prompts":
        return lambda: gym.make(PROMPTS, path=str(sums), reward=mixed, template="{prompt}\nAnswer in \\boxed{}.")
    return lambda: gym.make(PROMPTS, path=str(sums), reward="length", reference_column=None)


def test_gymnasium_finds_nothing_to_object_to(make: Callable[[], gym.Env[str, str]]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(make().unwrapped, skip_render_check=True)
        env = make()
        env.reset(seed=1)
        env.step("\N{SNOWMAN} \0 \ud800")


def test_the_same_seed_gives_the_same_problem_in_every_copy(make: Callable[[], gym.Env[str, str]]) -> None:
    one, other = make(), make()
    for seed in (0, 1, 5, 2**31, 2**70):
        assert one.reset(seed=seed) == other.reset(seed=seed)
        other.reset()
        assert one.reset(seed=seed) == other.reset(seed=seed)
    questions = [one.reset(seed=seed)[0] for seed in range(100)]
    assert len(set(questions)) > 90


def test_without_a_seed_problems_vary_and_can_be_played_again(make: Callable[[], gym.Env[str, str]]) -> None:
    env = make()
    env.reset(seed=3)
    drawn = [env.reset() for _ in range(50)]
    assert len({question for question, _ in drawn}) > 30
    assert all(env.reset(seed=info["seed"])[0] == question for question, info in drawn)
    env.reset(seed=3)
    assert [env.reset() for _ in range(50)] == drawn


# ---- arithmetic -------------------------------------------------------------------------------------------------


def test_the_default_problem_is_two_digit_addition_asked_in_plain_words() -> None:
    env = gym.make(ARITHMETIC)
    for seed in range(300):
        question, info = env.reset(seed=seed)
        a, op, b = parsed(question)
        assert op == "+"
        assert 10 <= a <= 99
        assert 10 <= b <= 99
        assert info["reference"] == a + b
        right, wrong = f"{a + b}", f"{a + b + 1}"
        assert play(env, seed, right) == (1.0, {"reward_parts": {}, "is_success": True, "answer": right})
        assert play(env, seed, wrong) == (0.0, {"reward_parts": {}, "is_success": False, "answer": wrong})
        assert "answer" not in play(env, seed, "no number")[1]
    assert env.unwrapped.n_problems is None  # type: ignore[attr-defined]


@pytest.mark.parametrize("operations", [("+",), ("-",), ("*",), "+-", ["+", "-", "*"]])
@pytest.mark.parametrize("digits", [1, 2, (1, 2), (3, 5), 18])
def test_train_and_eval_share_no_problem_in_either_order(operations: Any, digits: Any) -> None:
    problems: dict[str, set[tuple[frozenset[int], str]]] = {}
    for split in ("train", "eval"):
        env = ArithmeticEnv(operations, digits, split)
        asked = [parsed(env.problem(seed).question) for seed in range(300)]
        assert {op for _, op, _ in asked} == set(operations)
        problems[split] = {(frozenset((a, b)), op) for a, op, b in asked}
        low, high = digits if isinstance(digits, tuple) else (digits, digits)
        assert all(low <= len(str(operand)) <= high for a, _, b in asked for operand in (a, b))
    assert not problems["train"] & problems["eval"]


def test_about_a_tenth_of_all_two_digit_sums_is_held_out() -> None:
    pairs = [(a, b) for a in range(10, 100) for b in range(a, 100)]
    held = sum(split_of(f"+ {a} {b}", 0.1) == "eval" for a, b in pairs)
    assert 0.08 < held / len(pairs) < 0.12
    env = ArithmeticEnv(split="eval")
    seen = {frozenset(parsed(env.problem(seed).question)[::2]) for seed in range(6000)}
    assert 0.95 * held < len(seen) <= held


def test_the_split_is_the_same_in_every_process() -> None:
    code = "from rl_lora.envs.split import split_of; print(''.join(split_of(str(i), 0.5)[0] for i in range(64)))"
    here = "".join(split_of(str(i), 0.5)[0] for i in range(64))
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.stdout.strip() == here
    assert here.startswith("ttetetettttt"), "the hash changed: problems that were held out would be trained on"


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**64), st.sampled_from(["+", "-", "*"]), st.integers(1, 18))
def test_references_are_exact(seed: int, op: str, digits: int) -> None:
    question, reference, _ = ArithmeticEnv((op,), digits).problem(seed)
    a, _, b = parsed(question)
    assert reference == {"+": a + b, "-": a - b, "*": a * b}[op]
    assert play(ArithmeticEnv((op,), digits), seed, str(reference))[1]["is_success"] is True


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"operations": ()}, "operations"),
        ({"operations": ["/"]}, r"got \['/'\]"),
        ({"operations": ["+", "+"]}, "each once"),
        ({"operations": None}, "got None"),
        ({"operations": [["+"]]}, "operations"),
        ({"digits": 0}, "got 0"),
        ({"digits": 19}, "1 to 18"),
        ({"digits": (3, 2)}, r"got \(3, 2\)"),
        ({"digits": (1, 2, 3)}, "digits"),
        ({"digits": "12"}, "digits"),
        ({"digits": True}, "digits"),
        ({"digits": 2.0}, "digits"),
        ({"split": "test"}, "'train' or 'eval', got 'test'"),
        ({"reward": "numerc"}, "no reward is called 'numerc'"),
        ({"template": "What is it?"}, r"must contain \{a\}, \{b\}"),
        ({"template": "{a} {b}", "operations": "+-"}, r"must contain \{op\}"),
        ({"template": None}, "must be a text"),
    ],
)
def test_arithmetic_refuses_what_cannot_be(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gym.make(ARITHMETIC, **kwargs)


# ---- prompts ----------------------------------------------------------------------------------------------------


def test_every_epoch_of_seeds_visits_each_problem_once_in_an_order_of_its_own(sums: Path) -> None:
    env = PromptsEnv(sums, eval_fraction=0)
    n = env.n_problems
    assert n == 200
    epochs = [[env.problem(epoch * n + i).question for i in range(n)] for epoch in range(3)]
    assert all(len(set(epoch)) == n for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert epochs[0] != sorted(epochs[0])


def test_the_held_out_prompts_are_the_rest_and_equal_prompts_stay_together(tmp_path: Path) -> None:
    rows = [{"prompt": f"prompt {i % 300}", "answer": i} for i in range(900)]
    path = write_jsonl(tmp_path / "data.jsonl", rows)
    asked = {}
    for split in ("train", "eval"):
        env = PromptsEnv(path, split=split, template="{prompt}")
        asked[split] = [env.problem(seed).question for seed in range(env.n_problems)]
        assert all(asked[split].count(question) == 3 for question in asked[split])
    assert not set(asked["train"]) & set(asked["eval"])
    assert sorted(asked["train"] + asked["eval"]) == sorted(str(row["prompt"]) for row in rows)
    assert 0.05 < len(asked["eval"]) / 900 < 0.15
    more = write_jsonl(tmp_path / "more.jsonl", [*rows, *({"prompt": f"new {i}", "answer": i} for i in range(900))])
    grown = PromptsEnv(more, split="train")
    assert not {grown.problem(seed).question for seed in range(grown.n_problems)} & set(asked["eval"])


def test_a_file_of_its_own_for_evaluation_is_used_whole(tmp_path: Path, sums: Path) -> None:
    held = write_jsonl(tmp_path / "held.jsonl", [{"prompt": f"held {i}", "answer": i} for i in range(7)])
    evaluation = PromptsEnv(sums, split="eval", eval_path=held)
    assert {evaluation.problem(seed).question for seed in range(7)} == {f"held {i}" for i in range(7)}
    assert evaluation.n_problems == 7
    assert PromptsEnv(sums, eval_path=held).n_problems == 200


def test_a_template_shows_columns_but_never_the_reference_and_keeps_other_braces(tmp_path: Path) -> None:
    row = {"question": r"Is {level} in \frac{1}{2}?", "level": 3, "tags": ["a"], "answer": "72"}
    path = write_jsonl(tmp_path / "data.jsonl", [row])
    template = r"{level} {tags} {prompt} {question} \boxed{answer} {} {0} {other}"
    env = PromptsEnv(path, prompt_column="question", template=template, eval_fraction=0.0)
    asked = row["question"]
    assert env.problem(0)[:2] == (rf'3 ["a"] {asked} {asked} \boxed{{answer}} {{}} {{0}} {{other}}', "72")


@pytest.mark.parametrize("argument", ["template", "demonstration"])
def test_a_misspelled_column_is_no_text(tmp_path: Path, argument: str) -> None:
    path = write_jsonl(tmp_path / "data.jsonl", [{"prompt": "2 x 3?", "equation": "2 * 3", "answer": 6}])
    text = {"template": "{prompt} {equatio}", "demonstration": "{equatio} = {answer}"}[argument]
    arguments: dict[str, Any] = {argument: text}
    with pytest.raises(ValueError, match=r"names \{equatio\}: did you mean \{equation\}"):
        PromptsEnv(path, **arguments)


def test_a_reference_is_any_json_or_none(tmp_path: Path) -> None:
    references = [1, "a", None, [1, {"b": 2}], {"c": []}, 1.5, True]
    path = write_jsonl(tmp_path / "data.jsonl", [{"prompt": "p", "answer": reference} for reference in references])
    env = PromptsEnv(path, reward="format", eval_fraction=0.0)
    got = [env.reset(seed=seed)[1]["reference"] for seed in range(7)]
    assert sorted(map(repr, got)) == sorted(map(repr, references))
    assert PromptsEnv(path, reference_column=None, eval_fraction=0.0).reset(seed=0)[1]["reference"] is None


def test_many_copies_read_a_file_once_and_a_changed_file_again(sums: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[Path] = []
    original = Path.read_bytes

    def counted(self: Path) -> bytes:
        reads.append(self)
        return original(self)

    monkeypatch.setattr(Path, "read_bytes", counted)
    copies = [gym.make(PROMPTS, path=str(sums), split=split) for split in ("train", "eval") for _ in range(64)]
    assert len(reads) == 1
    assert len(copies) == 128
    write_jsonl(sums, [{"prompt": "new", "answer": 1}])
    assert PromptsEnv(sums, eval_fraction=0.0).problem(0).question == "new"
    assert len(reads) == 2


def test_byte_order_mark_blank_lines_and_windows_line_ends_are_read_over(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "a", "answer": 1}\r\n\r\n  \n{"prompt": "b\xe2\x80\xa8c", "answer": 2}')
    env = PromptsEnv(path, eval_fraction=0.0)
    assert {env.problem(seed).question for seed in range(2)} == {"a", "b\u2028c"}


GOOD = b'{"prompt": "a", "answer": 1}\n'


@pytest.mark.parametrize(
    ("content", "kwargs", "message"),
    [
        (GOOD + b'\n{"prompt": "b", ', {}, r"data\.jsonl, line 3: not JSON \(.* at column 17\)"),
        (GOOD + b'["a", 1]', {}, "line 2: expected a JSON object, got a list"),
        (GOOD + b"[" * 100_000, {}, "line 2: not JSON"),
        (GOOD + b'{"prompt": "b", "answer": 1, "answer": 2}', {}, "line 2: .* has 'answer' twice"),
        (GOOD + b'{"prompt": "b", "answer": ' + b"9" * 10_000 + b"}", {}, "line 2: not JSON"),
        (GOOD + b'{"prompt": "\xff", "answer": 1}', {}, "line 2: not UTF-8 .* at byte 12"),
        (GOOD + b'{"prompt": "b"}', {}, "line 2: there is no column 'answer'; there are 'prompt' .*reference_column"),
        (GOOD, {"prompt_column": "question"}, "line 1: there is no column 'question'; there are 'prompt', 'answer'"),
        (GOOD + b"{}", {}, "line 2: there is no column 'prompt'; there are none"),
        (
            GOOD + b'{"prompt": "b", "answer": 1, "hint": 1}',
            {"template": "{hint}"},
            "line 1: there is no column 'hint'",
        ),
        (GOOD + b'{"prompt": 5, "answer": 1}', {}, "line 2: 'prompt' must be a text, got a int"),
        (GOOD + b'{"prompt": " ", "answer": 1}', {}, "line 2: 'prompt' must be a text, got an empty one"),
        (b"", {}, r"data\.jsonl is empty"),
        (b"\n \n", {}, r"data\.jsonl is empty"),
        (GOOD, {"eval_fraction": 1}, "split 'train' of .* is empty.*eval_path"),
        (GOOD, {"eval_fraction": 0, "split": "eval"}, "split 'eval' of .* is empty.*eval_fraction"),
        (GOOD, {"eval_fraction": 1.5}, "between 0 and 1, got 1.5"),
        (GOOD, {"eval_fraction": "half"}, "between 0 and 1"),
        (GOOD, {"split": "test"}, "'train' or 'eval', got 'test'"),
        (GOOD, {"template": "no place for it"}, r"must contain \{prompt\}"),
        (GOOD, {"template": "{answer}"}, r"must contain \{prompt\}"),
        (GOOD, {"template": 5}, "must be a text, got 5"),
        (GOOD, {"prompt_column": "answer"}, "must differ"),
        (GOOD, {"prompt_column": None}, "must be named by a text"),
        (GOOD, {"eval_path": "nowhere.jsonl"}, r"cannot read .*nowhere\.jsonl: No such file"),
        (GOOD, {"path": "nowhere.jsonl"}, r"cannot read /.*nowhere\.jsonl: No such file"),
        (GOOD, {"path": "/"}, "not a file"),
        (GOOD, {"path": ""}, "a path to a JSONL file is needed"),
        (GOOD, {"path": None}, "a path to a JSONL file is needed"),
        (GOOD, {"reward": "no:thing"}, "cannot import 'no'"),
    ],
)
def test_bad_data_is_refused_with_file_and_line(
    tmp_path: Path, content: bytes, kwargs: dict[str, Any], message: str
) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        gym.make(PROMPTS, **{"path": str(path), "eval_fraction": 0.0, **kwargs})


def test_the_data_of_gsm8k_plays_as_it_is() -> None:
    path = ROOT.parent / "shared" / "data" / "gsm8k_test.jsonl"
    if not path.exists():
        pytest.skip(f"{path} is not here")
    env = gym.make(PROMPTS, path=str(path), prompt_column="question", eval_fraction=0.0)
    for seed in range(env.unwrapped.n_problems):  # type: ignore[attr-defined]
        _, info = env.reset(seed=seed)
        assert play(env, seed, info["reference"])[1]["is_success"] is True
