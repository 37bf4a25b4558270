"""relu6: the function that users call, and the declaration that bigops reads: its checks, its
benchmark, its compile ledger and the tests take everything from here."""

from __future__ import annotations

import torch
from bigops.ops import Backend, Chooser, Cost, Op, Sample, arguments, declare, is_fast
from torch import Tensor

from .reference import reference


def relu6(x: Tensor) -> Tensor:
    """clamp(x, 0, 6).

    Args:
        x: any shape, any strides; float32, bfloat16 or float16 (the reference serves the others).

    Returns:
        A new tensor like x.

    Raises:
        TypeError, ValueError: x is no tensor, or not a floating one.

    Example:
        >>> relu6(torch.tensor([-1.0, 2.0, 9.0]))
        tensor([0., 2., 6.])
    """
    arguments.tensor("x", x)
    arguments.alike(x=x)
    return OP.call(x) if is_fast(OP, (x,)) else reference(x)


def _sample(
    name: str, *shape: int, gaps: bool = False, gradcheck: bool = False, bench: bool = False
) -> Sample:
    """A call with values on both sides of 0 and of 6."""

    def make(device: str, dtype: torch.dtype) -> tuple[tuple[Tensor], dict[str, object]]:
        x = 4 * torch.randn(shape, device=device, dtype=dtype) + 3
        return ((x.mT[..., ::2] if gaps else x).requires_grad_(),), {}

    return Sample(name, make, gradcheck=gradcheck, bench=bench)


def _arbitrary(choose: Chooser) -> Sample:
    shape = [choose.integer(0, 40) for _ in range(choose.integer(2, 3))]
    return _sample("arbitrary", *shape, gaps=choose.choice([False, True]))


def _cost(passes: str, x: Tensor) -> Cost:
    """Forward moves x and out; backward grad_out, x once more and grad_x."""
    moved = 2 if passes == "forward" else 5
    return Cost(flops=float(x.numel()), bytes=float(moved * x.nbytes))


OP = declare(
    Op(
        name="relu6",
        function=relu6,
        eager=reference,
        schema="(Tensor x) -> Tensor",
        backward_schema="(Tensor grad_out, Tensor x) -> Tensor",
        fake=torch.empty_like,
        backward_fake=lambda grad_out, x: torch.empty_like(x),
        backends=(  # in order of preference
            Backend.native("relu6.native"),  # --cpp
            Backend.triton("relu6.kernels"),
            Backend.native("relu6.native", devices=("cuda",)),  # --cuda
        ),
        samples=(
            _sample("gradcheck", 3, 5, gradcheck=True),
            _sample("gradcheck, gaps", 4, 3, gaps=True, gradcheck=True),
            _sample("one element", 1),
            _sample("no element", 0, 7),
            _sample("odd", 3, 1021),
            _sample("gaps", 33, 70, gaps=True),
            _sample("4096 elements", 64, 64),
            _sample("16 Mi elements", 4096, 4096, bench=True),
        ),
        arbitrary=_arbitrary,
        cost=_cost,
    )
)
