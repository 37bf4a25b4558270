"""Memory of a kernel's own that the thread's next call finds again.

Freed at the end of each call, megabytes may go back to the operating system, and to fetch them anew
takes longer than to fill them: of a first layer's backward pass 0.3 ms became 7.
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor

MOST = 64 << 20  # bytes kept by each thread
_kept = threading.local()


def empty_like(t: Tensor, memory_format: torch.memory_format) -> Tensor:
    """As torch's, dense and on the CPU; valid until the thread's next one."""
    size = t.numel() * t.element_size()
    if not 0 < size <= MOST:
        return torch.empty_like(t, memory_format=memory_format)
    kept: Tensor | None = getattr(_kept, "bytes", None)
    if kept is None or kept.numel() < size:
        with torch.inference_mode(False):
            kept = _kept.bytes = torch.empty(size, dtype=torch.uint8)
    flat = kept[:size].view(t.dtype)
    if memory_format is torch.channels_last:
        n, c, h, w = t.shape
        return flat.view(n, h, w, c).permute(0, 3, 1, 2)
    return flat.view(t.shape)
