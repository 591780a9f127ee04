"""The one loop: sample groups, learn from them, look at held-out problems, keep a checkpoint.

What happens inside a stage is in its own room; what is shown and written is in the room `report/`.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration, gather_object, set_seed

from rl_lora.config import TrainConfig
from rl_lora.learner.advantages import advantages, shuffle_rewards
from rl_lora.learner.learner import Learner
from rl_lora.learner.trainable import Trainable
from rl_lora.lora.adapter import Adapter
from rl_lora.lora.peft_io import load_adapter, lora_dropout
from rl_lora.lora.trainable_adapter import TrainableAdapter
from rl_lora.metrics.collapse import reply_warning
from rl_lora.metrics.records import MetricsFile, Record, Stopwatch, summarize_groups, summarize_updates, with_speed
from rl_lora.metrics.summary import Evaluation
from rl_lora.policy.policy import Policy
from rl_lora.report.next_command import next_command
from rl_lora.report.run_display import ModelFacts, RunDisplay
from rl_lora.report.run_samples import read_held_out, rewind_episodes, write_held_out, write_samples
from rl_lora.report.run_summary import finished_at, read_summary, write_results
from rl_lora.rollout.curriculum import SEED_STRIDE, curriculum_of
from rl_lora.rollout.demonstrations import Demonstrations
from rl_lora.rollout.environments import environment
from rl_lora.rollout.held_out import evaluate_adapters, held_out
from rl_lora.rollout.python_objects import in_python, with_objects
from rl_lora.rollout.shaping import shaped
from rl_lora.rollout.source import GroupSource
from rl_lora.rollout.worker import RolloutWorker
from rl_lora.sampler.compiled import should_compile
from rl_lora.sampler.factory import make_sampler
from rl_lora.settings.algorithm import advantage_of, objective_of
from rl_lora.settings.dotted import flatten
from rl_lora.system.distributed import no_accelerator
from rl_lora.system.files import FileError, check_writable, write_text, writing
from rl_lora.system.interrupts import later
from rl_lora.system.invocation import is_first_process
from rl_lora.system.plain_yaml import dump
from rl_lora.trainer.checkpoint import Checkpoint, Checkpoints, random_state
from rl_lora.trainer.preflight import preflight
from rl_lora.trainer.run_folder import (
    check_run_dir,
    clear_left_overs,
    holds_run,
    lock_run_dir,
    other_task_error,
    with_base,
)
from rl_lora.trainer.task import model_changes, model_record, task_record
from rl_lora.types import Group

ADAPTER = "policy"
"""The name of the adapter that is trained."""
MAX_CHECKED = 2048
"""Training problems that are looked at before the model is loaded, where they are made from the seed without end."""


def train(config: TrainConfig, *, reward: Any = None, data: Any = None, eval_data: Any = None) -> Path:
    """Train an adapter as `config` says; returns the run's folder.

    `reward`: a function, or whatever else the environment takes as its `reward`. `data`: rows, a list of dicts, a
    `datasets.Dataset`, or a path: prompts for `rl_lora/Prompts-v0`; `eval_data`: those that are held out, by default a
    share of `data`. In `config.env.kwargs` stands a text in their place; resuming such a run takes the same again,
    which is checked.

    A run that is finished already, with `resume`, only shows its summary again.

    Raises:
        ValueError: something is wrong with the config, or another run is writing to the folder; before the model is
            loaded wherever it can be known before.
        FileError: the disk is full, say. What is there is whole, and can be resumed.
    """
    config = with_base(replace(config, env=with_objects(config.env, reward, data, eval_data)))
    run_dir = Path(config.run_dir)
    display = RunDisplay(is_first_process())
    if config.resume and is_finished(config, display):
        preflight(config, [])
        display.summary(run_dir, read_summary(run_dir))
        return run_dir
    with ExitStack() as stack:
        begun = holds_run(run_dir)
        if begun:  # before anything is said of what is in there: it may be another run's that is going on
            check_writable(run_dir, "run_dir")
            stack.enter_context(lock_run_dir(run_dir))
        preflight(config, itertools.islice(training_problems(config), MAX_CHECKED))
        if not begun:
            stack.enter_context(lock_run_dir(run_dir))
            if is_first_process():
                check_run_dir(config)  # a run may have come and gone
        Trainer(config).run()
    return run_dir


def is_finished(config: TrainConfig, display: RunDisplay) -> bool:
    """Whether the run is there to its last step; a damaged summary counts as none, and is written anew."""
    try:
        return finished_at(Path(config.run_dir), config.steps)
    except ValueError as error:
        display.say(str(error))
        return False


def training_problems(config: TrainConfig) -> Iterator[int]:
    """The seeds of a run, in their order; with a curriculum, all that it may choose from. `config` is valid."""
    if (curriculum := curriculum_of(config)) is not None:
        yield from curriculum.seeds
    else:
        yield from itertools.chain.from_iterable(problem_seeds(config, step) for step in range(config.steps))


def problem_seeds(config: TrainConfig, step: int) -> list[int]:
    """The training problems of a step: consecutive seeds, so that a finite environment is gone through in epochs.

    Below 2^32, which is all that some random generators take, as long as the run's seed is below 3,000.
    """
    return _seeds(config, step)[: config.rollout.prompts_per_step]


def fresh_seeds(config: TrainConfig, step: int) -> list[int]:
    """Problems that may take the place of others in a step; those that are not needed are passed over."""
    return _seeds(config, step)[config.rollout.prompts_per_step :]


def _seeds(config: TrainConfig, step: int) -> list[int]:
    n = config.rollout.prompts_per_step + config.rollout.max_replaced
    return [config.seed * SEED_STRIDE + step * n + i for i in range(n)]


@dataclass(frozen=True)
class Finished:
    """What a checkpoint keeps beside weights and optimizer, as it was when a step was over: `evaluated`, too, or not
    yet."""

    step: int
    evaluated: bool
    random_states: list[dict[str, Any]]
    curriculum: dict[str, Any] | None


def tracker_kwargs(name: str) -> dict[str, dict[str, Any]]:
    """What accelerate's trackers take, each in its own words, to call a run by its name."""
    words = {"wandb": "name", "trackio": "name", "mlflow": "run_name", "clearml": "task_name"}
    words |= {"swanlab": "experiment_name", "aim": "experiment"}
    return {tracker: {word: name} for tracker, word in words.items()}


def model_facts(policy: Policy, adapter: Adapter, dropout: float) -> ModelFacts:
    """The model of a run, as its header names it."""
    return ModelFacts(
        name=policy.name,
        n_frozen=sum(parameter.numel() for parameter in policy.model.parameters()),
        dtype=str(policy.dtype).removeprefix("torch."),
        device=str(policy.device),
        n_trained=adapter.n_parameters,
        rank=adapter.rank,
        remarks=policy.remarks(adapter),
        not_shared=policy.not_shared,
        dropout=dropout,
    )


class Trainer:
    """Everything a run holds. `config` has passed `preflight`."""

    def __init__(self, config: TrainConfig):
        self.config, self.run_dir = config, Path(config.run_dir)
        places = ProjectConfiguration(str(self.run_dir), str(self.run_dir / "trackers"))
        trackers = list(config.log.trackers) or None
        self.accelerator = Accelerator(cpu=no_accelerator(), log_with=trackers, project_config=places)
        self.accelerator.wait_for_everyone()  # preflight looked at a run_dir that nobody writes to yet
        self.rank, self.world = self.accelerator.process_index, self.accelerator.num_processes
        if config.rollout.prompts_per_step < self.world * config.learner.updates_per_step:
            raise ValueError(
                f"rollout.prompts_per_step must be at least processes x learner.updates_per_step = {self.world} x "
                f"{config.learner.updates_per_step}, got {config.rollout.prompts_per_step}"
            )
        self.metrics = MetricsFile(self.run_dir / "metrics.jsonl")
        self.checkpoints = Checkpoints(self.run_dir / "checkpoints", config.checkpoint.keep)
        self.display = RunDisplay(self.accelerator.is_main_process)

        objective, self.curriculum = objective_of(config.learner), curriculum_of(config)
        self.finished: Finished | None = None
        """The step that the weights are of; None while they move."""
        self.task: dict[str, Any] = task_record(config)
        self.damaged = self.checkpoints.damaged() if config.resume else []
        """What is wrong with checkpoints that are newer than the one that is gone on from."""
        self.evaluated = False
        """Whether the step that is gone on from has been evaluated, if that was due."""
        with self.display.stage(f"loading {config.model.name}"):
            decoding_steps = config.steps * config.rollout.max_tokens if objective.needs_samples else 0
            compiles = should_compile(config.model.compile, self.accelerator.device, decoding_steps)
            self.policy = Policy.from_config(config.model, self.accelerator.device)
        self.task["model"] = model_record(self.policy)
        set_seed(config.seed, device_specific=True)  # nothing here draws from these; environments and rewards may
        self.trainables: list[Trainable] = [TrainableAdapter(self.policy.bank, ADAPTER, self.policy.name)]
        """All that this run trains, in the same batches: one adapter."""
        self.learner = Learner(
            self.policy,
            config.learner,
            self.trainables,
            temperature=config.rollout.temperature,
            accelerator=self.accelerator,
        )
        self.step = self._start_or_resume()
        self.sampler = make_sampler(self.policy, config.rollout, compile=compiles)
        make_eval_env, self.eval_seeds = held_out(config.env, config.eval.env_kwargs, config.eval.episodes)
        limits: dict[str, Any] = {
            "context_length": self.policy.context_length,
            "versions": lambda name: self.policy.bank[name].version,
        }
        said = {**limits, "on_failure": self.display.failed}
        self.eval_worker = RolloutWorker(make_eval_env, self.sampler, self.policy.chat, config.rollout, **said)
        make_env, chat = environment(config.env), self.policy.chat
        self.source: GroupSource = (
            RolloutWorker(make_env, self.sampler, chat, config.rollout, **said)
            if objective.needs_samples
            else Demonstrations(make_env, chat, config.rollout, **limits)
        )
        best = self.checkpoints.best()
        self.scores = {best.step: best.state["score"]} if config.resume and best else {}
        """Held-out score after each step that was evaluated."""

    def run(self) -> None:
        """Train to `config.steps`, and say what came of it."""
        self._open()
        try:
            with self.display.progress(self.config.steps, self.step):
                self._run()
        except FileError:
            raise
        except (Exception, KeyboardInterrupt):
            self._keep_finished_step()
            raise
        self._close()

    def _run(self) -> None:
        if not self.evaluated:
            self.evaluate_if_due()
            self.checkpoint_if_due()
        while self.step < self.config.steps:
            seconds = Stopwatch()
            waited = self.source.reward_seconds
            with seconds("rollout"):
                groups, sampled = self.rollout()
            seconds.move("rollout", "reward", self.source.reward_seconds - waited)
            everything = gather_object(sampled)
            record = summarize_groups(everything)  # before any group is left out
            record["groups_replaced"] = sum(gather_object([len(sampled) - len(groups)]))
            if self.curriculum is not None:
                record |= self.curriculum.observe(self.step, everything)
            if not self.source.has_rewards:
                record |= dict.fromkeys(("reward", "reward_std", "groups_without_signal", "groups_solved"))
            with later() as hold:
                with seconds("learn"):
                    updates = self.learner.step(groups, self.display.learning, lambda: self._moving(hold))
                    for trainable in self.trainables:
                        self.sampler.weights_changed(trainable.tag, trainable.version)
                self.step += 1
                self.log(with_speed(record | summarize_updates(updates), seconds.seconds), everything)
                self._stands(evaluated=not self.evaluation_due)
            self.evaluate_if_due()
            self.checkpoint_if_due()

    def _moving(self, hold: Callable[[], None]) -> None:
        """Weights are about to move: until the step is written down, a signal waits."""
        hold()
        self.finished = None

    def _stands(self, evaluated: bool) -> None:
        """Take down what a checkpoint of the step needs."""
        curriculum = None if self.curriculum is None else self.curriculum.state()
        self.finished = Finished(self.step, evaluated, gather_object([random_state()]), curriculum)

    def _keep_finished_step(self) -> None:
        """The run ends early: write a checkpoint of the last step that was finished, if there is none yet."""
        latest = self.checkpoints.latest()
        if not self.accelerator.is_main_process or self.finished is None:
            return
        if self.finished.step > (latest.step if latest else 0):
            folder = self._save(self.finished).folder
            self.display.console.print(f"step {self.finished.step} is kept in {folder}")

    def rollout(self) -> tuple[list[Group], list[Group]]:
        """This process's share of the step's groups, and all that were sampled: those that were replaced too.

        Every update learns from the same groups, however many processes there are, unless groups are replaced: each
        process has its share of the replacements.
        """
        updates = self.config.learner.updates_per_step
        if self.curriculum is not None:
            seeds, fresh = self.curriculum.choose(self.step)
        else:
            seeds, fresh = problem_seeds(self.config, self.step), fresh_seeds(self.config, self.step)
        fresh = fresh[self.rank :: self.world]
        deal = np.random.default_rng((self.config.seed, self.step, self.rank))
        groups = self._sample([seed for i, seed in enumerate(seeds) if i // updates % self.world == self.rank], deal)
        sampled = list(groups)
        estimator = advantage_of(self.config.learner)
        while fresh and (silent := [i for i, group in enumerate(groups) if advantages(group, estimator) is None]):
            more = self._sample(fresh[: len(silent)], deal)
            fresh = fresh[len(more) :]
            for i, group in zip(silent, more, strict=False):
                groups[i] = group
            sampled += more
        return groups, sampled

    def _sample(self, seeds: list[int], deal: np.random.Generator) -> list[Group]:
        groups = self.source.collect(
            seeds,
            adapters=[trainable.tag for trainable in self.trainables],
            n=self.config.rollout.group_size,
            random_seed=(self.config.seed, self.step),
            temperature=self.config.rollout.temperature,
            on_token=self.display.sampling,
        )
        groups = [shaped(group, self.config.rollout) for group in groups]
        return shuffle_rewards(groups, deal) if self.config.shuffle_rewards else groups

    def evaluate_if_due(self) -> None:
        """Play the held-out problems: before the first step, every `eval.every`, and after the last one."""
        if not self.evaluation_due:
            return
        seconds = Stopwatch()
        with seconds("evaluate"):
            (share,) = evaluate_adapters(
                self.eval_worker,
                self.eval_seeds[self.rank :: self.world],
                [ADAPTER],
                temperature=self.config.eval.temperature,
                random_seed=self.config.seed,
                on_token=self.display.evaluating,
            )
            place = {seed: i for i, seed in enumerate(self.eval_seeds)}
            problems = sorted(gather_object(list(share.problems)), key=lambda episodes: place[episodes[0].seed])
        evaluation = Evaluation(ADAPTER, tuple(problems))
        record = evaluation.record | {"seconds/evaluate": seconds.seconds["evaluate"]}
        with later() as hold:
            hold()
            if evaluation.score > -math.inf:  # where nothing could be scored, nothing is best
                self.scores[self.step] = evaluation.score
            if self.accelerator.is_main_process:
                self.metrics.append("eval", self.step, record)
                samples = evaluation.samples()
                write_held_out(self.run_dir, self.step, samples)
                warning = reply_warning(samples, read_held_out(self.run_dir, 0)) if self.step else None
                self.display.evaluation(self.step, record, warning)
            self._track(record, "eval")
            self._stands(evaluated=True)

    @property
    def evaluation_due(self) -> bool:
        every, last = self.config.eval.every, self.step == self.config.steps
        due = self.step == 0 or last or (every > 0 and self.step % every == 0)
        return due and bool(self.eval_seeds)

    def checkpoint_if_due(self) -> None:
        """Keep what is needed to go on from here."""
        due = self.step % self.config.checkpoint.every == 0 or self.step == self.config.steps
        if self.step > 0 and (due or self.new_best) and self.accelerator.is_main_process:
            assert self.finished is not None
            self._save(self.finished)

    def _save(self, finished: Finished) -> Checkpoint:
        (trainable,) = self.trainables
        return self.checkpoints.save(
            finished.step,
            trainable,
            self.learner.optimizer(trainable),
            config=flatten(self.config),
            score=self.scores.get(finished.step),
            random_states=finished.random_states,
            curriculum=finished.curriculum,
            task=self.task,
            evaluated=finished.evaluated,
        )

    @property
    def new_best(self) -> bool:
        """Whether this step has just been evaluated, and better than every trained one before it."""
        others = [score for step, score in self.scores.items() if 0 < step < self.step]
        return self.step in self.scores and self.scores[self.step] > max(others, default=-math.inf)

    def log(self, record: Record, groups: list[Group]) -> None:
        """One step's record: to metrics.jsonl, the trackers and the terminal."""
        if self.accelerator.is_main_process:
            self.metrics.append("train", self.step, record)
            self.display.step(self.step, record)
            every = self.config.log.samples_every
            if every and (self.step % every == 0 or self.step == 1):
                self.display.samples(self.step, groups, self.source.caption)
            write_samples(
                self.run_dir, self.step, groups, self.config.log.samples_per_step, self.config.log.samples_mib
            )
        self._track(record, "train")

    def _track(self, record: Record, kind: str) -> None:
        numbers = {f"{kind}/{name}": value for name, value in record.items() if isinstance(value, int | float)}
        with writing(self.run_dir / "trackers"):
            self.accelerator.log(numbers, step=self.step)

    def _start_or_resume(self) -> int:
        """Put the adapter into the bank, fresh or as the last checkpoint has it; returns the step to go on from."""
        config, bank = self.config, self.policy.bank
        latest = self.checkpoints.latest() if config.resume else None
        if latest is not None:
            known = latest.state.get("task") or {}  # older ones have none, or not of the model
            if "model" in known and (changed := model_changes(known["model"], self.task["model"], config.model.name)):
                raise other_task_error(config, latest, changed)
            for trainable in self.trainables:
                latest.restore(trainable, self.learner.optimizer, self.rank)
            if self.curriculum is not None:
                self.curriculum.restore(latest.curriculum)
            self.task |= known
            self.evaluated = latest.state.get("evaluated", True)
            return latest.step
        if config.adapter.init_from is not None:
            load_adapter(Path(config.adapter.init_from), bank, ADAPTER)
        else:
            a = config.adapter
            bank.add(ADAPTER, rank=a.rank, alpha=a.alpha, targets=a.targets, seed=config.seed)
        return 0

    def _open(self) -> None:
        """Write down what is run, and forget what came after the checkpoint that is gone on from."""
        if self.accelerator.is_main_process:
            record = self.run_dir / "config.yaml"
            with writing(record):
                self.run_dir.mkdir(parents=True, exist_ok=True)
            clear_left_overs(self.run_dir)
            self.checkpoints.tidy()
            write_text(record, dump(dataclasses.asdict(self.config)))
            self.display.say(*(f"{damage}: passed over for the newest that is whole" for damage in self.damaged))
            self.display.say(self.metrics.rewind(self.step if self.step else -1, self.evaluated))
            rewind_episodes(self.run_dir, self.step, self.evaluated)
            start = None if self.step else self.config.adapter.init_from
            dropout = 0.0 if start is None else lora_dropout(Path(start))
            facts = model_facts(self.policy, self.policy.bank[ADAPTER], dropout)
            self.display.header(self.config, facts, self.step, self.world)
        flat = {k: v if isinstance(v, int | float | str) else str(v) for k, v in flatten(self.config).items()}
        kwargs = tracker_kwargs(self.run_dir.resolve().name)
        if self.step:
            kwargs["tensorboard"] = {"purge_step": self.step + 1}  # what will be said again
        with writing(self.run_dir / "trackers"):
            self.accelerator.init_trackers("rl_lora", config=flat, init_kwargs=kwargs)
        self._stands(self.evaluated)

    def _close(self) -> None:
        """Save the adapter, and say where everything is."""
        if self.accelerator.is_main_process:
            for trainable in self.trainables:
                trainable.save(self.run_dir / trainable.folder)
            best, adapter = self.checkpoints.best(), self.run_dir / "adapter"
            write_results(
                self.run_dir,
                self.config.steps,
                adapter=adapter,
                best=(best.folder, best.state["score"]) if best else None,
                next_command=in_python(self.config.env, str(adapter)) or next_command(self.config, str(adapter)),
            )
            self.display.summary(self.run_dir, read_summary(self.run_dir))
        self.source.close()
        self.eval_worker.close()
        with writing(self.run_dir / "trackers"):
            self.accelerator.end_training()
