"""What an adapter is: another implementation of an op, with the arguments of the op's function."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from bigops.ops.declare import Call

HALF = (torch.bfloat16, torch.float16)
EVERY_SM = range(1, 1000)
NOT_INSTALLED = "not installed"


@dataclass(frozen=True)
class Adapter:
    """A contestant of another make.

    name: the contestant's, as in records. ops: those it serves.
    load(): its function, imported when it is first wanted. It takes the arguments of the op's
    function, except for an optimizer's step: `make(params, decoupled, betas, **options)` gives the
    optimizer.
    package: the distribution that has it. dtypes, devices, sm (compute capabilities, 90 for
    sm_90): what it is made for.
    prepare: changes a call once, outside the clock: another memory layout, say.
    compiles: the first call takes seconds, since torch.compile runs.
    """

    name: str
    ops: tuple[str, ...]
    load: Callable[[], Callable[..., Any]]
    package: str = "torch"
    dtypes: tuple[torch.dtype, ...] = (torch.float32, *HALF)
    devices: tuple[str, ...] = ("cuda",)
    sm: range = EVERY_SM
    prepare: Callable[[Call], Call] | None = None
    compiles: bool = False

    def why_not(self, device: str, dtype: torch.dtype) -> str | None:
        """None where it can be tried, else the reason."""
        kind = torch.device(device).type
        if kind not in self.devices:
            return f"not for {kind} tensors"
        if dtype not in self.dtypes:
            return f"no {str(dtype).removeprefix('torch.')}"
        if kind == "cuda" and capability(device) not in self.sm:
            newer = " or newer" if self.sm.stop == EVERY_SM.stop else ""
            return f"needs sm_{self.sm.start}{newer}"
        try:
            self.load()
        except ModuleNotFoundError:
            return f"{self.package} is {NOT_INSTALLED}"
        except Exception as error:  # an extension built for another torch raises what it likes
            return f"{self.package} cannot be imported: {first_line(error)}"
        return None


def capability(device: str) -> int:
    """The GPU's compute capability: 90 for sm_90."""
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def first_line(error: BaseException) -> str:
    """What an exception says, in one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def relaid(call: Call, layout: Callable[[Tensor], Tensor]) -> Call:
    """The call with new leaves: every tensor of four dimensions as `layout` copies it."""

    def copy(t: Tensor) -> Tensor:
        if t.dim() != 4:
            return t
        return layout(t.detach()).requires_grad_(t.requires_grad)

    return pytree.tree_map_only(Tensor, copy, call)
