"""What a fault is, and what catches most of them."""

from __future__ import annotations

from typing import NamedTuple


class Fault(NamedTuple):
    """`old`, which is in `file` just once, becomes `new`: then `test` must fail."""

    op: str
    backend: str
    kind: str
    file: str
    old: str
    new: str
    test: str


def truth(op: str, backend: str, sample: str, dtype: str = "float32") -> str:
    return f"test_ops.py::test_truth[{op}-{backend}-{dtype}-{sample}]"


def ieee(kernel: str) -> str:
    return f"test_ieee.py::test_no_tf32_unless_asked_for[{kernel}]"


ROUNDED = "static_cast<{0}>(to_float(from_float<bf16>(static_cast<float>({1}))))"
