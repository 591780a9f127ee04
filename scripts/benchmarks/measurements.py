"""What `benchmark.py` measures of our own: rollouts, learning, steps, and what the machine could do at most."""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from rl_lora.attention.prefixes import find_shared_prefixes, prefix_of
from rl_lora.config import EnvConfig, LearnerConfig, ModelConfig, RolloutConfig
from rl_lora.learner.learner import Learner
from rl_lora.learner.packing import pack
from rl_lora.policy import loading
from rl_lora.policy.policy import Policy
from rl_lora.rollout.environments import environment
from rl_lora.rollout.worker import RolloutWorker
from rl_lora.sampler.compiled import should_compile
from rl_lora.sampler.factory import make_sampler
from rl_lora.sampler.protocol import Request
from rl_lora.scripts.benchmarks.peer_process import Figures
from rl_lora.scripts.benchmarks.peers import Meter
from rl_lora.system.distributed import no_accelerator
from rl_lora.system.dtype import compute_dtype
from rl_lora.types import Episode, Group, Stop, Turn

MATRIX = {"cpu": 2048, "cuda": 8192}
"""Rows of the product that the machine's peak is taken from."""
COPIED = {"cpu": 1 << 28, "cuda": 1 << 31}
"""Bytes of the copy that the memory's bandwidth is taken from: more than caches hold."""
SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
)
SHAPES = {
    "llama-135m": (576, 1536, 30, 9, 3, 49152),
    "llama-1b": (2048, 8192, 16, 32, 8, 128256),
    "llama-8b": (4096, 14336, 32, 32, 8, 128256),
}
"""Models of random weights: what they cost depends on their shape alone."""


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


def adapter_names(n: int) -> list[str]:
    return ["bench", *(f"bench{i}" for i in range(1, n))]


def carried(n_prompts: int, n_adapters: int) -> list[str]:
    """The adapter of each prompt: they are dealt out in turn."""
    names = adapter_names(n_adapters)
    return [names[i % n_adapters] for i in range(n_prompts)]


class Bench:
    """Our side: a policy with fresh adapters, and what measures it.

    Args:
        random: a key of `SHAPES` in place of a model's weights.
    """

    def __init__(self, model: ModelConfig, *, random: str | None = None, rank: int = 1, seed: int = 0):
        self.rank, self.seed = rank, seed
        device = torch.device("cpu" if no_accelerator() else torch.accelerator.current_accelerator() or "cpu")
        compiles = should_compile(model.compile, device)
        self.policy = Policy.from_config(model, device) if random is None else random_policy(random, model, device)
        self.meter = Meter()
        limits = RolloutConfig()
        self.sampler = make_sampler(self.policy, limits, compile=compiles)
        self.worker = RolloutWorker(environment(EnvConfig()), self.sampler, self.policy.chat, limits)
        sites = self.policy.bank.sites.values()
        active = self.policy.bank.active_experts
        self.n_linear = sum(s.in_features * s.out_features * (active if s.experts else 1) for s in sites)
        self.n_head = self.policy.head.weight.numel()
        self.learner = Learner(self.policy, LearnerConfig())

    def fresh(self, n_adapters: int = 1) -> None:
        """The adapters as they are before any step, each with a seed of its own."""
        for i, name in enumerate(adapter_names(n_adapters)):
            if name not in self.policy.bank.adapters:
                self.policy.bank.add(name, rank=self.rank, seed=self.seed + i)
            adapter = self.policy.bank[name]
            adapter.initialize(self.seed + i)
            adapter.version += 1

    def peak(self) -> float:
        """FLOP/s of a large matrix product in the compute dtype: the best of a few."""
        n = MATRIX.get(self.policy.device.type, MATRIX["cuda"])
        a, b = (torch.randn(n, n, device=self.policy.device).to(self.policy.dtype) for _ in range(2))
        return 2 * n**3 / self._best(lambda: a @ b)

    def bandwidth(self) -> float:
        """Bytes/s that memory gives and takes in a large copy: the best of a few."""
        n = COPIED.get(self.policy.device.type, COPIED["cuda"])
        a, b = torch.zeros(2, n, dtype=torch.uint8, device=self.policy.device)
        return 2 * n / self._best(lambda: b.copy_(a))

    def _best(self, work: Callable[[], object]) -> float:
        seconds = []
        for _ in range(5):
            start = self.meter.now()
            work()
            seconds.append(self.meter.now() - start)
        return min(seconds)

    def prompts(self, n: int) -> list[tuple[int, ...]]:
        return [tuple(self.worker.first_prompt(seed)) for seed in range(n)]

    def rollout_costs(self, prompts: Sequence[tuple[int, ...]], case: Shape, n_adapters: int = 1) -> Figures:
        """What sampling takes at least: multiplications and additions with weights; bytes of weights, read once for all
        prompts and once a step, and of keys and values, those of a prompt read once for all of its completions."""
        tagged = list(zip(carried(len(prompts), n_adapters), prompts, strict=True))
        prefixes = find_shared_prefixes(tagged)
        n_prefill = sum(len(ids) for _, ids in prefixes)
        for adapter, ids in tagged:
            prefix = prefix_of(prefixes, adapter, ids)
            n_prefill += len(ids) - (0 if prefix is None else len(prefixes[prefix][1]))
        n = case.prompts * case.n * case.tokens
        weights = (self.n_linear + self.n_head) * self.policy.head.weight.element_size()
        read = sum(n_prefill + case.prompts * case.n * t for t in range(case.tokens))
        return {
            "tokens": n,
            "flops": 2 * self.n_linear * (n_prefill + n) + 2 * self.n_head * n,
            "bytes": weights * case.tokens + self.policy.cache_bytes_per_token * read,
        }

    def sample(
        self, prompts: list[tuple[int, ...]], case: Shape, seed: int, n_adapters: int = 1
    ) -> tuple[list[Group], Figures]:
        """Prompt i carries adapter i % n_adapters."""
        adapters = carried(len(prompts), n_adapters)
        requests = [
            Request(ids, case.n, case.tokens, adapter=adapter, seed=(self.seed, seed, i), stop_ids=frozenset())
            for i, (ids, adapter) in enumerate(zip(prompts, adapters, strict=True))
        ]
        self.meter.start()
        completions = self.sampler.generate(requests)
        measured = self.meter.stop()
        groups = [
            Group(
                "bench",
                i,
                adapter,
                tuple(
                    Episode("bench", i, (Turn(ids, c.token_ids, c.logprobs, c.stop),), k % 2, Stop.END, adapter)
                    for k, c in enumerate(of_prompt)
                ),
            )
            for i, (ids, adapter, of_prompt) in enumerate(zip(prompts, adapters, completions, strict=True))
        ]
        return groups, measured

    def learn(self, groups: list[Group]) -> Figures:
        """One update of each adapter; tokens are those that had to be computed, each shared prefix and prompt once."""
        signal = [(group, torch.tensor([e.reward - 0.5 for e in group.episodes]).numpy()) for group in groups]
        shared = self.policy.not_shared is None
        batches = pack(
            signal,
            denominators={group.adapter: 1.0 for group in groups},
            tokens_per_microbatch=self.learner.config.tokens_per_microbatch,
            shared_prefix=shared,
        )
        tokens, targets = sum(b.n_tokens for b in batches), sum(len(b.targets) for b in batches)
        self.meter.start()
        self.learner.step(groups)
        # Forward, and backward to the activations only; the head's backward is its product with p in the forward.
        return self.meter.stop() | {
            "tokens": tokens,
            "targets": targets,
            "flops": 4 * self.n_linear * tokens + 4 * self.n_head * targets,
        }

    def step(self, learner: Learner, seeds: Sequence[int], case: Shape, i: int) -> Figures:
        """One training step on the problems of these seeds."""
        self.worker.config = RolloutConfig(max_tokens=case.tokens)
        self.meter.start()
        groups = self.worker.collect(seeds, adapters=adapter_names(1), n=case.n, random_seed=(self.seed, i))
        rollout_seconds = self.meter.now() - self.meter.began
        learner.step(groups)
        measured = self.meter.stop()
        episodes = [episode for group in groups for episode in group.episodes]
        return measured | {
            "rollout_seconds": rollout_seconds,
            "learn_seconds": measured["seconds"] - rollout_seconds,
            "tokens": sum(episode.n_tokens for episode in episodes),
            "reward": statistics.fmean(episode.reward for episode in episodes),
        }

    def trl_setup(self, case: Shape, seeds: Sequence[int]) -> Figures:
        env = environment(EnvConfig())()
        problems = [env.reset(seed=seed) for seed in seeds]
        return {
            "prompts": [[{"role": "user", "content": text}] for text, _ in problems],
            "references": [str(sum(map(int, numbers(text)[:2]))) for text, _ in problems],
            "prompts_per_step": case.prompts,
            "group_size": case.n,
            "max_tokens": case.tokens,
            "rank": self.rank,
            "alpha": 32,
            "learning_rate": LearnerConfig().learning_rate,
            "seed": self.seed,
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


def random_policy(shape: str, model: ModelConfig, device: torch.device) -> Policy:
    """Random weights in a known shape, and the tokenizer of `model`."""
    sizes: dict[str, Any] = dict(zip(SIZES, SHAPES[shape], strict=True))
    config = LlamaConfig(**sizes, max_position_embeddings=8192)
    with device:
        network = AutoModelForCausalLM.from_config(config, dtype=compute_dtype(model.dtype, device))
    return Policy(network, loading.load_tokenizer(model.name), name=shape)


def numbers(text: str) -> list[str]:
    return "".join(c if c.isdigit() else " " for c in text).split()


def cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores"
