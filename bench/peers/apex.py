"""NVIDIA's apex: FusedAdam, whose moments are float32 whatever the parameters' dtype."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from bigops.bench.peers.adapter import Adapter


def _fused_adam() -> Callable[..., Any]:
    from apex.optimizers import FusedAdam

    def make(params: Any, torchs: type, **options: Any) -> Any:
        return FusedAdam(params, adam_w_mode=torchs is torch.optim.AdamW, **options)

    return make


ADAPTERS = (Adapter("apex", ("adam",), _fused_adam, "apex"),)
