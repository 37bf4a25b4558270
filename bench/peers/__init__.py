"""Contestants beside ours: torch's other ways and other packages, one small adapter each.

A new peer is an `Adapter` in a file here and its name in `ADAPTERS`. An op may also declare peers
of its own (`Op.peers`). Whatever a peer computes is held against eager before it is timed.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from bigops.bench.machine import version
from bigops.bench.peers import apex, flag_gems, flash_attention, torch_own
from bigops.bench.peers.adapter import NOT_INSTALLED, Adapter
from bigops.ops import Op, Peer

ADAPTERS: tuple[Adapter, ...] = (
    *torch_own.ADAPTERS,
    *flash_attention.ADAPTERS,
    *flag_gems.ADAPTERS,
    *apex.ADAPTERS,
)

# Kernel packages that people compare with. Those without an adapter have none of the table's ops.
PACKAGES = (
    "flash-attn", "flash-attn-3", "flash-attn-4", "liger-kernel", "quack-kernels", "flag-gems",
    "apex",
)  # fmt: skip


def adapters(op: Op) -> list[Adapter]:
    """Those that serve the op on some device."""
    return [adapter for adapter in ADAPTERS if op.name in adapter.ops]


def peers(op: Op, device: str, dtype: torch.dtype) -> dict[str, Peer]:
    """The op's peers that can be tried on tensors of this device and dtype, by name."""
    kind = torch.device(device).type
    found = {peer.name: peer for peer in op.peers if kind in peer.devices}
    for adapter in adapters(op):
        if adapter.why_not(device, dtype) is None:
            found[adapter.name] = Peer(adapter.name, adapter.load(), adapter.prepare)
    return found


def left_out(op: Op, device: str, dtype: torch.dtype) -> dict[str, str]:
    """The reasons of the adapters that are made for this kind of device and cannot be tried."""
    kind = torch.device(device).type
    made = [adapter for adapter in adapters(op) if kind in adapter.devices]
    reasons = {adapter.name: adapter.why_not(device, dtype) for adapter in made}
    return {name: reason for name, reason in reasons.items() if reason is not None}


def compiles(op: Op, name: str) -> bool:
    """Whether the first call of the op's peer runs torch.compile."""
    return any(adapter.compiles for adapter in adapters(op) if adapter.name == name)


def packages() -> Mapping[str, str]:
    """Every package of `PACKAGES`: its version and whether it has ops of the table's."""
    adapted = {adapter.package for adapter in ADAPTERS}
    found = {}
    for package in PACKAGES:
        installed = version(package)
        nothing = "" if package in adapted else ", has none of these ops"
        found[package] = f"{installed}{nothing}" if installed else NOT_INSTALLED
    return found
