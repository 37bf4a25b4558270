"""Torch's other ways to make an op's call: contestants for `best` beside eager and torch.compile.

An op declares its own (`Op.peers`). For an op of images and filters that declares none, the layout
that oneDNN and cuDNN prefer is tried all the same.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from bigops.ops import Op, Peer
from bigops.ops.declare import Call


def peers(op: Op, device: str) -> Mapping[str, Peer]:
    """The op's peers on `device`, by name."""
    declared = op.peers
    if not declared and op.name.startswith("conv2d"):
        declared = (Peer("channels_last", op.eager, channels_last),)
    return {peer.name: peer for peer in declared if torch.device(device).type in peer.devices}


def channels_last(call: Call) -> Call:
    """The call with images and filters laid out as (N, H, W, C)."""
    return pytree.tree_map_only(Tensor, _channels_last, call)


def _channels_last(t: Tensor) -> Tensor:
    if t.dim() != 4:
        return t
    laid_out = t.detach().clone(memory_format=torch.channels_last)
    return laid_out.requires_grad_(t.requires_grad)
