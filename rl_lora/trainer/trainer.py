"""The one loop: sample groups, learn from them, look at held-out problems, keep a checkpoint.

What happens inside a stage is in its own room; which groups a step has is in `collector.py`, and what is written down
and shown in `run_log.py`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration, gather_object, set_seed

from rl_lora.config import TrainConfig
from rl_lora.learner.learner import Learner
from rl_lora.lora.peft_io import lora_dropout
from rl_lora.lora.trainable_adapter import TrainableAdapter
from rl_lora.metrics.records import Record, Stopwatch, summarize_groups, summarize_updates, with_speed
from rl_lora.policy.policy import Policy
from rl_lora.report.run_display import RunDisplay
from rl_lora.report.run_summary import finished_at, read_summary
from rl_lora.rollout.curriculum import curriculum_of
from rl_lora.rollout.demonstrations import Demonstrations
from rl_lora.rollout.environments import environment
from rl_lora.rollout.python_objects import with_objects
from rl_lora.rollout.source import GroupSource
from rl_lora.rollout.worker import RolloutWorker
from rl_lora.sampler.compiled import should_compile
from rl_lora.sampler.factory import make_sampler
from rl_lora.settings.algorithm import objective_of
from rl_lora.settings.dotted import flatten
from rl_lora.system.distributed import no_accelerator
from rl_lora.system.files import FileError, check_writable
from rl_lora.system.interrupts import later
from rl_lora.system.invocation import is_first_process
from rl_lora.trainer.checkpoint import Checkpoints, random_state
from rl_lora.trainer.collector import Collector
from rl_lora.trainer.held_out_problems import HeldOutProblems
from rl_lora.trainer.member import Finished, Member
from rl_lora.trainer.preflight import preflight
from rl_lora.trainer.problem_order import training_problems
from rl_lora.trainer.run_folder import check_run_dir, holds_run, other_task_error, with_base
from rl_lora.trainer.run_log import RunLog, model_facts
from rl_lora.trainer.taken import lock_run_dir
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


class Trainer:
    """Everything a run holds. `config` has passed `preflight`."""

    def __init__(self, config: TrainConfig):
        self.config, self.run_dir = config, Path(config.run_dir)
        self.accelerator = accelerator_of(config)
        self.rank, self.world = self.accelerator.process_index, self.accelerator.num_processes
        self.run_log = RunLog(config, self.accelerator)
        self.display = self.run_log.display
        checkpoints = Checkpoints(self.run_dir / "checkpoints", config.checkpoint.keep)
        objective, self.curriculum = objective_of(config.learner), curriculum_of(config)
        self.finished: Finished | None = None
        """The step that the weights are of; None while they move."""
        self.task: dict[str, Any] = task_record(config)
        self.damaged = checkpoints.damaged() if config.resume else []
        """What is wrong with checkpoints that are newer than the one that is gone on from."""
        self.evaluated = False
        """Whether the step that is gone on from has been evaluated, if that was due."""
        with self.display.stage(f"loading {config.model.name}"):
            decoding_steps = config.steps * config.rollout.max_tokens if objective.needs_samples else 0
            compiles = should_compile(config.model.compile, self.accelerator.device, decoding_steps)
            self.policy = Policy.from_config(config.model, self.accelerator.device)
        self.task["model"] = model_record(self.policy)
        set_seed(config.seed, device_specific=True)  # nothing here draws from these; environments and rewards may
        a = config.adapter
        adapter = TrainableAdapter(
            self.policy.bank, ADAPTER, self.policy.name, rank=a.rank, alpha=a.alpha, targets=a.targets
        )
        self.members = [Member(adapter, checkpoints)]
        """All that this run trains, in the same batches: one adapter."""
        self.learner = Learner(
            self.policy,
            config.learner,
            [member.trainable for member in self.members],
            temperature=config.rollout.temperature,
            accelerator=self.accelerator,
        )
        (self.step,) = {self._start_or_resume(member) for member in self.members}
        self.sampler = make_sampler(self.policy, config.rollout, compile=compiles)
        self._prepare_rollouts(from_samples=objective.needs_samples)

    def _prepare_rollouts(self, from_samples: bool) -> None:
        """The held-out problems, and the source of the groups to learn from."""
        config, chat = self.config, self.policy.chat
        make_env = environment(config.env)
        limits: dict[str, Any] = {
            "context_length": self.policy.context_length,
            "versions": lambda name: self.policy.bank[name].version,
        }
        said = {**limits, "on_failure": self.display.failed}
        place = {"rank": self.rank, "world": self.world}
        self.held_out = HeldOutProblems(config, self.sampler, chat, **place, **said)
        self.source: GroupSource = (
            RolloutWorker(make_env, self.sampler, chat, config.rollout, **said)
            if from_samples
            else Demonstrations(make_env, chat, config.rollout, **limits)
        )
        self.collector = Collector(
            config, self.source, self.curriculum, self._tags, **place, on_token=self.display.sampling
        )

    @property
    def _tags(self) -> list[str | None]:
        return [member.trainable.tag for member in self.members]

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
                groups, sampled = self.collector.collect(self.step)
            seconds.move("rollout", "reward", self.source.reward_seconds - waited)
            everything = gather_object(sampled)
            record = self._groups_record(everything, len(sampled) - len(groups))  # before any group is left out
            with later() as hold:
                with seconds("learn"):
                    updates = self.learner.step(groups, self.display.learning, lambda: self._moving(hold))
                    for member in self.members:
                        self.sampler.weights_changed(member.trainable.tag, member.trainable.version)
                self.step += 1
                self.log(with_speed(record | summarize_updates(updates), seconds.seconds), everything)
                self._stands(evaluated=not self.held_out.due(self.step))
            self.evaluate_if_due()
            self.checkpoint_if_due()

    def _groups_record(self, groups: list[Group], n_replaced: int) -> Record:
        """What the step's groups of all processes were like. `n_replaced`: groups of this process."""
        record = summarize_groups(groups)
        record["groups_replaced"] = sum(gather_object([n_replaced]))
        if self.curriculum is not None:
            record |= self.curriculum.observe(self.step, groups)
        if not self.source.has_rewards:
            record |= dict.fromkeys(("reward", "reward_std", "groups_without_signal", "groups_solved"))
        return record

    def _moving(self, hold: Callable[[], None]) -> None:
        """Weights are about to move: until the step is written down, a signal waits."""
        hold()
        self.finished = None

    def _stands(self, evaluated: bool) -> None:
        """Take down what a checkpoint of the step needs."""
        curriculum = None if self.curriculum is None else self.curriculum.state()
        self.finished = Finished(self.step, evaluated, gather_object([random_state()]), curriculum)

    def log(self, record: Record, groups: list[Group]) -> None:
        """One step's record and episodes."""
        self.run_log.train(self.step, record, groups, self.source.caption)

    def evaluate_if_due(self) -> None:
        """Play the held-out problems, and write down what came of it."""
        if not self.held_out.due(self.step):
            return
        seconds = Stopwatch()
        with seconds("evaluate"):
            evaluations = self.held_out.play(self._tags, self.display.evaluating)
        with later() as hold:
            hold()
            for member, evaluation in zip(self.members, evaluations, strict=True):
                if evaluation.score > -math.inf:  # where nothing could be scored, nothing is best
                    member.scores[self.step] = evaluation.score
                record = evaluation.record | {"seconds/evaluate": seconds.seconds["evaluate"]}
                self.run_log.evaluation(self.step, evaluation, record)
            self._stands(evaluated=True)

    def checkpoint_if_due(self) -> None:
        """Keep what is needed to go on from here."""
        due = self.step % self.config.checkpoint.every == 0 or self.step == self.config.steps
        for member in self.members:
            if self.step > 0 and (due or member.is_best(self.step)) and self.accelerator.is_main_process:
                assert self.finished is not None
                self._save(member, self.finished)

    def _save(self, member: Member, finished: Finished) -> Path:
        optimizer = self.learner.optimizer(member.trainable)
        return member.save(finished, optimizer, flatten(self.config), self.task).folder

    def _keep_finished_step(self) -> None:
        """The run ends early: write checkpoints of the last step that was finished, if there are none yet."""
        for member in self.members:
            latest = member.checkpoints.latest()
            if not self.accelerator.is_main_process or self.finished is None:
                return
            if self.finished.step > (latest.step if latest else 0):
                folder = self._save(member, self.finished)
                self.display.console.print(f"step {self.finished.step} is kept in {folder}")

    def _start_or_resume(self, member: Member) -> int:
        """Make a member's weights, fresh or as its last checkpoint has them; returns the step to go on from."""
        config = self.config
        latest = member.checkpoints.latest() if config.resume else None
        if latest is not None:
            known = latest.state.get("task") or {}  # older ones have none, or not of the model
            if "model" in known and (changed := model_changes(known["model"], self.task["model"], config.model.name)):
                raise other_task_error(config, latest, changed)
            latest.restore(member.trainable, self.learner.optimizer, self.rank)
            if self.curriculum is not None:
                self.curriculum.restore(latest.curriculum)
            self.task |= known
            self.evaluated = latest.state.get("evaluated", True)
            if (best := member.checkpoints.best()) is not None:
                member.scores[best.step] = best.state["score"]
            return latest.step
        if config.adapter.init_from is not None:
            member.trainable.load(Path(config.adapter.init_from))
        else:
            member.trainable.initialize(config.seed)
        return 0

    def _open(self) -> None:
        """Write down what is run, and forget what came after the checkpoint that is gone on from."""
        if self.accelerator.is_main_process:
            for member in self.members:
                member.checkpoints.tidy()
        start = None if self.step else self.config.adapter.init_from
        dropout = 0.0 if start is None else lora_dropout(Path(start))
        facts = model_facts(self.policy, self.policy.bank[ADAPTER], dropout)
        self.run_log.open(facts, self.step, self.evaluated, self.damaged)
        self._stands(self.evaluated)

    def _close(self) -> None:
        """Save what was trained, and say where everything is."""
        if self.accelerator.is_main_process:
            for member in self.members:
                adapter = self.run_dir / member.trainable.folder
                member.trainable.save(adapter)
                self.run_log.results(adapter, member.checkpoints.best())
        self.source.close()
        self.held_out.close()
        self.run_log.close()


def accelerator_of(config: TrainConfig) -> Accelerator:
    """The processes of a run, and its trackers. Raises ValueError if there are more processes than problems."""
    places = ProjectConfiguration(config.run_dir, str(Path(config.run_dir) / "trackers"))
    trackers = list(config.log.trackers) or None
    accelerator = Accelerator(cpu=no_accelerator(), log_with=trackers, project_config=places)
    accelerator.wait_for_everyone()  # preflight looked at a run_dir that nobody writes to yet
    if config.rollout.prompts_per_step < accelerator.num_processes * config.learner.updates_per_step:
        raise ValueError(
            f"rollout.prompts_per_step must be at least processes x learner.updates_per_step = "
            f"{accelerator.num_processes} x {config.learner.updates_per_step}, got {config.rollout.prompts_per_step}"
        )
    return accelerator
