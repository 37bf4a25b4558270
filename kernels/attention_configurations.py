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
    maxnreg: int = 0  # registers of a thread; 0: as ptxas sees fit


# By head size: up to 64, 128, 256. Chosen so that nothing spills (ledger/attention_*.txt; the
# exceptions are in bigops/ledger/rules.py) and two stages of tiles fit the shared memory: 99 KB
# (sm_86, sm_89, sm_120), 163 (sm_80), 227.
# - 8 warps nearly everywhere: the accumulators (BLOCK_M x head size, twice for dK and dV) take 64
#   or 128 registers of a thread's 255 and the scores of a 128 x 64 tile 32 more.
# - On sm_90 Triton waits for a wgmma before it goes on: what hides a softmax is another program's
#   product on the same SM: two of 8 warps (maxnreg 128), or two or three of 4. Measured on an H100
#   (bench/results/nvidia-h100), all but BUSY's forward and CROWDED's grad_key_value at 256 and
#   grad_bias.
# - On sm_100 scores and accumulators come from tensor memory through registers: shorter key tiles.
# - TF32's tiles are near fp32's; they are not tuned.
# - IEEE products of fp32 run on the CUDA cores, whose threads hold rows of a tile in registers
#   along the whole head: small tiles, the same everywhere.
CONFIGS = {
    ("forward", "sm80"): (Config(128, 64, 4, 3), Config(128, 64, 8, 3), Config(64, 64, 8, 2)),
    ("forward", "sm86"): (Config(128, 64, 4, 3), Config(128, 32, 8, 3), Config(64, 32, 8, 2)),
    ("forward", "sm90"): (
        Config(64, 128, 4, 2), Config(128, 64, 8, 2, 128), Config(128, 64, 8, 2)
    ),
    ("forward", "sm100"): (Config(128, 64, 8, 3), Config(128, 64, 8, 3), Config(128, 32, 8, 2)),
    ("forward", "fp32"): (Config(64, 32, 8, 2), Config(32, 16, 8, 2), Config(16, 16, 8, 1)),
    ("forward", "tf32"): (Config(64, 32, 8, 2), Config(32, 16, 8, 2), Config(16, 16, 8, 1)),
    ("grad_query", "sm80"): (Config(128, 64, 8, 2), Config(64, 64, 8, 2), Config(64, 32, 8, 2)),
    ("grad_query", "sm86"): (Config(128, 64, 8, 2), Config(64, 64, 8, 2), Config(32, 32, 8, 2)),
    ("grad_query", "sm90"): (Config(128, 64, 8, 3), Config(128, 64, 8, 3), Config(128, 32, 8, 2)),
    ("grad_query", "sm100"): (Config(128, 64, 8, 2), Config(128, 64, 8, 2), Config(128, 32, 8, 2)),
    ("grad_query", "fp32"): (Config(32, 32, 8, 2), Config(32, 16, 8, 2), Config(16, 16, 8, 1)),
    ("grad_query", "tf32"): (Config(32, 32, 8, 2), Config(32, 16, 8, 2), Config(16, 16, 8, 2)),
    ("grad_key_value", "sm80"): (
        Config(32, 128, 8, 2), Config(32, 64, 8, 2), Config(32, 64, 8, 2)
    ),
    ("grad_key_value", "sm86"): (
        Config(32, 128, 8, 2), Config(32, 64, 8, 2), Config(16, 64, 8, 2)
    ),
    ("grad_key_value", "sm90"): (
        Config(64, 64, 4, 3), Config(64, 64, 4, 2), Config(32, 128, 8, 2)
    ),
    ("grad_key_value", "sm100"): (
        Config(32, 128, 8, 2), Config(32, 64, 8, 2), Config(16, 64, 8, 1)
    ),
    ("grad_key_value", "fp32"): (
        Config(32, 16, 8, 2), Config(16, 32, 8, 1), Config(16, 16, 8, 1)
    ),
    ("grad_key_value", "tf32"): (
        Config(32, 32, 8, 2), Config(16, 32, 8, 1), Config(16, 16, 8, 1)
    ),
    ("grad_bias", "sm80"): (Config(64, 32, 8, 2), Config(64, 32, 8, 2), Config(32, 16, 8, 1)),
    ("grad_bias", "sm86"): (Config(64, 32, 8, 2), Config(64, 32, 8, 1), Config(32, 16, 8, 1)),
    ("grad_bias", "sm90"): (Config(64, 64, 8, 2), Config(64, 64, 8, 2), Config(64, 64, 8, 1)),
    ("grad_bias", "sm100"): (Config(64, 64, 8, 2), Config(64, 32, 8, 2), Config(64, 32, 8, 1)),
    ("grad_bias", "fp32"): (Config(32, 32, 8, 1), Config(16, 32, 8, 1), Config(16, 16, 8, 1)),
    ("grad_bias", "tf32"): (Config(16, 32, 8, 1), Config(16, 32, 8, 1), Config(16, 32, 8, 1)),
}  # fmt: skip

# Where one or two things more take registers than the tiles above leave: a window, a cap, ALiBi, a
# bias, dropout (for two), fp8 that becomes fp16 on its way, the addresses of packed rows or of rows
# that start anywhere.
BUSY = {
    ("forward", "sm80"): (Config(128, 32, 8, 3), Config(64, 64, 8, 3), Config(64, 64, 8, 2)),
    ("forward", "sm86"): (Config(128, 32, 8, 3), Config(64, 32, 8, 3), Config(64, 32, 8, 2)),
    ("forward", "sm90"): (Config(64, 64, 4, 3), Config(64, 64, 4, 2), Config(128, 32, 8, 2)),
    ("grad_query", "sm80"): (Config(64, 32, 8, 2), Config(64, 64, 8, 2), Config(32, 32, 8, 2)),
    ("grad_query", "sm86"): (Config(64, 32, 8, 2), Config(64, 64, 8, 2), Config(32, 32, 8, 2)),
    ("grad_query", "sm90"): (Config(64, 64, 4, 2), Config(64, 64, 4, 2), Config(128, 32, 8, 2)),
    ("grad_key_value", "sm80"): (
        Config(16, 128, 8, 2), Config(16, 64, 8, 2), Config(16, 64, 8, 2)
    ),
    ("grad_key_value", "sm86"): (
        Config(16, 128, 8, 2), Config(16, 64, 8, 2), Config(16, 64, 8, 2)
    ),
    ("grad_key_value", "sm90"): (
        Config(32, 64, 4, 2), Config(32, 64, 4, 2), Config(32, 128, 8, 2)
    ),
    ("grad_key_value", "sm100"): (
        Config(32, 128, 8, 2), Config(16, 64, 8, 2), Config(16, 64, 8, 1)
    ),
}  # fmt: skip

# Where more do.
CROWDED = {
    ("forward", "sm80"): (Config(64, 32, 8, 3), Config(64, 32, 8, 3), Config(64, 32, 8, 2)),
    ("forward", "sm86"): (Config(64, 32, 8, 3), Config(64, 32, 8, 3), Config(64, 32, 8, 2)),
    ("forward", "sm90"): (Config(64, 64, 4, 2), Config(64, 32, 4, 3), Config(64, 16, 4, 2)),
    ("forward", "sm100"): (Config(128, 64, 8, 2), Config(128, 32, 8, 2), Config(64, 32, 8, 2)),
    ("grad_query", "fp32"): (Config(32, 16, 8, 2), Config(32, 16, 8, 2), Config(16, 16, 8, 1)),
    ("grad_query", "sm80"): (Config(32, 64, 8, 2), Config(32, 64, 8, 2), Config(32, 32, 8, 2)),
    ("grad_query", "sm86"): (Config(32, 64, 8, 2), Config(32, 64, 8, 2), Config(32, 32, 8, 2)),
    ("grad_query", "sm90"): (Config(64, 32, 4, 2), Config(128, 32, 8, 2), Config(64, 16, 4, 2)),
    ("grad_query", "sm100"): (Config(128, 32, 8, 2), Config(128, 32, 8, 2), Config(128, 16, 8, 2)),
    ("grad_key_value", "fp32"): (
        Config(32, 16, 8, 1), Config(16, 32, 8, 1), Config(16, 16, 8, 1)
    ),
    ("grad_key_value", "sm80"): (Config(32, 32, 8, 2), Config(32, 32, 8, 2), Config(16, 32, 8, 2)),
    ("grad_key_value", "sm86"): (Config(32, 32, 8, 2), Config(32, 32, 8, 2), Config(16, 32, 8, 2)),
    ("grad_key_value", "sm90"): (
        Config(32, 128, 8, 2), Config(16, 64, 4, 2), Config(16, 128, 8, 2)
    ),
    ("grad_key_value", "sm100"): (
        Config(16, 128, 8, 2), Config(32, 64, 8, 1), Config(16, 64, 8, 1)
    ),
    ("grad_bias", "fp32"): (Config(16, 32, 8, 1), Config(16, 32, 8, 1), Config(32, 16, 8, 1)),
    ("grad_bias", "sm80"): (Config(32, 32, 8, 2), Config(32, 16, 8, 2), Config(16, 32, 8, 1)),
    ("grad_bias", "sm86"): (Config(32, 32, 8, 2), Config(32, 16, 8, 2), Config(16, 32, 8, 1)),
    ("grad_bias", "sm90"): (Config(64, 32, 8, 2), Config(64, 32, 8, 2), Config(64, 32, 8, 1)),
    ("grad_bias", "sm100"): (Config(64, 32, 8, 2), Config(64, 32, 8, 2), Config(64, 16, 8, 2)),
}  # fmt: skip

# Where ptxas is told to take all registers: left to itself, it spills a few bytes there so that one
# program more fits on a multiprocessor. Of fp32 by kernel and head size, where it is crowded.
FULL_ROWS = ("sm100", "tf32")
FULL = {
    ("grad_bias", 0),
    ("grad_bias", 1),
    ("grad_bias", 2),
    ("grad_key_value", 0),
    ("grad_key_value", 1),
    ("grad_key_value", 2),
}


def tf32(tensor: Tensor) -> bool:
    """Whether products of the tensor are TF32: torch's flag says so, and the GPU has them."""
    asked = torch.backends.cuda.matmul.fp32_precision == "tf32"
    return tensor.dtype == torch.float32 and asked and hardware.of(tensor).tf32


def config_row(tensor: Tensor) -> str:
    """Which of the rows serves the tensor's dtype and GPU."""
    here = hardware.of(tensor)
    if here.interpreted:
        return "sm90"  # the largest tiles are the fewest steps
    if tensor.dtype == torch.float32:
        return "tf32" if tf32(tensor) else "fp32"
    if here.arch in ("sm_80", "sm_87"):
        return "sm80"
    return {"sm_9": "sm90", "sm_10": "sm100"}.get(here.arch[:-1], "sm86")


def configs(kernel: str, row: str, pressure: int) -> tuple[Config, ...]:
    """By head size. pressure: how many things take registers beside a product and a causal mask."""
    if pressure > 2 and (kernel, row) in CROWDED:
        return CROWDED[kernel, row]
    if pressure and (kernel, row) in BUSY:
        return BUSY[kernel, row]
    return CONFIGS[kernel, row]


def tiles_for(kernel: str, query: Tensor, value: Tensor, pressure: int) -> dict[str, int]:
    """The tiles of a call, as a kernel's arguments."""
    head = max(query.shape[-1], value.shape[-1])
    size = 0 if head <= 64 else 1 if head <= 128 else 2
    row = config_row(query)
    tiles = configs(kernel, row, pressure)[size]._asdict()
    limit = tiles.pop("maxnreg")
    crowded = row == "fp32" and pressure > 2 and (kernel, size) in FULL
    if row in FULL_ROWS or crowded:
        limit = 255
    if limit and hardware.of(query).arch.startswith("sm_"):
        tiles["maxnreg"] = limit
    return tiles
