"""Peak memory of one call: the growth of a fresh process' resident set, as the kernel counts it.

    python -m bigops.bench.memory SUBJECT CASE DTYPE DEVICE CONTESTANT BACKEND SWEEP

The last two may be empty; SWEEP is a dimension and its size, S=512.

The process draws the inputs, resets the peak, makes the call once, and prints by how much the peak
exceeds what was resident before. Allocators that hide from torch's counters (oneDNN's scratch
memory, MKL's buffers) are seen too. Libraries are loaded beforehand by a tiny call of the same op.
"""

from __future__ import annotations

import ctypes
import gc
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bigops.bench.cases import Case, dtype_name

TIMEOUT = 120  # seconds


def peak_bytes(case: Case, contestant: str) -> int | None:
    """Measure in a new process; None where the system does not tell."""
    words = [case.subject, case.name, dtype_name(case.dtype), case.device, contestant]
    words += [case.forced or "", "{name}={value}".format(**case.sweep) if case.sweep else ""]
    command = [sys.executable, "-m", "bigops.bench.memory", *words]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=True)
        return int(done.stdout.split()[-1])
    except (subprocess.SubprocessError, ValueError, IndexError):
        return None


def growth(case: Case, contestant: str, tiny: Case | None) -> int:
    """Bytes by which this process' peak grows during one call of `contestant`."""
    if tiny is not None:
        tiny.runner(contestant)(0)
    call = case.runner(contestant, fresh=True)
    if torch.device(case.device).type == "cuda":
        return _device_growth(case.device, lambda: call(0))
    _give_back()
    # 5 resets the peak to what is resident now.
    Path("/proc/self/clear_refs").write_text("5")
    before = _resident("VmRSS")
    result = call(0)
    after = _resident("VmHWM")
    del result
    return max(0, after - before)


def _give_back() -> None:
    """Return freed memory to the system: a call that is served from it would seem to take none."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc has it
    if trim is not None:
        trim(0)


def _device_growth(device: str, call: Callable[[], Any]) -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    result = call()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated(device)
    del result
    return peak - before


def _resident(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return 1024 * int(line.split()[1])
    raise OSError(f"/proc/self/status has no {key}")


def main(words: list[str]) -> int:
    from bigops import plugins
    from bigops.bench import run

    plugins.load()
    subject, name, dtype, device, contestant, backend, sweep = words
    case, tiny = run.find(subject, name, getattr(torch, dtype), device, backend or None, sweep)
    print(growth(case, contestant, tiny))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
