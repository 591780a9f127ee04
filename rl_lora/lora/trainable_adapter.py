"""An adapter of a bank as something that is trained: its vector, its norms, and a PEFT folder as its state."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import nn

from rl_lora.lora.adapter import Adapter
from rl_lora.lora.bank import ALL_LINEAR, AdapterBank
from rl_lora.lora.peft_io import load_adapter, save_adapter


class TrainableAdapter:
    """The adapter `tag` of a bank; `initialize` or `load` puts it there. See `learner.trainable.Trainable`.

    Args:
        base_model: the name of the base that is written beside the weights.
        rank, alpha, targets: of a fresh adapter; see `AdapterBank.add`.
    """

    folder = "adapter"

    def __init__(
        self,
        bank: AdapterBank,
        tag: str,
        base_model: str = "",
        *,
        rank: int = 1,
        alpha: float = 32.0,
        targets: str | Sequence[str] = ALL_LINEAR,
    ):
        self.bank, self.tag, self.base_model = bank, tag, base_model
        self.rank, self.alpha, self.targets = rank, alpha, targets

    @property
    def adapter(self) -> Adapter:
        return self.bank[self.tag]

    @property
    def version(self) -> int:
        return self.adapter.version

    @version.setter
    def version(self, version: int) -> None:
        self.adapter.version = version

    @property
    def weights(self) -> list[nn.Parameter]:
        return [self.adapter.flat]

    def initialize(self, seed: int) -> None:
        self.bank.add(self.tag, rank=self.rank, alpha=self.alpha, targets=self.targets, seed=seed)

    def zero_grad(self) -> None:
        self.adapter.zero_grad()

    def norms(self) -> dict[str, float]:
        A_norm, B_norm = self.adapter.norms()
        return {"A_norm": A_norm, "B_norm": B_norm}

    def save(self, folder: Path) -> None:
        save_adapter(self.adapter, folder, self.base_model, overwrite=True)

    def load(self, folder: Path) -> None:
        if self.tag in self.bank.adapters:
            self.bank.remove(self.tag)
        load_adapter(folder, self.bank, self.tag)
