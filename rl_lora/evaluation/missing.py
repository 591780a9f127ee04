"""Drawing the samples of an evaluation that are not in its folder yet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.progress import Progress

from rl_lora.config import EvaluateConfig
from rl_lora.evaluation.plan import SampleSet
from rl_lora.evaluation.sample_store import SampleStore
from rl_lora.metrics.samples import sample_of
from rl_lora.rollout.worker import EpisodeRequest, RolloutWorker
from rl_lora.system.terminal import Terminal


@dataclass
class Occupancy:
    """How full the batches were."""

    tokens_a_look: int
    looks: int = 0
    tokens: int = 0

    def __call__(self, n_tokens: int) -> None:
        self.looks += 1
        self.tokens += n_tokens

    @property
    def rows(self) -> float | None:
        """Mean number of completions that drew a token in a pass."""
        return self.tokens / (self.looks * self.tokens_a_look) if self.looks else None


def draw_missing(
    config: EvaluateConfig,
    worker: RolloutWorker,
    plan: Sequence[Sequence[SampleSet]],
    store: SampleStore,
    occupancy: Occupancy,
    console: Terminal,
) -> None:
    """Draw what is not in the store, batch by batch."""
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("sampling", total=(len(store.wanted) - store.n_found) * config.max_tokens)

        def on_token(n_tokens: int) -> None:
            occupancy(n_tokens)
            progress.advance(task, n_tokens)

        for batch in plan:
            missing: list[tuple[SampleSet, int]] = []
            for samples in batch:
                first = next((k for k in range(config.n) if samples.key(k) not in store.samples), config.n)
                if first < config.n:
                    missing.append((samples, first))
            if not missing:
                continue
            played = worker.play(
                [
                    EpisodeRequest(samples.adapter, samples.problem.seed, config.n - first, first)
                    for samples, first in missing
                ],
                random_seed=(config.seed,),
                temperature=config.temperature,
                on_token=on_token,
            )
            store.append(
                sample_of(
                    episode,
                    first + i,
                    problem=samples.problem.hash,
                    reference=samples.problem.reference,
                    adapter_hash=samples.weights,
                    sampling_hash=samples.sampling_hash,
                )
                for (samples, first), episodes in zip(missing, played, strict=True)
                for i, episode in enumerate(episodes)
            )
            progress.update(task, completed=(len(store.samples) - store.n_found) * config.max_tokens)
