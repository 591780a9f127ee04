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
    """The frozen base model."""

    name: str = DEFAULT_MODEL
    """Base model: a local folder, a Hugging Face hub id, or `smollm2-135m`. That name stands for the hub's
    HuggingFaceTB/SmolLM2-135M-Instruct where it is in the hub's cache or the hub answers within two seconds, else for
    `smollm2-135m-q4`, the same model from a 4-bit file, which needs no hub. The choice is made once on a machine. A run
    records its base, which a resumed run and an evaluation use."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Data type of the base and of the activations. auto is bfloat16 where the device multiplies it fast (on a CPU,
    this is timed), else float32. Adapters are always float32."""
    compile: bool | None = None
    """Compilation of the layers for decoding: fewer and faster operations, after some 10 s at the beginning, with a C++
    compiler (on a GPU: triton). By default for training on a CPU where steps x rollout.max_tokens is 1,000 or more and
    the compiler is found. On a GPU, batches that mix adapters decode without it."""
    stop_tokens: list[str] = field(default_factory=list)
    """Tokens that end a reply, in addition to the model's own; every token that contains one of these texts ends it
    too. Base models that never learned to stop need them, e.g. the empty line behind few-shot examples: ["\\n\\n"]."""
    template_kwargs: dict[str, Any] = field(default_factory=dict)
    """Arguments of the model's chat template besides the messages, e.g. --model.template_kwargs.enable_thinking
    false."""
    trust_remote_code: bool = False
    """Permission for the code that comes with a model to run. It is never taken from a model or a run."""

    def __post_init__(self) -> None:
        expand_home(self, "name")


@dataclass
class AdapterConfig:
    """The LoRA adapter that is trained."""

    rank: Annotated[int, Ge(1)] = 1
    """Rank r of the update W' = W + (alpha / r) B A. Each expert of a mixture of experts gets rank / active experts."""
    alpha: Annotated[float, Gt(0), Lt(inf)] = 32.0
    """Scale alpha of the update. The best learning rate does not depend on the rank as long as alpha stays the same."""
    targets: str | list[str] = "all-linear"
    """Layers to adapt: all-linear (all linear layers but the head), or names such as [q_proj, v_proj], which are ends
    of layers' paths. In a model that also reads images or sound, these are layers of its language model, and other
    layers only for a name that no layer of the language model has."""
    init_from: str | None = None
    """Adapter folder (PEFT format) to start from, in place of a fresh adapter. Its rank and targets apply."""

    def __post_init__(self) -> None:
        expand_home(self, "init_from")


@dataclass
class EnvConfig:
    """The environment, which sets the task."""

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
    """Limit of one reply in tokens; a longer reply is cut off and counted as truncated."""
    system_prompt: str | None = None
    """System prompt: the first message of every conversation. In an evaluation, an empty text stands for none, also
    where the run has one."""
    max_turns: Annotated[int, Ge(1)] = 16
    """Limit of an episode in replies."""
    max_rows: Annotated[int, Ge(1)] = 256
    """Limit of completions that are decoded at the same time; fewer take less memory."""
    max_cache_gib: Annotated[float, Ge(0), Unit("GiB")] | None = None
    """Limit of the KV cache in GiB, for the completions under way and their prompts; where it would be exceeded, fewer
    completions are decoded at the same time. By default half of the free memory."""
    check_every: Annotated[int, Ge(1)] | None = None
    """Tokens between two checks for completions that have ended. By default 8 on a GPU, which a check makes wait, and 1
    elsewhere."""
    max_failed: Annotated[float, Ge(0), Le(1)] = 0.1
    """Share of the episodes of the last ten steps that may fail before the run stops. An episode fails where the
    environment or the reward function raises or returns something invalid, or where the prompt does not fit the model;
    it is left out and counted, never scored 0. Up to 32 failures are taken whatever their share, unless every episode
    fails; 0 stops at the first failure."""
    reward_threads: Annotated[int, Ge(1)] = 32
    """Calls of reward functions, or of an environment's reset and step, that run at the same time during sampling where
    they wait for something, such as a judge on a network; 1 runs them one after another in the main thread."""
    wait_for_steps: bool = False
    """Decoding that waits for the steps of multi-turn environments that began together. The time that a step takes then
    does not decide which episodes are decoded together, and the same seed gives the same run to the last bit. Without
    it, other episodes are decoded meanwhile, and the same seed gives the same run but for rounding. Environments that
    do not wait for anything behave alike in both cases."""


@dataclass
class RolloutConfig(EpisodeConfig):
    """How episodes are sampled for training."""

    prompts_per_step: Annotated[int, Ge(1)] = 16
    """Problems of a step, each sampled by one group of episodes."""
    group_size: Annotated[int, Ge(1)] = 8
    """Episodes of a group, all of the same problem. The mean reward of the group is the baseline."""
    max_replaced: Annotated[int, Ge(0)] = 0
    """Limit of groups in a step that are replaced by groups of other problems because all their rewards are equal,
    which teaches nothing (dynamic sampling: DAPO, arXiv:2503.14476). A replacement may be replaced in turn."""
    curriculum: Literal["none", "success_rate"] = "none"
    """Order of the training problems. none: as the environment has them. success_rate: more of the problems that
    succeed about half of the time; the environment must have a finite list of problems."""
    curriculum_explore: Annotated[float, Ge(0), Le(1)] = 0.5
    """Least share of a step's problems for those not played for longest, untried ones first, in the curriculum
    success_rate."""
    curriculum_half_life: Annotated[float, Gt(0)] = 20.0
    """Steps after which the outcome of a problem counts half, in the curriculum success_rate."""
    overlong_tokens: Annotated[int, Ge(0)] = 0
    """Distance from max_tokens, in tokens, within which a reply is punished for its length: from 0 at that distance
    down to -1 at the limit (soft over-long punishment: DAPO, arXiv:2503.14476); 0 punishes none. The punishment is the
    reward part `overlong`."""
    overlong_weight: Annotated[float, Ge(0), Lt(inf)] = 1.0
    """Weight of the reward part `overlong`; 0 only reports it."""
    brevity_weight: Annotated[float, Ge(0), Lt(inf)] | None = None
    """Weight of the reward part `brevity`: 0.5 for the shortest episode of a group down to -0.5 for the longest, never
    above 0 for an unsolved one (Kimi k1.5, arXiv:2501.12599). 0 only reports it; null leaves it out."""
    temperature: Annotated[float, Gt(0), "a policy gradient needs samples"] = 1.0
    """Sampling temperature, which also applies to the log-probabilities that are learned."""


@dataclass
class LearnerConfig:
    """How an adapter learns from groups of episodes."""

    objective: Annotated[str, OBJECTIVES] = "reinforce"
    """Function that a step maximises, or `module:name` of one of your own."""
    objective_options: dict[str, Any] = field(default_factory=dict)
    """Options of an objective beside the settings here, e.g. --learner.objective_options.beta 0.1."""
    advantage: Annotated[str | None, ADVANTAGES] = None
    """Function from the rewards of a group to the advantages of its episodes, or `module:name` of one of your own. By
    default the one that belongs to the objective."""
    learning_rate: Annotated[float, Gt(0), Lt(inf)] = 3e-4
    """Learning rate of A and B alike, constant and without warm-up. 3e-4 suits the default model (hidden size 576);
    models of 1B parameters and more want 1e-5 to 1e-4, about ten times the rate of full fine-tuning."""
    betas: tuple[Annotated[float, Ge(0), Lt(1)], Annotated[float, Ge(0), Lt(1)]] = (0.9, 0.95)
    """AdamW betas: decay rates of the running means of the gradient and of its square."""
    weight_decay: Annotated[float, Ge(0)] = 0.0
    """AdamW weight decay of A and B."""
    max_grad_norm: Annotated[float, Ge(0)] = 1.0
    """Limit of the norm of an adapter's gradient, to which larger gradients are scaled down; 0 sets no limit."""
    updates_per_step: Annotated[int, Ge(1)] = 1
    """Optimizer steps on the episodes of one step, each on its own share of the groups."""
    clip_low: Annotated[float, Ge(0), Le(1)] = 0.2
    """Lower clipping of the importance ratio by the objective grpo, at 1 - clip_low."""
    clip_high: Annotated[float, Ge(0)] = 0.2
    """Upper clipping of the importance ratio by the objective grpo, at 1 + clip_high."""
    tokens_per_microbatch: Annotated[int, Ge(1)] = 4096
    """Token positions of one forward and backward pass; fewer take less memory, and change nothing else."""
    max_activation_gib: Annotated[float, Ge(0), Unit("GiB")] | None = None
    """Limit in GiB of the activations that layers keep from a forward pass for its backward pass. Where it would be
    exceeded, as many layers as necessary are computed again; at 0 all are, which takes a third more time. By default
    half of the free memory."""
    max_sampler_learner_kl: Annotated[float, Gt(0)] = 0.5
    """Limit of the mean |log p_learner - log p_sampler|, above which the run stops: sampler and learner then disagree
    about the policy, and learning would follow noise."""


@dataclass
class EvalConfig:
    """Held-out evaluation before, during and after training."""

    every: Annotated[int, Ge(0)] = 5
    """Steps between two evaluations; 0 evaluates before and after training only."""
    episodes: Annotated[int, Ge(0)] = 256
    """Held-out problems of an evaluation, the same ones every time; 0 evaluates nothing."""
    temperature: Annotated[float, Ge(0)] = 0.0
    """Sampling temperature of the evaluation; 0 is greedy."""
    env_kwargs: dict[str, Any] | None = None
    """Arguments of the environment that differ in evaluation. An environment that takes a split gets {split: eval}
    unless given another; of one that takes none, far away seeds are played."""


@dataclass
class CheckpointConfig:
    """Checkpoints: adapter, optimizer, random states, step and configuration, written atomically."""

    every: Annotated[int, Ge(1)] = 5
    """Steps between checkpoints."""
    keep: Annotated[int, Ge(1)] = 2
    """Newest checkpoints that are kept; the best one by held-out accuracy (or reward) is kept beside them."""


@dataclass
class LogConfig:
    """What is shown and recorded beside metrics.jsonl, which is always written."""

    trackers: list[str] = field(default_factory=lambda: ["tensorboard"])
    """Experiment trackers, any of accelerate's: tensorboard, wandb, mlflow, comet_ml, aim, clearml, trackio."""
    samples_every: Annotated[int, Ge(0)] = 5
    """Steps between two tables of sampled completions on the terminal; 0 shows none."""
    samples_per_step: Annotated[int, Ge(0)] = 32
    """Sampled episodes of each step that are written to samples/ and shown in report.html, in whole groups; 0 keeps
    none."""
    samples_mib: Annotated[float, Ge(0), Unit("MiB")] = 100.0
    """Limit of the folder samples/ in MiB. Beyond it, steps between others are removed, so that the remaining steps are
    spread evenly."""


@dataclass
class TrainConfig:
    """Train a LoRA adapter on a causal language model by policy gradient."""

    run_dir: str = "runs/arithmetic"
    """Folder for everything that this run writes."""
    steps: Annotated[int, Ge(1)] = 20
    """Training steps: a rollout or a batch of demonstrations each, with learner.updates_per_step optimizer steps."""
    seed: Annotated[int, Ge(0), Le(2999)] = 0
    """Random seed of the adapter, the training problems and the sampling. The same seed gives the same run."""
    resume: bool = False
    """Continue the run in run_dir from its last checkpoint; a finished run only shows its summary again."""
    shuffle_rewards: bool = False
    """Control experiment: rewards are dealt out anew among the episodes of a step (of each process), so that there is
    nothing to learn. If held-out accuracy rises all the same, the reward has not taught it."""
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
    """Evaluate LoRA adapters, and the bare base, on held-out problems: one base, all adapters in the same batches. What
    is not given of the task and the base is taken from the runs of the adapters, as far as they agree. env.kwargs go
    over those of the run; with an env.id, nothing of the task is the run's."""

    adapters: list[str] = field(default_factory=list)
    """Adapter folders (PEFT format), checkpoints or run folders. A run folder stands for its final adapter, or else for
    that of its last checkpoint."""
    model: ModelConfig = field(default_factory=model_of_run)
    env: EnvConfig = field(default_factory=env_of_run)
    env_kwargs: dict[str, Any] | None = FROM_RUN
    """Arguments of the environment that differ in evaluation. An environment that takes a split gets {split: eval}
    unless given another."""
    limit: Annotated[int, Ge(1)] | None = 256
    """Held-out problems, the first ones of the environment; null takes all."""
    n: Annotated[int, Ge(1)] = 1
    """Samples of each problem and adapter."""
    temperature: Annotated[float, Ge(0), Lt(inf)] = 0.0
    """Sampling temperature; 0 is greedy."""
    k: list[int] = field(default_factory=list)
    """Values of k for pass@k and maj@k, such as 1,4,16, none above n. By default 1, 2, 4, ... and n."""
    against: str | None = None
    """Row of the table that all others are compared with, beside the base."""
    seed: Annotated[int, Ge(0)] = 0
    """Random seed of the sampling and of the permutation tests."""
    out: str = "evaluation"
    """Folder for results.json, samples.jsonl and report.html. Samples that it holds are not drawn again; those that are
    not asked for are kept in earlier.jsonl."""
    resume: bool = True
    """Use of the samples that the folder `out` holds; false draws all of them again. That is needed after a change of
    code that is not tracked: modules that your own environments and reward functions import."""
    _: KW_ONLY
    max_tokens: Annotated[int, Ge(1)] = FROM_RUN
    system_prompt: str | None = FROM_RUN
    max_turns: Annotated[int, Ge(1)] = FROM_RUN

    def __post_init__(self) -> None:
        expand_home(self, "adapters", "out")
