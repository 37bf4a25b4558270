"""What every test gets: a seed, two threads, and fresh memory filled with NaN."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

os.environ["BIGOPS_TUNED"] = "0"  # what was tuned on this machine is not what is tested


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def nan_memory() -> Iterator[None]:
    """torch.empty gives NaN (integers: their maximum), so that an unwritten element is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
