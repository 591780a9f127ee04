"""Measure rollouts, learning and whole steps on this machine, alone or beside other libraries.

Everything is repeated in rounds in which the sides take turns, and the table shows medians: absolute times on a shared
machine mean little, ratios within one call more. `make peers` prepares the environments of the others.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))  # also when the package is not installed

import torch
from rich.console import Console
from rich.table import Table

import envs  # noqa: F401  registers the environments
from rl_lora import models
from rl_lora.config import EnvConfig, LearnerConfig, ModelConfig, RolloutConfig
from rl_lora.environment import environment
from rl_lora.learner import Learner
from rl_lora.native_sampler import NativeSampler
from rl_lora.packing import pack
from rl_lora.policy import Policy
from rl_lora.rollout import RolloutWorker
from rl_lora.sampler import Request
from rl_lora.trainer import no_accelerator
from rl_lora.tree import find_trunks
from rl_lora.types import Episode, Group, Stop, Turn
from scripts.command import main as command
from scripts.peers import PEERS, Meter

Figures = dict[str, Any]
MATRIX = 2048
"""Rows of the product that the machine's peak is taken from."""
LAST = 3
"""Rounds at the end whose reward is shown apart: what was learned by then."""


@dataclass
class BenchmarkConfig:
    """Measure rollouts, learning and steps: tokens/s, share of the machine's matrix-product peak, peak memory."""

    model: ModelConfig = field(default_factory=ModelConfig)
    rollouts: list[str] = field(default_factory=lambda: ["8x8x32", "32x8x16"])
    """Prompts x completions x tokens; no completion ends early. The learner then learns from them."""
    steps: list[str] = field(default_factory=lambda: ["16x8x16", "8x8x128"])
    """Prompts x completions x at most so many tokens: whole training steps on two-digit additions."""
    peer: list[str] = field(default_factory=list)
    """Others to measure in turns: trl (steps); transformers, transformers-continuous, vllm (rollouts, which these draw
    from the bare base)."""
    peer_python: str = ".venv-peers/bin/python"
    """Interpreter of the environment that holds trl, peft and transformers."""
    vllm_python: str = ".venv-vllm/bin/python"
    """Interpreter of the environment that holds vllm."""
    rounds: int = 3
    """Times that each side is measured, after one for warming up."""
    rank: int = 1
    """Of the adapter."""
    seed: int = 0
    """Of problems, adapters and draws, of peers too."""
    out: str = "benchmark.json"
    """File for all figures of all rounds."""


def run(config: BenchmarkConfig) -> Figures:
    """Measure, print the tables, write the file."""
    console = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 120)
    rollouts, steps = ([shape(text) for text in texts] for texts in (config.rollouts, config.steps))
    if config.rounds < 1:
        raise ValueError(f"rounds must be >= 1, got {config.rounds}")
    for name in config.peer:
        if name not in PEERS:
            raise ValueError(f"no peer {name!r}; there are {', '.join(PEERS)}")
        if not Path(python_of(config, name)).exists():
            raise ValueError(
                f"{python_of(config, name)} is not there: run `make peers`, or name the peer's interpreter"
            )
    models.check_model(config.model.name, config.model.trust_remote_code)
    with console.status(f"loading {config.model.name} ..."):
        bench = Bench(config)
    table_of: Figures = {"rollouts": [], "steps": []}
    for case in rollouts:
        with console.status(f"rollouts and learning, {case} ..."):
            table_of["rollouts"].append(bench.rollouts(case))
        console.print(rollout_table(table_of["rollouts"][-1]))
    for case in steps:
        with console.status(f"steps, {case} ..."):
            table_of["steps"].append(bench.steps(case))
        console.print(step_table(table_of["steps"][-1]))
    result = {"machine": bench.machine(), "config": asdict(config)} | table_of
    Path(config.out).write_text(json.dumps(result, indent=1) + "\n")
    console.print(f"machine  {json.dumps(result['machine'])}\nfigures  {config.out}")
    return result


@dataclass(frozen=True)
class Shape:
    """Prompts x completions x tokens."""

    prompts: int
    n: int
    tokens: int

    def __str__(self) -> str:
        return f"{self.prompts}x{self.n}x{self.tokens}"


def shape(text: str) -> Shape:
    parts = text.split("x")
    if len(parts) != 3 or not all(part.isdigit() and int(part) > 0 for part in parts):
        raise ValueError(f"a shape is prompts x completions x tokens, such as 16x8x16, got {text!r}")
    return Shape(*map(int, parts))


def python_of(config: BenchmarkConfig, peer: str) -> str:
    return config.vllm_python if peer == "vllm" else config.peer_python


class Bench:
    """Our side: a policy with a fresh adapter, and what measures it."""

    def __init__(self, config: BenchmarkConfig):
        self.config = config
        device = "cpu" if no_accelerator() else torch.accelerator.current_accelerator() or "cpu"
        self.policy = Policy.from_config(config.model, device)
        self.meter = Meter()
        self.worker = RolloutWorker(
            environment(EnvConfig()), NativeSampler(self.policy), self.policy.chat, RolloutConfig()
        )
        sites = self.policy.bank.sites.values()
        active = self.policy.bank.active_experts
        self.n_linear = sum(s.in_features * s.out_features * (active if s.experts else 1) for s in sites)
        self.n_head = self.policy.head.weight.numel()

    def fresh(self) -> None:
        """The adapter as it is before any step."""
        if "bench" in self.policy.bank.adapters:
            self.policy.bank.remove("bench")
        self.policy.bank.add("bench", rank=self.config.rank, seed=self.config.seed)

    def peak(self) -> float:
        """FLOP/s of a large matrix product in the compute dtype: the best of a few."""
        a, b = (torch.randn(MATRIX, MATRIX, device=self.policy.device).to(self.policy.dtype) for _ in range(2))
        seconds = []
        for _ in range(5):
            start = self.meter.now()
            a @ b
            seconds.append(self.meter.now() - start)
        return 2 * MATRIX**3 / min(seconds)

    def prompts(self, n: int) -> list[tuple[int, ...]]:
        return [tuple(self.worker.first_prompt(seed)) for seed in range(n)]

    def rollouts(self, case: Shape) -> Figures:
        """Rounds of sampling, peers in turns, and of learning from what was sampled."""
        prompts = self.prompts(case.prompts)
        trunk = sum(len(ids) for _, ids in find_trunks(("bench", ids) for ids in prompts))
        n_prefill = trunk + sum(map(len, prompts)) - (len(prompts) * trunk if trunk else 0)
        n = case.prompts * case.n * case.tokens
        flops = 2 * self.n_linear * (n_prefill + n) + 2 * self.n_head * n
        job = {"job": "generate", "prompts": prompts, "n": case.n, "max_tokens": case.tokens, "temperature": 1.0}
        rounds: dict[str, list[Figures]] = {}
        with Peers(self.config, [p for p in self.config.peer if p != "trl"], {"max_rows": 256}) as peers:
            for i in range(self.config.rounds + 1):
                self.fresh()
                peak = self.peak()
                groups, rollout = self.sample(prompts, case, i)
                learn = self.learn(groups)
                answers = {name: peer.ask(job | {"stop_ids": [], "adapter": None}) for name, peer in peers.items()}
                if i == 0:
                    continue  # warming up
                ours = {
                    "rollout": rollout | {"tokens": n, "share_of_peak": flops / rollout["seconds"] / peak},
                    "learn": learn | {"share_of_peak": learn["flops"] / learn["seconds"] / peak},
                }
                for name, answer in (ours | answers).items():
                    rounds.setdefault(name, []).append(
                        answer | {"tokens_per_second": answer["tokens"] / answer["seconds"]}
                    )
                rounds.setdefault("peak", []).append({"flops_per_second": peak})
        return {"shape": str(case), "rounds": rounds}

    def sample(self, prompts: list[tuple[int, ...]], case: Shape, seed: int) -> tuple[list[Group], Figures]:
        requests = [
            Request(ids, case.n, case.tokens, adapter="bench", seed=(self.config.seed, seed, i))
            for i, ids in enumerate(prompts)
        ]
        stop_ids, self.policy.chat.stop_ids = self.policy.chat.stop_ids, frozenset()
        try:
            self.meter.start()
            completions = NativeSampler(self.policy).generate(requests)
            measured = self.meter.stop()
        finally:
            self.policy.chat.stop_ids = stop_ids
        groups = [
            Group(
                "bench",
                i,
                "bench",
                tuple(
                    Episode("bench", i, (Turn(ids, c.token_ids, c.logprobs, c.stop),), k % 2, Stop.END, "bench")
                    for k, c in enumerate(of_prompt)
                ),
            )
            for i, (ids, of_prompt) in enumerate(zip(prompts, completions, strict=True))
        ]
        return groups, measured

    def learn(self, groups: list[Group]) -> Figures:
        """One update; tokens are those that had to be computed, each prompt and each common beginning once."""
        config = LearnerConfig()
        signal = [(group, torch.tensor([e.reward - 0.5 for e in group.episodes]).numpy()) for group in groups]
        shared = self.policy.not_shared is None
        batches = pack(
            signal,
            denominators={"bench": 1.0},
            tokens_per_microbatch=config.tokens_per_microbatch,
            shared_prefix=shared,
        )
        tokens, targets = sum(b.n_tokens for b in batches), sum(len(b.targets) for b in batches)
        self.meter.start()
        Learner(self.policy, config).step(groups)
        # Forward, and backward to the activations only; the head's backward is its product with p in the forward.
        return self.meter.stop() | {
            "tokens": tokens,
            "targets": targets,
            "flops": 4 * self.n_linear * tokens + 4 * self.n_head * targets,
        }

    def steps(self, case: Shape) -> Figures:
        """Rounds of training steps on the same problems, TRL in turns."""
        n_steps = self.config.rounds + 1
        first = self.config.seed * n_steps * case.prompts
        problems = range(first, first + n_steps * case.prompts)
        setup = self.trl_setup(case, problems)
        rounds: dict[str, list[Figures]] = {}
        self.fresh()
        learner = Learner(self.policy, LearnerConfig())
        self.worker.config = RolloutConfig(max_tokens=case.tokens)
        with Peers(self.config, [p for p in self.config.peer if p == "trl"], setup) as peers:
            for i in range(n_steps):
                self.meter.start()
                seeds = problems[i * case.prompts : (i + 1) * case.prompts]
                groups = self.worker.collect(seeds, adapters=["bench"], n=case.n, random_seed=(self.config.seed, i))
                rollout_seconds = self.meter.now() - self.meter.began
                learner.step(groups)
                measured = self.meter.stop()
                episodes = [episode for group in groups for episode in group.episodes]
                measured |= {
                    "rollout_seconds": rollout_seconds,
                    "learn_seconds": measured["seconds"] - rollout_seconds,
                    "tokens": sum(episode.n_tokens for episode in episodes),
                    "reward": statistics.fmean(episode.reward for episode in episodes),
                }
                answers = {name: peer.ask({"job": "step"}) for name, peer in peers.items()}
                for name, answer in ({"rl_lora": measured} | answers).items():
                    if i:
                        rounds.setdefault(name, []).append(answer)
        return {"shape": str(case), "rounds": rounds}

    def trl_setup(self, case: Shape, seeds: Sequence[int]) -> Figures:
        env = environment(EnvConfig())()
        problems = [env.reset(seed=seed) for seed in seeds]
        return {
            "prompts": [[{"role": "user", "content": text}] for text, _ in problems],
            "references": [str(sum(map(int, numbers(text)[:2]))) for text, _ in problems],
            "prompts_per_step": case.prompts,
            "group_size": case.n,
            "max_tokens": case.tokens,
            "rank": self.config.rank,
            "alpha": 32,
            "learning_rate": LearnerConfig().learning_rate,
            "seed": self.config.seed,
            "temperature": 1.0,
            "gradient_checkpointing": False,
            "use_cb": False,
        }

    def machine(self) -> Figures:
        device = self.policy.device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()
        versions = {package: metadata.version(package) for package in ("torch", "transformers")}
        threads = {"threads": torch.get_num_threads()} if device.type == "cpu" else {}
        return (
            {"device": name, "dtype": str(self.policy.dtype), "python": platform.python_version()} | threads | versions
        )


def numbers(text: str) -> list[str]:
    return "".join(c if c.isdigit() else " " for c in text).split()


def cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores"


class Peer:
    """Another library in a process of its own; it sleeps while it is not asked."""

    def __init__(self, python: str, setup: Figures):
        self.name = setup["peer"]
        peers = Path(__file__).with_name("peers.py")
        self.log = Path(f"{self.name}.log")
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [python, str(peers)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
            )
        self.versions = self.ask(setup)["versions"]

    def ask(self, message: Figures) -> Figures:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(message) + "\n")
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline() or '{"error": "it ended without an answer"}')
        if "error" in answer:
            raise ValueError(f"peer {self.name}: {answer['error']} (see {self.log})")
        return answer

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()


class Peers(dict[str, Peer]):
    """The peers of one measurement, by name; ended with it."""

    def __init__(self, config: BenchmarkConfig, names: list[str], setup: Figures):
        super().__init__()
        folder = models.resolve_model(config.model.name)
        dtype = config.model.dtype if config.model.dtype != "auto" else "bfloat16"
        for name in names:
            common = {"peer": name, "model": str(folder), "dtype": dtype, "threads": torch.get_num_threads()}
            self[name] = Peer(python_of(config, name), common | setup)

    def __enter__(self) -> Peers:
        return self

    def __exit__(self, *_: object) -> None:
        for peer in self.values():
            peer.close()


def median(rounds: list[Figures], key: str) -> float:
    return statistics.median(figures[key] for figures in rounds)


def rollout_table(figures: Figures) -> Table:
    rounds = figures["rounds"]
    table = Table(title=f"{figures['shape']}: prompts x completions x tokens", title_justify="left")
    for name in ("", "seconds", "tokens/s", "of the matrix-product peak", "peak memory"):
        table.add_column(name, justify="left" if not name else "right")
    for name, of_name in rounds.items():
        if name != "peak":
            share = f"{median(of_name, 'share_of_peak'):.0%}" if "share_of_peak" in of_name[0] else ""
            table.add_row(
                {"rollout": "rl_lora, rollout", "learn": "rl_lora, learning"}.get(name, name),
                f"{median(of_name, 'seconds'):.2f}",
                f"{median(of_name, 'tokens_per_second'):.0f}",
                share,
                gib(median(of_name, "peak_bytes")),
            )
    table.add_row("peak", "", "", f"{median(rounds['peak'], 'flops_per_second') / 1e9:.0f} GFLOP/s", "")
    return table


def step_table(figures: Figures) -> Table:
    rounds = figures["rounds"]
    table = Table(title=f"{figures['shape']}: a training step", title_justify="left")
    for name in (
        "",
        "seconds",
        "rollout",
        "learning",
        "sampled tokens",
        "reward",
        "of the last",
        "peak memory",
        "times faster",
    ):
        table.add_column(name, justify="left" if not name else "right")
    for name, of_name in rounds.items():
        pairs = zip(of_name, rounds["rl_lora"], strict=True)
        ratio = statistics.median(theirs["seconds"] / ours["seconds"] for theirs, ours in pairs)
        table.add_row(
            name,
            *(f"{median(of_name, key):.2f}" for key in ("seconds", "rollout_seconds", "learn_seconds")),
            f"{median(of_name, 'tokens'):.0f}",
            f"{statistics.fmean(f['reward'] for f in of_name):.3f}",
            f"{statistics.fmean(f['reward'] for f in of_name[-LAST:]):.3f}",
            gib(median(of_name, "peak_bytes")),
            "" if name == "rl_lora" else f"{ratio:.1f}",
        )
    return table


def gib(n: float) -> str:
    return f"{n / 2**30:.2f} GiB"


def main() -> None:
    command(BenchmarkConfig, run)


if __name__ == "__main__":
    main()
