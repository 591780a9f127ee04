"""One thread a process: the models of the tests are so small that threads would mostly wait for each other."""

from __future__ import annotations

import torch

torch.set_num_threads(1)
