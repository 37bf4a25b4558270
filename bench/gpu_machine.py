"""What a GPU run runs on, as far as it can be told before anything is built.

    python bench/gpu_machine.py machine.json

Each question has its own answer or its own reason; only the standard library is needed.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PACKAGES = (
    *("torch", "triton", "numpy", "pip", "setuptools", "pybind11", "ninja"),
    *("pytest", "rich", "scikit-learn", "matplotlib"),
)
SMI_FIELDS = (
    *("name", "driver_version", "memory.total", "clocks.sm", "clocks.mem", "clocks.max.sm"),
    *("clocks.max.mem", "power.draw", "power.limit", "temperature.gpu", "mig.mode.current"),
    *("ecc.mode.current", "compute_mode", "pstate"),
)
CUDA_BIN = "/usr/local/cuda/bin"


def tool(name: str) -> str | None:
    """The path of a program of the CUDA toolkit, which is not always on PATH."""
    return shutil.which(name) or shutil.which(name, path=CUDA_BIN)


def parse_smi(text: str, fields: Sequence[str] = SMI_FIELDS) -> list[dict[str, str | None]]:
    """One dictionary for each GPU out of nvidia-smi's CSV; None for what a GPU does not tell."""
    found = []
    for row in text.strip().splitlines():
        values = [value.strip() for value in row.split(",")]
        if len(values) != len(fields):
            raise ValueError(f"nvidia-smi gave {len(values)} values, not {len(fields)}: {row!r}")
        found.append(
            {
                field: None if re.match(r"\[.*\]|N/A$", value) else value
                for field, value in zip(fields, values, strict=True)
            }
        )
    return found


def parse_nvcc(text: str) -> str | None:
    """13.0.88 out of `nvcc --version`."""
    found = re.search(r"\bV(\d+(?:\.\d+)+)", text) or re.search(r"release (\d+\.\d+)", text)
    return found[1] if found else None


def output(command: Sequence[str], seconds: float = 20.0) -> str:
    """What a program prints; OSError or subprocess.SubprocessError with the reason."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
    if done.returncode:
        lines = (done.stderr + done.stdout).strip().splitlines() or ["no output"]
        raise OSError(f"{command[0]}: {lines[-1]}")
    return done.stdout


def version(package: str) -> str | None:
    """The installed version of a distribution, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def gpus() -> list[dict[str, str | None]] | str:
    """What nvidia-smi tells, or why it does not."""
    query = f"--query-gpu={','.join(SMI_FIELDS)}"
    try:
        return parse_smi(output(["nvidia-smi", query, "--format=csv,noheader"]))
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        return f"nvidia-smi: {error}"


def seen_by_torch() -> dict[str, Any]:
    """The devices as torch has them; `reason` where there is none."""
    try:
        import torch
    except Exception as error:  # a broken installation may raise anything
        return {"devices": [], "reason": f"torch cannot be imported: {error}"}
    found: dict[str, Any] = {"cuda": torch.version.cuda, "devices": []}
    try:
        if torch.version.cuda is None:
            raise RuntimeError("this torch is a CPU build")
        torch.zeros(1, device="cuda").item()
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            found["devices"].append(
                {
                    "name": properties.name,
                    "capability": f"{properties.major}.{properties.minor}",
                    "memory_bytes": properties.total_memory,
                    "multiprocessors": properties.multi_processor_count,
                    "l2_bytes": getattr(properties, "L2_cache_size", None),
                }
            )
    except Exception as error:  # no driver, an old one, a GPU in use
        found["reason"] = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return found


def describe() -> dict[str, Any]:
    """Everything."""
    nvcc = tool("nvcc")
    try:
        nvcc_version = parse_nvcc(output([nvcc, "--version"])) if nvcc else None
    except (OSError, subprocess.SubprocessError) as error:
        nvcc_version = str(error)
    return {
        "host": platform.platform(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "executable": sys.executable,
        "packages": {package: version(package) for package in PACKAGES},
        "nvcc": nvcc_version,
        "compute-sanitizer": tool("compute-sanitizer"),
        "c++": shutil.which(os.environ.get("CXX", "g++").split()[0]),
        "nvidia-smi": gpus(),
        "torch": seen_by_torch(),
    }


def main(path: str) -> int:
    found = describe()
    Path(path).write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
