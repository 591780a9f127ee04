"""A decode step recorded once and replayed: a GPU then does not wait for Python, which takes longer than it does.

A recording holds as long as rows and buffers stay where they are (`DecodeCache.arrangement`). The first one is
compared with the step itself; a model whose step cannot be recorded, such as one that asks the device how many tokens
went to an expert, is decoded without. What is drawn from the hidden states is left out: it is cheap, and its shapes
change.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from rl_lora.kernels.verify import FastPath, require_close

Step = Callable[[Tensor], Tensor]
"""Reads one token a row, int64 (R,), and returns hidden states (R, d). All it changes are tensors, in place."""
Record = Callable[[Step, Tensor], Step]
"""Makes a recording of a step; the step's changes must not have happened when it returns."""
TOLERANCE = 1e-3
"""Largest mean difference between a step and its replay, in standard deviations: the same kernels run, in one order."""


def cuda_graph(step: Step, tokens: Tensor) -> Step:
    """A recording that is a CUDA graph. Its result stays in one place: the next replay writes over it."""
    given = tokens.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        hidden = step(given)

    def replay(tokens: Tensor) -> Tensor:
        given.copy_(tokens)
        graph.replay()
        return hidden

    return replay


class StepRecorder:
    """Records the decode steps of a sampler, as long as recordings compute what the steps compute.

    Args:
        record: None where steps are not recorded.
    """

    def __init__(self, record: Record | None):
        self.record = record
        self.fast_path = FastPath("decoding goes on without recorded steps")

    @classmethod
    def for_device(cls, device: torch.device) -> StepRecorder:
        """CUDA graphs, on a GPU that has them."""
        return cls(cuda_graph if device.type == "cuda" and torch.version.cuda else None)

    def __call__(self, step: Step, tokens: Tensor, undo: Callable[[], object]) -> Step | None:
        """A recording, or None where there can be none. `undo` takes a step back."""
        if self.record is None:
            return None
        record = self.record

        def recorded() -> Step:
            recording = record(step, tokens)
            if not self.fast_path.verified:
                expected = step(tokens).clone()
                undo()
                found = recording(tokens)
                undo()
                require_close("hidden states of a recorded step differ", found, expected, TOLERANCE)
                self.fast_path.verified = True
            return recording

        return self.fast_path.attempt(recorded)


class RecordedStep:
    """A decode step, done by replaying its recording where that holds.

    The first step of an arrangement is done as it is, which readies what must not happen in a recording (libraries
    that choose kernels, cached casts).
    """

    def __init__(self, recorder: StepRecorder, undo: Callable[[], object]):
        self.recorder, self.undo = recorder, undo
        self.arrangement = -1
        self.recording: Step | None = None

    def __call__(self, step: Step, tokens: Tensor, arrangement: int) -> Tensor:
        """`step` is not kept: it may belong to what this belongs to."""
        if arrangement != self.arrangement:
            self.arrangement, self.recording = arrangement, None
            return step(tokens)
        if self.recording is None:
            self.recording = self.recorder(step, tokens, self.undo)
        return (self.recording or step)(tokens)
