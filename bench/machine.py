"""What a result was measured on."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from typing import Any

import torch

import bigops
from bigops.backends import native
from bigops.ops.tuned import cpu_name


def describe(device: str = "cpu") -> dict[str, Any]:
    """The machine and the versions that a record depends on."""
    found: dict[str, Any] = {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2),  # of the last minute: what else ran here
        "isa": native.ISA,
        "isas": list(native.SUPPORTED),
        "memory_bytes": memory_bytes("cpu"),
        "os": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": version("triton"),
        "bigops": bigops.__version__,
        "device": device,
        "gpu": None,
    }
    if torch.cuda.is_available():
        where = device if device.startswith("cuda") else "cuda:0"
        properties = torch.cuda.get_device_properties(where)
        found["gpu"] = {
            "name": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "memory_bytes": memory_bytes(where),
            "cuda": torch.version.cuda,
        }
    return found


def memory_bytes(device: str) -> int:
    """All memory that the device has."""
    if torch.device(device).type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def version(package: str) -> str | None:
    """The installed version of a distribution, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
