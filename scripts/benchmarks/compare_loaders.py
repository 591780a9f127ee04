"""A trained adapter in other people's hands: do PEFT, transformers and vLLM give the replies that are given here?

`python scripts/benchmarks/compare_loaders.py --adapter runs/x`, greedy, on held-out problems. PEFT comes with what the
tests need (`pip install peft`); vLLM works in an environment of its own (`make peers`), and is left out where
that is not there.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Ge

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[2])  # in place of this folder; also when nothing is installed

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

import rl_lora.envs  # noqa: F401  registers the environments
from rl_lora.config import EnvConfig, EpisodeConfig, ModelConfig
from rl_lora.evaluation.candidates import adapter_in
from rl_lora.lora.peft_io import load_adapter
from rl_lora.policy.default_model import without_progress_bars
from rl_lora.policy.loading import resolve_model
from rl_lora.policy.policy import Policy
from rl_lora.rollout.held_out import held_out
from rl_lora.sampler.compiled import should_compile
from rl_lora.sampler.factory import make_sampler
from rl_lora.sampler.protocol import Request, Sampler
from rl_lora.scripts.benchmarks.peer_process import Peers
from rl_lora.scripts.command import main as command

Replies = list[list[int]]


@dataclass
class LoadersConfig:
    """Compare the greedy replies of an adapter in rl_lora with those in PEFT, transformers and vLLM, token by token."""

    adapter: str = ""
    """Adapter folder (PEFT format) or run folder."""
    model: ModelConfig = field(default_factory=lambda: ModelConfig(dtype="float32"))
    """The base model. In bfloat16 the libraries round differently, and greedy replies part sooner or later."""
    env: EnvConfig = field(default_factory=EnvConfig)
    """The environment of the held-out problems; each problem is the first message of a conversation."""
    limit: Annotated[int, Ge(1)] = 256
    """Problems to compare on."""
    max_tokens: Annotated[int, Ge(1)] = 32
    """Limit of one reply in tokens."""
    batch_size: Annotated[int, Ge(1)] = 32
    """Replies that are decoded at the same time in PEFT and transformers."""
    vllm_python: str = ".venv-vllm/bin/python"
    """Python interpreter of the environment that holds vLLM."""


def run(config: LoadersConfig) -> dict[str, int]:
    """Print how many replies are equal, each loader beside ours. Returns the counts."""
    if not config.adapter:
        raise ValueError("name an adapter: --adapter runs/NAME, or a PEFT folder")
    console, folder, base = (
        Console(highlight=False, width=110),
        adapter_in(Path(config.adapter)),
        resolve_model(config.model.name),
    )
    compiles = should_compile(config.model.compile, "cpu")
    policy = Policy.from_config(config.model, "cpu")
    sampler = make_sampler(policy, EpisodeConfig(max_rows=64), compile=compiles)
    make_env, seeds = held_out(config.env, None, config.limit)
    env = make_env()
    questions = [str(env.reset(seed=seed)[0]) for seed in seeds]
    prompts = [policy.chat.start(question) for question in questions]
    stop_ids = sorted(policy.chat.stop_ids)
    name = load_adapter(folder, policy.bank, "adapter").name
    ours, bare = (sampled(sampler, prompts, adapter, config.max_tokens) for adapter in (name, None))
    dtype = policy.dtype
    del policy, sampler
    loaders: dict[str, Callable[[], Replies]] = {
        "PEFT, PeftModel.from_pretrained": lambda: peft_replies(base, folder, dtype, prompts, stop_ids, config),
        "transformers, load_adapter and pipeline": lambda: pipeline_replies(base, folder, dtype, questions, config),
    }
    if Path(config.vllm_python).exists():
        loaders["vLLM, LoRARequest"] = lambda: vllm_replies(base, folder, dtype, prompts, stop_ids, config)
    else:
        console.print(f"without vLLM: {config.vllm_python} is not there (`make peers`)")
    table = Table("loader", "replies like ours", "tokens before they part")
    counts = {"problems": len(prompts)}
    for loader, replies_of in {**loaders, "for comparison: the base alone, here": lambda: bare}.items():
        with console.status(f"{loader} ..."), without_progress_bars():
            theirs = [cut(reply, stop_ids) for reply in replies_of()]
        counts[loader] = sum(a == b for a, b in zip(ours, theirs, strict=True))
        alike = sum(common(a, b) for a, b in zip(ours, theirs, strict=True))
        table.add_row(loader, f"{counts[loader]} of {len(ours)}", f"{alike} of {sum(map(len, ours))}")
    console.print(table)
    return counts


def sampled(sampler: Sampler, prompts: Sequence[list[int]], adapter: str | None, max_tokens: int) -> Replies:
    """Our own greedy replies."""
    wanted = [Request(tuple(ids), max_tokens=max_tokens, temperature=0, adapter=adapter) for ids in prompts]
    return [list(completions[0].token_ids) for completions in sampler.generate(wanted)]


def peft_replies(
    base: str, folder: Path, dtype: torch.dtype, prompts: Replies, stop_ids: list[int], config: LoadersConfig
) -> Replies:
    from peft import PeftModel

    model: Any = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=dtype), str(folder)).eval()
    replies: Replies = []
    for start in range(0, len(prompts), config.batch_size):
        rows = prompts[start : start + config.batch_size]
        width = max(map(len, rows))
        ids = torch.tensor([[stop_ids[0]] * (width - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        options = {"do_sample": False, "max_new_tokens": config.max_tokens, "eos_token_id": stop_ids}
        with torch.inference_mode():
            output = model.generate(input_ids=ids, attention_mask=mask, pad_token_id=stop_ids[0], **options)
        replies += output[:, width:].tolist()
    return replies


def pipeline_replies(
    base: str, folder: Path, dtype: torch.dtype, questions: Sequence[str], config: LoadersConfig
) -> Replies:
    """From the questions themselves: the pipeline renders, tokenises and stops as it would for anybody."""
    tokenizer, model = AutoTokenizer.from_pretrained(base), AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    tokenizer.padding_side = "left"
    model.load_adapter(str(folder))
    generate: Any = pipeline("text-generation", model=model, tokenizer=tokenizer)
    chats: list[Any] = [[{"role": "user", "content": question}] for question in questions]
    given = chats if tokenizer.chat_template is not None else list(questions)
    options = {"do_sample": False, "max_new_tokens": config.max_tokens}
    outputs = generate(given, batch_size=config.batch_size, return_tensors=True, **options)
    replies = []
    for chat, (output,) in zip(given, outputs, strict=True):
        ids = output["generated_token_ids"]
        text = (
            tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False) if chat in chats else chat
        )
        prompt = tokenizer(text, add_special_tokens=chat not in chats).input_ids
        at = next(i for i in range(len(ids)) if ids[i : i + len(prompt)] == prompt)  # behind padding
        replies.append(list(ids[at + len(prompt) :]))
    return replies


def vllm_replies(
    base: str, folder: Path, dtype: torch.dtype, prompts: Replies, stop_ids: list[int], config: LoadersConfig
) -> Replies:
    setup: dict[str, Any] = {
        "model": base,
        "dtype": str(dtype).removeprefix("torch."),
        "adapter": str(folder.resolve()),
    }
    setup |= {"max_rows": config.batch_size, "threads": torch.get_num_threads()}
    job = {"job": "generate", "prompts": prompts, "n": 1, "max_tokens": config.max_tokens, "temperature": 0.0}
    job |= {"stop_ids": stop_ids, "adapter": setup["adapter"], "with_tokens": True}
    with Peers({"vllm": config.vllm_python}, setup) as peers:
        replies: Replies = peers["vllm"].ask(job)["completions"]
    return replies


def cut(reply: Sequence[int], stop_ids: Sequence[int]) -> list[int]:
    """A reply up to its stop token, that one included; behind it others pad."""
    end = next((i for i, token in enumerate(reply, 1) if token in stop_ids), len(reply))
    return list(reply[:end])


def common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two replies begin with in common."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def main() -> None:
    command(LoadersConfig, run)


if __name__ == "__main__":
    main()
