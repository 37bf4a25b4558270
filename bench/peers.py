"""Torch's other ways to make an op's call: contestants for `best` beside eager and torch.compile."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from bigops.ops import Op
from bigops.ops.declare import Call


@dataclass(frozen=True)
class Peer:
    """A contestant with the op's own arguments; `prepare` changes them once, outside the clock."""

    name: str
    function: Callable[..., Any]
    prepare: Callable[[Call], Call] | None = None
    devices: tuple[str, ...] = ("cpu", "cuda")


def channels_last(call: Call) -> Call:
    """Images and convolution weights laid out as (N, H, W, C), as oneDNN and cuDNN like them."""
    return pytree.tree_map_only(Tensor, _channels_last, call)


def _channels_last(t: Tensor) -> Tensor:
    if t.dim() != 4:
        return t
    laid_out = t.detach().clone(memory_format=torch.channels_last)
    return laid_out.requires_grad_(t.requires_grad)


# Op name -> names of the layouts to try with the op's own eager form.
_CHANNELS_LAST = ("conv2d_relu", "conv2d_relu_max_pool2d")


def peers(op: Op, device: str) -> Mapping[str, Peer]:
    """The op's peers on `device`, by name."""
    declared: tuple[Peer, ...] = getattr(op, "peers", ())
    if not declared and op.name in _CHANNELS_LAST:
        declared = (Peer("channels_last", op.eager, channels_last),)
    return {peer.name: peer for peer in declared if device.split(":")[0] in peer.devices}
