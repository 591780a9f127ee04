"""The configuration of a run: nested dataclasses. The docstring under a field is its help on the command line."""

from __future__ import annotations

import os
from dataclasses import KW_ONLY, dataclass, field
from math import inf
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le, Lt, Unit

from rl_lora.algorithms.advantages import ADVANTAGES
from rl_lora.algorithms.objectives import OBJECTIVES
from rl_lora.system.model_names import DEFAULT_MODEL


def expand_home(config: Any, *names: str) -> None:
    """`~` in fields that are paths, or lists of paths, is the user's home, also where no shell has seen it."""
    for name in names:
        value = getattr(config, name)
        if isinstance(value, str):
            setattr(config, name, os.path.expanduser(value))
        elif isinstance(value, list):
            setattr(config, name, [os.path.expanduser(path) for path in value])


def without_module(env_id: str) -> str:
    """The id of one of our own environments needs no module: `envs:rl_lora/Math-v0` is `rl_lora/Math-v0`."""
    name = env_id.removeprefix("rl_lora.").removeprefix("envs:")
    return name if name.startswith("rl_lora/") else env_id


@dataclass
class ModelConfig:
    """The frozen base."""

    name: str = DEFAULT_MODEL
    """Model: a local folder, a Hugging Face hub id, or `smollm2-135m`. That name stands for the hub's
    HuggingFaceTB/SmolLM2-135M-Instruct where it is in the hub's cache or the hub answers in two seconds, else for
    `smollm2-135m-q4`, the same model from a 4-bit file, which needs no hub. The choice is made once on a machine, and a
    run writes down which it was. A resumed run and an evaluation take the base of the run."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Dtype of the base and of the activations; auto: bfloat16 where the device multiplies it fast, which on a CPU is
    timed, else float32. Adapters are float32."""
    compile: bool | None = None
    """Compile the layers for decoding: fewer and faster operations, for some 10 s at the beginning and a C++ compiler
    (on a GPU: triton). By default in training on a CPU where steps x rollout.max_tokens is 1,000 or more and the
    compiler is there. Batches that mix adapters decode without."""
    stop_tokens: list[str] = field(default_factory=list)
    """Tokens that end a reply, beside the model's own, and all that contain their text; for base models that never
    learned to stop, e.g. the empty line behind few-shot examples: ["\\n\\n"]."""
    template_kwargs: dict[str, Any] = field(default_factory=dict)
    """Arguments of the model's chat template beside the messages, e.g. --model.template_kwargs.enable_thinking
    false."""
    trust_remote_code: bool = False
    """Permission for the code that comes with a model to run."""

    def __post_init__(self) -> None:
        expand_home(self, "name")


@dataclass
class AdapterConfig:
    """The adapter that is trained."""

    rank: Annotated[int, Ge(1)] = 1
    """Rank of the adapter: r of W' = W + (alpha / r) B A. Experts of an MoE model get rank / active experts."""
    alpha: Annotated[float, Gt(0), Lt(inf)] = 32.0
    """Scale of the update. The best learning rate does not depend on rank as long as this stays."""
    targets: str | list[str] = "all-linear"
    """Layers to adapt: all linear ones but the head, or names (ends of their paths) such as [q_proj, v_proj]. Of a
    model that reads images or sound too, those of its language model; others where only they have that name."""
    init_from: str | None = None
    """Adapter folder (PEFT format) to start from in place of a fresh adapter; its rank and targets then hold."""

    def __post_init__(self) -> None:
        expand_home(self, "init_from")


@dataclass
class EnvConfig:
    """The task."""

    id: str = "rl_lora/Arithmetic-v0"
    """Gymnasium id of the environment; `module:id` imports the module that registers it."""
    kwargs: dict[str, Any] = field(default_factory=dict)
    """Arguments of the environment, e.g. --env.kwargs.digits 3."""

    def __post_init__(self) -> None:
        self.id = self.id and without_module(self.id)


@dataclass(kw_only=True)
class EpisodeConfig:
    """How episodes are played, in training and in evaluation."""

    max_tokens: Annotated[int, Ge(1)] = 16
    """Limit of one reply; longer ones are cut off and counted as truncated."""
    system_prompt: str | None = None
    """First message of every conversation."""
    max_turns: Annotated[int, Ge(1)] = 16
    """Limit of the replies of an episode."""
    max_rows: Annotated[int, Ge(1)] = 256
    """Completions that are decoded at a time; fewer take less memory."""
    max_cache_gib: Annotated[float, Ge(0), Unit("GiB")] | None = None
    """GiB of the KV cache: keys and values of the completions under way and of their prompts. Fewer completions are
    decoded at a time where they would take more. By default half of the memory that is free."""
    check_every: Annotated[int, Ge(1)] | None = None
    """Tokens between checks for completions that have ended. By default 8 on a GPU, which has to wait for a check, and
    1 elsewhere."""
    max_failed: Annotated[float, Ge(0), Le(1)] = 0.1
    """Share of the episodes of the last ten steps that may fail: the environment or the reward function raises, or
    returns what it may not, or the prompt does not fit the model. They are left out and counted, never scored 0. Beyond
    that share (and more than 32) the run stops; also where all fail, and at 0 with the first one."""
    reward_threads: Annotated[int, Ge(1)] = 32
    """Calls of reward functions, or of an environment's reset and step, that run at a time while sampling goes on,
    where they wait for something, such as a judge on a network; 1: one after another, in the main thread."""
    wait_for_steps: bool = False
    """Whether decoding waits for the steps of environments of several turns, all that began together. An environment
    that waits for something then does not decide which episodes are decoded together: the same seed gives the same run
    to the last bit. Without it, the other episodes are decoded meanwhile, and the same seed gives the same run but for
    rounding. Nothing changes for environments that do not wait."""


@dataclass
class RolloutConfig(EpisodeConfig):
    """How episodes are sampled."""

    prompts_per_step: Annotated[int, Ge(1)] = 16
    """Problems of a step, each sampled by one group of episodes."""
    group_size: Annotated[int, Ge(1)] = 8
    """Episodes of one problem. The group's mean reward is the baseline."""
    max_replaced: Annotated[int, Ge(0)] = 0
    """Limit of the groups of a step that are replaced by groups of other problems because their rewards are all the
    same, which teaches nothing (dynamic sampling: DAPO, arXiv:2503.14476). A replacement may be replaced in turn."""
    curriculum: Literal["none", "success_rate"] = "none"
    """Order of the training problems; none: their own order; success_rate: more of those that succeed about half of the
    time, for an environment with a finite list of problems (`rl_lora/rollout/curriculum.py`)."""
    curriculum_explore: Annotated[float, Ge(0), Le(1)] = 0.5
    """Least share of a step's problems that the curriculum success_rate gives to those not played for longest, untried
    ones first."""
    curriculum_half_life: Annotated[float, Gt(0)] = 20.0
    """Steps after which the outcome of a problem counts half for the curriculum success_rate."""
    overlong_tokens: Annotated[int, Ge(0)] = 0
    """Distance from max_tokens, in tokens, at which the punishment of a long reply begins: it falls from 0 there to -1
    at the limit (soft over-long punishment: DAPO, arXiv:2503.14476), and is the reward part `overlong`; 0: none."""
    overlong_weight: Annotated[float, Ge(0), Lt(inf)] = 1.0
    """Weight of the reward part `overlong`, the punishment of long replies; 0 only reports it."""
    brevity_weight: Annotated[float, Ge(0), Lt(inf)] | None = None
    """Weight of the reward part `brevity`: 0.5 for the shortest episode of a group down to -0.5 for the longest, never
    above 0 for an unsolved one (Kimi k1.5, arXiv:2501.12599). 0 only reports it; null: none."""
    temperature: Annotated[float, Gt(0), "a policy gradient needs samples"] = 1.0
    """Temperature of sampling, and of the log-probabilities that are learned."""


@dataclass
class LearnerConfig:
    """How an adapter learns from groups."""

    objective: Annotated[str, OBJECTIVES] = "reinforce"
    """Function that a step maximises, or `module:name` of one of your own."""
    objective_options: dict[str, Any] = field(default_factory=dict)
    """Options of an objective beside the settings here, e.g. --learner.objective_options.beta 0.1."""
    advantage: Annotated[str | None, ADVANTAGES] = None
    """Function from the rewards of a group to the advantages of its episodes, or `module:name` of one of your own. By
    default the one that belongs to the objective."""
    learning_rate: Annotated[float, Gt(0), Lt(inf)] = 3e-4
    """Learning rate of AdamW, constant and without warm-up, for A and B alike. 3e-4 suits the embedded model (hidden
    size 576); models of 1B and more want 1e-5 to 1e-4, about ten times the rate of full fine-tuning."""
    betas: tuple[Annotated[float, Ge(0), Lt(1)], Annotated[float, Ge(0), Lt(1)]] = (0.9, 0.95)
    """AdamW betas."""
    weight_decay: Annotated[float, Ge(0)] = 0.0
    """AdamW weight decay, on A and B."""
    max_grad_norm: Annotated[float, Ge(0)] = 1.0
    """Norm that the gradient of an adapter is scaled down to; 0 leaves it."""
    updates_per_step: Annotated[int, Ge(1)] = 1
    """Optimizer steps on the episodes of one step, each on its own share of the groups."""
    clip_low: Annotated[float, Ge(0), Le(1)] = 0.2
    """Lower clipping of the ratio by the objective grpo, at 1 - clip_low."""
    clip_high: Annotated[float, Ge(0)] = 0.2
    """Upper clipping of the ratio by the objective grpo, at 1 + clip_high."""
    tokens_per_microbatch: Annotated[int, Ge(1)] = 4096
    """Positions of one forward and backward pass; fewer take less memory, and change nothing else."""
    max_activation_gib: Annotated[float, Ge(0), Unit("GiB")] | None = None
    """GiB that the layers may keep from a forward pass for its backward pass; where it would be more, as many layers as
    it takes are computed again (at 0 all: a third more time). By default half of the memory that is free."""
    max_sampler_learner_kl: Annotated[float, Gt(0)] = 0.5
    """Limit of the mean |log p_learner - log p_sampler|, beyond which the run stops: sampler and learner disagree about
    the policy, and would learn noise."""


@dataclass
class EvalConfig:
    """Held-out evaluation before, during and after training."""

    every: Annotated[int, Ge(0)] = 5
    """Steps between evaluations; 0 evaluates before and after training only."""
    episodes: Annotated[int, Ge(0)] = 256
    """Held-out problems of an evaluation, the same ones every time; 0 evaluates nothing."""
    temperature: Annotated[float, Ge(0)] = 0.0
    """Temperature of sampling in evaluation; 0 is greedy."""
    env_kwargs: dict[str, Any] | None = None
    """Arguments of the environment that differ in evaluation. Where the environment takes a split, {split: eval} is
    added unless given; where it takes none, far away seeds of it are played."""


@dataclass
class CheckpointConfig:
    """Checkpoints: adapter, optimizer, random states, step, config; written atomically."""

    every: Annotated[int, Ge(1)] = 5
    """Steps between checkpoints."""
    keep: Annotated[int, Ge(1)] = 2
    """Newest checkpoints that are kept; the best one by held-out accuracy (or reward) is kept beside them."""


@dataclass
class LogConfig:
    """What is shown and recorded; metrics.jsonl always is."""

    trackers: list[str] = field(default_factory=lambda: ["tensorboard"])
    """Experiment trackers, any of accelerate's: tensorboard, wandb, mlflow, comet_ml, aim, clearml, trackio."""
    samples_every: Annotated[int, Ge(0)] = 5
    """Steps between tables of sampled completions on the terminal; 0: no tables."""
    samples_per_step: Annotated[int, Ge(0)] = 32
    """Sampled episodes of each step that are written to samples/ and shown in report.html, in whole groups."""
    samples_mib: Annotated[float, Ge(0), Unit("MiB")] = 100.0
    """MiB that samples/ may take. Beyond that, steps between others are removed, so that the rest is spread evenly."""


@dataclass
class TrainConfig:
    """Train a LoRA adapter on a causal language model by policy gradient."""

    run_dir: str = "runs/arithmetic"
    """Folder for everything that this run writes."""
    steps: Annotated[int, Ge(1)] = 20
    """Training steps: rollouts, each followed by learner.updates_per_step optimizer steps."""
    seed: Annotated[int, Ge(0), Le(2999)] = 0
    """Seed of the adapter, the training problems and the sampling. The same seed gives the same run."""
    resume: bool = False
    """Continue the run in run_dir from its last checkpoint; a finished run only shows its summary again."""
    shuffle_rewards: bool = False
    """Control in which rewards are dealt out anew among the episodes of a step (of each process), so that there is
    nothing to learn. Held-out accuracy that rises all the same was not taught by the reward."""
    model: ModelConfig = field(default_factory=ModelConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    env: EnvConfig = field(default_factory=EnvConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    learner: LearnerConfig = field(default_factory=LearnerConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)

    def __post_init__(self) -> None:
        expand_home(self, "run_dir")


FROM_RUN: Any = None
"""The value of an evaluation's setting that is taken from the runs of its adapters: see `settings/from_run.py`."""


def model_of_run(**given: Any) -> ModelConfig:
    """The base of the adapters' runs but for what is given: `EvaluateConfig(model=model_of_run(dtype="float32"))`."""
    left_open = dict.fromkeys(("name", "dtype", "stop_tokens", "template_kwargs"), FROM_RUN)
    return ModelConfig(**left_open | given)


def env_of_run(**given: Any) -> EnvConfig:
    """The task of the adapters' runs but for what is given."""
    return EnvConfig(**{"id": FROM_RUN, "kwargs": FROM_RUN} | given)


@dataclass
class EvaluateConfig(EpisodeConfig):
    """Evaluate LoRA adapters, and the bare base, on held-out problems: one base, all adapters in the same batches.
    What is not said of task and base is taken from the runs of the adapters, as far as they agree."""

    adapters: list[str] = field(default_factory=list)
    """Adapter folders (PEFT format), checkpoints, or run folders: the final adapter, or else the last checkpoint's."""
    model: ModelConfig = field(default_factory=model_of_run)
    env: EnvConfig = field(default_factory=env_of_run)
    env_kwargs: dict[str, Any] | None = FROM_RUN
    """Arguments of the environment that differ in evaluation. Where it takes a split, {split: eval} is added."""
    limit: Annotated[int, Ge(1)] | None = 256
    """Held-out problems, the first ones; null: all that the environment has."""
    n: Annotated[int, Ge(1)] = 1
    """Samples of each problem and adapter."""
    temperature: Annotated[float, Ge(0), Lt(inf)] = 0.0
    """Temperature of sampling; 0 is greedy."""
    k: list[int] = field(default_factory=list)
    """Numbers k of pass@k and maj@k, such as 1,4,16, none above n. By default 1, 2, 4, ... and n."""
    against: str | None = None
    """Row, as the table names it, that all others are compared with, beside the base."""
    seed: Annotated[int, Ge(0)] = 0
    """Seed of sampling, and of the permutations of the tests."""
    out: str = "evaluation"
    """Folder for results.json, samples.jsonl and report.html. Samples that it holds and that are asked for again are
    not drawn again; samples that are not asked for are kept in earlier.jsonl."""
    resume: bool = True
    """Use of the samples that the folder `out` holds; false: all samples are drawn again. That is needed where code has
    changed that is not checked: modules that those of your own environments and reward functions import."""
    _: KW_ONLY
    max_tokens: Annotated[int, Ge(1)] = FROM_RUN
    system_prompt: str | None = FROM_RUN
    max_turns: Annotated[int, Ge(1)] = FROM_RUN

    def __post_init__(self) -> None:
        expand_home(self, "adapters", "out")
