"""The generators of reasoning-gym as text environments: over a hundred kinds of problems, made from the seed, endless.

One reply is one answer: no curricula, no mixtures of generators.
"""

from __future__ import annotations

import functools
import json
import os
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from rl_lora.envs.split import check_fraction, check_split, split_of
from rl_lora.envs.templates import fill, placeholders
from rl_lora.envs.text import Problem, SingleTurnEnv
from rl_lora.envs.worked import WORKED
from rl_lora.rewards import RewardSpec, Score, Unscorable

SIZE = 2**20
"""Problems of a generator, a virtual number: each is made when it is asked for."""
TRIES = 1000
"""Draws of one more problem of a split, before it is believed that the split has none."""
SOLVED = 0.99
"""Generators score in [0, 1] and pay for parts of an answer: from here on an answer is right."""
RUNS_REPLIES = {
    "binary_matrix",
    "countdown",
    "intermediate_integration",
    "n_queens",
    "polynomial_multiplication",
    "puzzle24",
    "simple_integration",
    "spiral_matrix",
    "string_insertion",
}
"""Generators whose own verdict passes an answer to Python's eval, or to sympy's parser, which calls it."""
HASHED = {"isomorphic_strings", "knight_swap", "polynomial_multiplication", "ransom_note"}
"""Generators that go through sets, whose order is another one in every process unless PYTHONHASHSEED is set."""
TAGGED = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


class ReasoningGymEnv(SingleTurnEnv):
    """`rl_lora/ReasoningGym-v0`: problems of a generator of reasoning-gym (`pip install 'rl_lora[reasoning-gym]'`).

    Problems are drawn from the seed, with replacement; the hash of a question decides on which side it is, so that no
    question is on both, however few there are.

    Args:
        dataset: the generator's name, such as leg_counting, chain_sum or gsm_symbolic.
        config: its settings, e.g. {min_animals: 2, max_animals: 2}.
        template: what is asked; {question} stands for the generator's question.
        demonstration: a reply that solves the problem, for `rl-lora sft`, as a template: {answer}, {question} and
            the generator's metadata may stand in it ({answer_cot} of gsm_symbolic), and {worked}, a solution in steps,
            for the generators of `rl_lora.envs.worked`. Problems that have no one answer are not demonstrated.
        reward: see `rewards.resolve`; the reference is the answer, a text. By default the generator's own verdict on
            what stands between the last <answer> tags, or else on the whole reply: 1.0 if it is right, or 0.0, also
            where its scorer fails on the reply but not on the problem's own answer.
        eval_fraction: the share of questions that are held out. Where problems take long to make, a larger share makes
            evaluation start sooner.
        size: how many problems the generator believes to have; for the few that refuse the default.
        split: "train" or "eval".

    Raises:
        ValueError: an argument that cannot be, reasoning-gym is not installed, a side without problems, a generator
            whose problems would not follow from the seed.
    """

    def __init__(
        self,
        dataset: str = "",
        config: Mapping[str, Any] | None = None,
        template: str = "{question}",
        demonstration: str = "{answer}",
        reward: RewardSpec | None = None,
        eval_fraction: float = 0.1,
        size: int = SIZE,
        split: str = "train",
    ) -> None:
        super().__init__(self._verdict if reward is None else reward)
        self.split = check_split(split)
        check_fraction(eval_fraction)
        self.eval_fraction = float(eval_fraction)
        if reward is None and dataset in RUNS_REPLIES:
            raise ValueError(
                f"the own verdict of {dataset!r} evaluates a reply as code, which is not done here: name a reward, "
                "such as math or a 'module:function' of your own"
            )
        if dataset in HASHED and os.environ.get("PYTHONHASHSEED", "random") == "random":
            raise ValueError(
                f"the problems of {dataset!r} follow from the seed only under a fixed order of Python's sets: start "
                "with PYTHONHASHSEED=0 in the environment"
            )
        if "question" not in placeholders(template):
            raise ValueError(f"template must contain {{question}}, got {template!r}")
        placeholders(demonstration)
        self.template, self.demonstration = template, demonstration
        self.key = (dataset, _as_key(config), size)
        self._generator = _generator(*self.key)
        self._entry: dict[str, Any] = {}
        known = {"question", "answer", *self._draw(0)["metadata"], *(("worked",) if dataset in WORKED else ())}
        if unknown := placeholders(demonstration) - known:
            raise ValueError(
                f"demonstration names {', '.join(sorted(unknown))}, and {dataset} has {', '.join(sorted(known))}"
                + ("" if dataset in WORKED else f" ({{worked}} is for {', '.join(WORKED)})")
            )

    def problem(self, seed: int) -> Problem:
        self._entry = entry = self._draw(seed)
        question, answer = entry["question"].strip(), entry["answer"]
        asked = fill(self.template, {"question": question})
        return Problem(asked, answer, None if answer is None else self._demonstrated(entry))

    def _draw(self, seed: int) -> dict[str, Any]:
        """The entry of a seed: the first of its draws that is on this side."""
        rng = np.random.default_rng(seed)
        for _ in range(TRIES):
            entry = _entry(*self.key, int(rng.integers(self.key[2])))
            if split_of(entry["question"], self.eval_fraction) == self.split:
                return entry
        raise ValueError(
            f"none of {TRIES} problems of {self.key[0]} is on the side {self.split!r} with "
            f"eval_fraction={self.eval_fraction}: change it, or the generator's config"
        )

    def _demonstrated(self, entry: dict[str, Any]) -> str:
        names = placeholders(self.demonstration)
        values = {name: str(value) for name, value in entry["metadata"].items() if name in names}
        values |= {"question": entry["question"].strip(), "answer": entry["answer"]}
        if "worked" in names:
            values["worked"] = WORKED[self.key[0]](entry)
        return fill(self.demonstration, values)

    def _verdict(self, completion: str, reference: Any) -> Score:
        tagged = TAGGED.findall(completion)
        answer = (tagged[-1] if tagged else completion).strip()
        try:
            solved = self._solves(answer)
        except Exception as error:  # int("I do not know"): some scorers expect an answer's form
            if not self._judges():
                raise Unscorable(f"{self.key[0]}'s verdict raised {type(error).__name__}: {error}") from error
            solved = False
        return Score(float(solved), success=solved)

    def _solves(self, answer: str) -> bool:
        return float(self._generator.score_answer(answer, self._entry)) >= SOLVED

    def _judges(self) -> bool:
        """Whether the generator's scorer works on this problem: it knows the problem's own answer for right."""
        try:
            return self._solves(self._entry["answer"])
        except Exception:
            return False


def _as_key(config: Mapping[str, Any] | None) -> str:
    """A generator's settings as one text, so that copies of an environment share the generator."""
    settings = {} if config is None else config
    if not isinstance(settings, Mapping) or (ours := {"seed", "size"} & set(settings)):
        raise ValueError(
            f"config must be a mapping of the generator's settings, got {config!r}"
            if not isinstance(settings, Mapping)
            else f"config may not set {', '.join(sorted(ours))}: problems come from the environment's seed"
        )
    try:
        return json.dumps(dict(settings), sort_keys=True)
    except TypeError as error:
        raise ValueError(f"config must be plain numbers, texts and lists of them, got {config!r}") from error


@functools.lru_cache(maxsize=16)
def _generator(name: str, config: str, size: int) -> Any:
    try:
        import reasoning_gym
        from reasoning_gym.factory import DATASETS
    except ImportError as error:
        raise ValueError("rl_lora/ReasoningGym-v0 needs reasoning-gym: pip install 'rl_lora[reasoning-gym]'") from error
    if name not in DATASETS:
        raise ValueError(f"dataset must be a generator of reasoning-gym, got {name!r}; there are {', '.join(DATASETS)}")
    try:
        return reasoning_gym.create_dataset(name, size=size, seed=0, **json.loads(config))
    except (AssertionError, TypeError, ValueError) as error:
        raise ValueError(f"{name} with {config} and size {size}: {type(error).__name__}: {error}") from error


@functools.lru_cache(maxsize=4096)
def _entry(name: str, config: str, size: int, index: int) -> dict[str, Any]:
    """Shared by the copies of an environment that play one group: do not change it."""
    entry: dict[str, Any] = _generator(name, config, size)[index]
    return entry
