"""The tiles of attention's kernels, by architecture and head size, and why."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import hardware


class Config(NamedTuple):
    BLOCK_M: int
    BLOCK_N: int
    num_warps: int
    num_stages: int


# By head size: up to 64, 128, 256. Chosen so that nothing spills (ledger/attention_*.txt) and
# two stages of tiles fit the shared memory: 99 KB (sm_86, sm_89, sm_120), 163 (sm_80), 227.
# - 8 warps nearly everywhere: the accumulators (BLOCK_M x head size, twice for dK and dV) take 64
#   or 128 registers of a thread's 255 and the scores of a 128 x 64 tile 32 more.
# - On sm_90 a wgmma needs 64 rows for each 4 warps: 128 rows, and long rows of keys to feed it. Up
#   to head size 64 two programs share an SM: one's softmax hides behind the other's wgmma.
# - On sm_100 scores and accumulators come from tensor memory through registers: shorter key tiles.
# - IEEE products of fp32 run on the CUDA cores, whose threads hold rows of a tile in registers
#   along the whole head: small tiles, the same everywhere.
CONFIGS = {
    ("forward", "sm80"): (Config(128, 64, 4, 3), Config(128, 64, 8, 3), Config(64, 64, 8, 2)),
    ("forward", "sm86"): (Config(128, 64, 4, 3), Config(128, 32, 8, 3), Config(64, 32, 8, 2)),
    ("forward", "sm90"): (Config(128, 64, 8, 3), Config(128, 128, 8, 2), Config(128, 32, 8, 3)),
    ("forward", "sm100"): (Config(128, 64, 8, 3), Config(128, 64, 8, 3), Config(128, 32, 8, 2)),
    ("forward", "fp32"): (Config(64, 32, 8, 2), Config(32, 16, 8, 2), Config(16, 16, 8, 1)),
    ("grad_query", "sm80"): (Config(128, 64, 8, 2), Config(64, 64, 8, 2), Config(64, 32, 8, 2)),
    ("grad_query", "sm86"): (Config(128, 64, 8, 2), Config(64, 64, 8, 2), Config(32, 32, 8, 2)),
    ("grad_query", "sm90"): (Config(128, 64, 8, 2), Config(128, 64, 8, 2), Config(128, 32, 8, 2)),
    ("grad_query", "sm100"): (Config(128, 64, 8, 2), Config(128, 64, 8, 2), Config(128, 32, 8, 2)),
    ("grad_query", "fp32"): (Config(32, 32, 8, 2), Config(32, 16, 8, 2), Config(16, 16, 8, 2)),
    ("grad_key_value", "sm80"): (
        Config(32, 128, 8, 2), Config(32, 64, 8, 2), Config(32, 64, 8, 2)
    ),
    ("grad_key_value", "sm86"): (
        Config(32, 128, 8, 2), Config(32, 64, 8, 2), Config(16, 64, 8, 2)
    ),
    ("grad_key_value", "sm90"): (
        Config(64, 128, 8, 2), Config(32, 128, 8, 2), Config(32, 128, 8, 2)
    ),
    ("grad_key_value", "sm100"): (
        Config(32, 128, 8, 2), Config(32, 64, 8, 2), Config(16, 64, 8, 1)
    ),
    ("grad_key_value", "fp32"): (
        Config(32, 32, 8, 2), Config(16, 32, 8, 1), Config(16, 16, 8, 1)
    ),
    ("grad_bias", "sm80"): (Config(64, 64, 8, 2), Config(64, 32, 8, 2), Config(32, 32, 8, 1)),
    ("grad_bias", "sm86"): (Config(64, 64, 8, 2), Config(64, 32, 8, 1), Config(32, 32, 8, 1)),
    ("grad_bias", "sm90"): (Config(64, 64, 8, 2), Config(64, 64, 8, 2), Config(64, 64, 8, 1)),
    ("grad_bias", "sm100"): (Config(64, 64, 8, 2), Config(64, 32, 8, 2), Config(64, 32, 8, 1)),
    ("grad_bias", "fp32"): (Config(32, 32, 8, 1), Config(16, 32, 8, 1), Config(16, 16, 8, 1)),
}  # fmt: skip

# Where a window, a cap, ALiBi, a bias or dropout (or fp8 that becomes fp16 on its way) takes more
# registers than the tiles above leave.
BUSY = {
    ("forward", "sm80"): (Config(128, 64, 8, 3), Config(128, 32, 8, 3), Config(64, 64, 8, 2)),
    ("forward", "sm86"): (Config(128, 64, 8, 3), Config(128, 32, 8, 3), Config(64, 32, 8, 2)),
    ("forward", "sm90"): (Config(128, 64, 8, 3), Config(128, 64, 8, 2), Config(128, 32, 8, 2)),
    ("grad_query", "sm80"): (Config(64, 64, 8, 2), Config(64, 64, 8, 2), Config(32, 32, 8, 2)),
    ("grad_query", "sm86"): (Config(64, 64, 8, 2), Config(64, 64, 8, 2), Config(32, 32, 8, 2)),
    ("grad_key_value", "sm90"): (
        Config(32, 128, 8, 2), Config(32, 64, 8, 2), Config(16, 64, 8, 2)
    ),
    ("grad_key_value", "sm100"): (
        Config(32, 128, 8, 2), Config(16, 64, 8, 2), Config(16, 64, 8, 1)
    ),
}  # fmt: skip


def config_row(tensor: Tensor) -> str:
    """Which of the rows serves the tensor's dtype and GPU."""
    here = hardware.of(tensor)
    if here.interpreted:
        return "sm90"  # the largest tiles are the fewest steps
    if tensor.dtype == torch.float32:
        return "fp32"
    if here.arch in ("sm_80", "sm_87"):
        return "sm80"
    return {"sm_9": "sm90", "sm_10": "sm100"}.get(here.arch[:-1], "sm86")


def configs(kernel: str, row: str, busy: bool) -> tuple[Config, ...]:
    """By head size. busy: scores take more registers than a product and a causal mask do."""
    plain = CONFIGS[kernel, row]
    return BUSY.get((kernel, row), plain) if busy else plain


def tiles_for(kernel: str, query: Tensor, value: Tensor, busy: bool) -> dict[str, int]:
    """The tiles of a call, as a kernel's arguments."""
    head = max(query.shape[-1], value.shape[-1])
    size = 0 if head <= 64 else 1 if head <= 128 else 2
    return configs(kernel, config_row(query), busy)[size]._asdict()
