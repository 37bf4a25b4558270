"""The backend that `bigops bench --tune` found fastest for a call, kept in a file of the user's.

The file is `tuned.json` in $BIGOPS_CACHE, else in $XDG_CACHE_HOME/bigops or ~/.cache/bigops; it is
read once, when the first call is decided, and BIGOPS_TUNED=0 leaves it alone. An entry holds for
one op, device, version of bigops and of torch, and for calls that agree in their tensors' dtypes,
shapes, strides and need of gradients, and in all other arguments. It changes no meaning: every
backend computes the same. A forced backend is not overruled, and what torch.compile traces is
decided without the file.
"""

from __future__ import annotations

import json
import os
import platform
import warnings
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..backends import native
from .registration import PLAIN

FIELDS = ("op", "device", "signature", "bigops", "torch", "backend", "over", "speedup", "date")


@dataclass(frozen=True)
class Choice:
    """A backend, and why it was chosen, in words."""

    backend: str
    why: str


# By op, then by device and signature; None: the file has not been read.
_choices: dict[str, dict[tuple[str, str], Choice]] | None = None


def choice(op: str, args: tuple[Any, ...]) -> Choice | None:
    """What the file says of the torch op's arguments `args`."""
    of_op = (_read() if _choices is None else _choices).get(op)
    if of_op is None or (called := signature(args)) is None:
        return None
    return of_op.get((place(args), called))


def signature(args: tuple[Any, ...]) -> str | None:
    """What calls alike have in common; None for lists of tensors and tensors of other types."""
    grad, words = torch.is_grad_enabled(), []
    for arg in args:
        if isinstance(arg, Tensor):
            if type(arg) not in PLAIN or arg.layout != torch.strided:
                return None
            needs = " grad" if grad and arg.requires_grad else ""
            dtype = str(arg.dtype).removeprefix("torch.")
            words.append(f"{dtype} {tuple(arg.shape)} {arg.stride()}{needs}")
        elif isinstance(arg, list | tuple) and not all(isinstance(a, int | float) for a in arg):
            return None
        else:
            words.append(repr(arg))
    return "; ".join(words)


def place(args: tuple[Any, ...]) -> str:
    """The device of a call: a GPU by its name, a CPU with its instruction set and threads."""
    device = next(arg.device for arg in args if isinstance(arg, Tensor))
    if device.type == "cuda":
        return _gpu_name(device.index or 0)
    return f"{cpu_name()}, {native.ISA}, {torch.get_num_threads()} threads"


@lru_cache
def _gpu_name(index: int) -> str:
    return torch.cuda.get_device_name(index)


@lru_cache
def cpu_name() -> str:
    """The processor's own name for itself."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def path() -> Path:
    """Where the file is, if it is there."""
    if given := os.environ.get("BIGOPS_CACHE"):
        return Path(given) / "tuned.json"
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "bigops" / "tuned.json"


def versions() -> dict[str, str]:
    """What an entry must have been measured with."""
    from .. import __version__

    return {"bigops": __version__, "torch": torch.__version__}


def entries() -> list[dict[str, Any]]:
    """All entries of the file, those of other devices and versions too; none without a file.

    Raises:
        ValueError, OSError: it cannot be read.
    """
    try:
        content = json.loads(path().read_text(encoding="utf-8"))
    except FileNotFoundError:
        return []
    found = content["entries"] if isinstance(content, dict) and "entries" in content else None
    if not isinstance(found, list) or not all(_whole(entry) for entry in found):
        raise ValueError("it is not what bench --tune wrote")
    return found


def forget() -> None:
    """Read the file anew at the next call."""
    global _choices
    _choices = None


def _whole(entry: Any) -> bool:
    return isinstance(entry, dict) and all(
        isinstance(entry.get(name), int | float if name == "speedup" else str) for name in FIELDS
    )


def _read() -> dict[str, dict[tuple[str, str], Choice]]:
    global _choices
    found: list[dict[str, Any]] = []
    if os.environ.get("BIGOPS_TUNED", "1") not in ("", "0"):
        try:
            found = entries()
        except (OSError, ValueError) as error:
            warnings.warn(
                f"{path()} is ignored: {error} (`bigops bench --tune --forget` deletes it)",
                stacklevel=2,
            )
    here = versions()
    known: dict[str, dict[tuple[str, str], Choice]] = {}
    for entry in found:
        if all(entry[name] == here[name] for name in here):
            of_op = known.setdefault(entry["op"], {})
            of_op[entry["device"], entry["signature"]] = _choice(entry)
    _choices = known
    return known


def _choice(entry: dict[str, Any]) -> Choice:
    why = (
        f"{entry['backend']} was {entry['speedup']:.2f}x as fast as {entry['over']} for this call "
        f"({entry['date']}, {path()})"
    )
    return Choice(entry["backend"], why)
