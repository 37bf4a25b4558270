"""The compile ledger has every kernel, and every configuration that a launcher can choose."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from test_ledger import ENTRIES, meta

from bigops.kernels import attention_configurations as attention
from bigops.kernels import conv2d_tiles, hardware
from bigops.ledger import launches
from bigops.ledger.architectures import ARCHITECTURES
from bigops.ledger.entries import Entry


def tiles_of(entry: Entry, *names: str) -> conv2d_tiles.Tiles:
    words = meta(entry)
    return conv2d_tiles.Tiles(*(int(words[name]) for name in (*names, "warps", "stages")))


def conv_targets() -> Iterator[tuple[str, str, conv2d_tiles.Target]]:
    """(GPU, dtype, what tiles depend on)."""
    for architecture in ARCHITECTURES.values():
        roomy = architecture.shared > 160 << 10
        for dtype, product in (("bf16", "half"), ("fp32", "ieee"), ("tf32", "tf32")):
            if not (architecture.amd and dtype == "tf32"):
                yield architecture.name, dtype, conv2d_tiles.Target(product, 2, roomy)


SIZES = [*range(1, 300), 512, 1024, 4096]


# What conv_kernel is, by what its constants are: y_ptr is among them only where it is None.
CONVOLUTIONS: dict[str, Callable[[dict[str, str]], bool]] = {
    "forward": lambda constants: (constants["ACTIVATION"], constants["POOL"]) == ("relu", "1"),
    "pooled": lambda constants: constants["POOL"] == "2",
    "gradient through ReLU": lambda constants: "y_ptr" not in constants,
    "gradient": lambda constants: "y_ptr" in constants and constants["ACTIVATION"] == "none",
}


@pytest.mark.parametrize("which", CONVOLUTIONS.values(), ids=CONVOLUTIONS)
def test_convolution_tiles_are_covered(which: Callable[[dict[str, str]], bool]) -> None:
    for target, dtype, here in conv_targets():
        found = {
            conv2d_tiles.conv_tiles(channels, filters, taps, vectors, here)
            for channels in SIZES
            for filters in (1, 16, 17, 32, 33, 64, 65, 128, 129, 1000)
            for taps in (1, 2, 4, 6, 9, 25, 49)
            for vectors in (False, channels % 16 == 0)
        }
        covered = {
            tiles_of(entry, "BLOCK_P", "BLOCK_F", "BLOCK_K")
            for entry in ENTRIES
            if entry.kernel == "conv_kernel"
            and (entry.target, entry.dtype) == (target, dtype)
            and which(meta(entry))
        }
        assert found <= covered, (target, dtype, found - covered)


def test_weight_gradient_tiles_are_covered() -> None:
    for target, dtype, here in conv_targets():
        found = {
            conv2d_tiles.weight_grad_tiles(columns, filters, vectors, here)
            for columns in SIZES
            for filters in (1, 16, 17, 32, 33, 64, 65, 128)
            for vectors in (False, columns % 16 == 0)
        }
        covered = {
            tiles_of(entry, "BLOCK_J", "BLOCK_F", "BLOCK_P")
            for entry in ENTRIES
            if entry.kernel == "weight_grad_kernel"
            and (entry.target, entry.dtype) == (target, dtype)
        }
        assert found <= covered, (target, dtype, found - covered)


def test_attention_configurations_are_covered() -> None:
    for architecture in ARCHITECTURES.values():
        here = hardware.Hardware(architecture.name, 1, architecture.shared)
        for name, dtype, precision in (
            ("bf16", torch.bfloat16, "ieee"),
            ("fp32", torch.float32, "ieee"),
            ("tf32", torch.float32, "tf32"),
        ):
            if (architecture.amd, name) == (True, "tf32"):
                continue
            with hardware.pretend(here), launches._fp32_products(precision):
                row = attention.config_row(torch.empty(1, dtype=dtype))
            for kernel in ("forward", "grad_query", "grad_key_value", "grad_bias"):
                for pressure, causal in ((0, "0"), (0, "1"), (2, "1"), (3, "1")):
                    if kernel == "grad_bias" and (pressure, causal) in ((0, "1"), (2, "1")):
                        continue  # it has no tiles of its own for these
                    found = attention.configs(kernel, row, pressure)
                    wanted = {config._replace(maxnreg=0) for config in found}
                    covered = {
                        attention.Config(*(int(meta(e)[k]) for k in
                                           ("BLOCK_M", "BLOCK_N", "warps", "stages")))
                        for e in ENTRIES
                        if e.kernel == f"{kernel}_kernel"
                        and (e.target, e.dtype) == (architecture.name, name)
                        and meta(e)["RIGHT"] == causal
                    }  # fmt: skip
                    assert wanted <= covered, (architecture.name, name, kernel, pressure, causal)


def test_every_kernel_is_there() -> None:
    """Each `triton.jit` function with a grid of its own, by the convention of its name."""
    folder = Path(attention.__file__).parent
    named = {
        name
        for path in folder.glob("*.py")
        for name in re.findall(r"^def (\w+_kernel)\(", path.read_text(), re.M)
    }
    assert {entry.kernel for entry in ENTRIES} == named
