"""fp32 products are IEEE unless torch's flag allows TF32: in the machine code of every kernel that
has products. A call's error does not tell on a CPU, where the interpreter knows no TF32.
"""

from __future__ import annotations

import os

import pytest

pytest.importorskip("triton")

from bigops.ledger import compiling, files, rules
from bigops.ledger.entries import Entry

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="nothing is compiled there"
)

KERNELS = (
    "forward_kernel",
    "delta_kernel",
    "grad_query_kernel",
    "grad_key_value_kernel",
    "conv_kernel",
    "weight_grad_kernel",
)
ALLOWED = ("forward_kernel", "tf32")


@pytest.fixture(scope="module")
def compiled() -> dict[tuple[str, str], Entry]:
    """For fp32 ("tf32" where the flags allow it): the entry of a launch of each kernel."""
    planned = compiling.plan(files.own_ops(), ["sm_80"])
    launches = {(x.kernel, x.dtype): x for x in planned if x.kernel in KERNELS}
    wanted = {key: x for key, x in launches.items() if key[1] == "fp32" or key == ALLOWED}
    return dict(zip(wanted, compiling.compile_all(list(wanted.values())), strict=True))


@pytest.mark.parametrize("kernel", KERNELS)
def test_no_tf32_unless_asked_for(compiled: dict[tuple[str, str], Entry], kernel: str) -> None:
    assert not rules.complaints([compiled[kernel, "fp32"]])
    assert compiled[ALLOWED].tf32  # it would have been seen
