"""samples/: what a run keeps of the episodes that it sampled."""

from __future__ import annotations

import itertools
import random
from pathlib import Path

from rl_lora.report.run_samples import (
    read_held_out,
    read_samples,
    rewind_episodes,
    stored_steps,
    write_held_out,
    write_samples,
)
from rl_lora.types import Episode, Group, Stop, Turn


def groups(n: int, size: int, text: str = "reply") -> list[Group]:
    def episode(seed: int, k: int) -> Episode:
        turn = Turn((1,), (2,), (-0.5,), Stop.END, f"{text} {seed} {k}")
        return Episode("Task-v0", seed, (turn,), float(k), Stop.END, observations=(f"Problem {seed}?",))

    return [Group("Task-v0", s, None, tuple(episode(s, k) for k in range(size))) for s in range(n)]


def test_whole_groups_are_kept_up_to_the_number_asked_for(tmp_path: Path) -> None:
    for step, (n, kept) in enumerate({0: 0, 1: 8, 8: 8, 15: 8, 16: 16, 1000: 40}.items(), 1):
        write_samples(tmp_path, step, groups(5, 8), n, 1.0)
        if n == 0:
            assert stored_steps(tmp_path) == []
            continue
        samples = read_samples(tmp_path, step)
        assert len(samples) == kept
        assert [(s["seed"], s["k"], s["step"]) for s in samples] == [(i // 8, i % 8, step) for i in range(kept)]
        assert samples[0]["completions"] == ["reply 0 0"]


def test_the_folder_stays_within_its_bound_and_the_steps_left_are_spread_evenly(tmp_path: Path) -> None:
    rng = random.Random(0)
    bound = 0.05
    for step in range(1, 201):
        write_samples(tmp_path, step, groups(2, 4, "x" * rng.randint(100, 300)), 8, bound)
        sizes = [path.stat().st_size for path in (tmp_path / "samples").iterdir()]
        assert sum(sizes) <= bound * 2**20
    steps = stored_steps(tmp_path)
    assert steps[0] == 1
    assert steps[-1] == 200
    assert len(steps) > 10
    gaps = [after - before for before, after in itertools.pairwise(steps)]
    assert max(gaps) <= 4 * 200 / len(steps)


def test_a_resumed_run_forgets_what_it_samples_again(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        write_samples(tmp_path, step, groups(1, 2), 2, 1.0)
        write_held_out(tmp_path, step, [{"seed": step}])
    rewind_episodes(tmp_path, 3, evaluated=False)
    assert (stored_steps(tmp_path), read_held_out(tmp_path, 3)) == ([1, 2, 3], [])
    rewind_episodes(tmp_path, 2)
    assert (stored_steps(tmp_path), read_held_out(tmp_path, 2)) == ([1, 2], [{"seed": 2}])
    rewind_episodes(tmp_path, 0)
    assert (stored_steps(tmp_path), read_held_out(tmp_path, 1)) == ([], [])


def test_a_step_in_which_nothing_could_be_scored_is_kept_as_empty(tmp_path: Path) -> None:
    write_samples(tmp_path, 1, [Group("Task-v0", 0, None, (), n_unscorable=4)], 8, 1.0)
    assert read_samples(tmp_path, 1) == []
