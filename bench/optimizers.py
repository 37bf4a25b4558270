"""Optimizers' steps: an op that updates parameters is timed as users call it, through the class.

The tensors and the options come from the op's own samples, so truth and cost are the op's; the
contestants are optimizer objects that step over their own copies: ours, torch's default, and
torch's foreach=True and fused=True. Clipping is ours inside the step and
`torch.nn.utils.clip_grad_norm_` before torch's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.utils import clip_grad_norm_

from bigops import optim
from bigops.bench import timing
from bigops.bench.cases import EAGER, OURS, OpCase

FOREACH, FUSED = "foreach", "fused"


class AdamCase(OpCase):
    """One step of AdamW (or Adam, as the sample's options say)."""

    def peers(self) -> Sequence[str]:
        return (FOREACH, FUSED)

    def runner(self, contestant: str, fresh: bool = False) -> timing.Call:
        (params, grads, *_), options = self._one
        params = [param.clone().requires_grad_() for param in params]
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad.clone()
        options = dict(options)
        decoupled = options.pop("decoupled_weight_decay", False)
        max_grad_norm = options.pop("max_grad_norm", None)
        betas = (options.pop("beta1", 0.9), options.pop("beta2", 0.999))
        # A first step allocates the states, which is not what a step costs.
        if contestant == OURS:
            cls: Any = optim.AdamW if decoupled else optim.Adam
            ours = cls(params, betas=betas, max_grad_norm=max_grad_norm, **options)
            self._step(ours)
            return lambda index: self._step(ours)
        cls = torch.optim.AdamW if decoupled else torch.optim.Adam
        flags = {} if contestant == EAGER else {contestant: True}
        theirs = cls(params, betas=betas, **flags, **options)
        theirs.step()
        if max_grad_norm is None:
            return lambda index: theirs.step()
        # fused=True has no clipping of its own; foreach is torch's faster way to clip.
        foreach = None if contestant == EAGER else True

        def clipped_step(index: int) -> None:
            clip_grad_norm_(params, max_grad_norm, foreach=foreach)
            theirs.step()

        return clipped_step

    def _step(self, optimizer: torch.optim.Optimizer) -> None:
        with self.as_forced():
            optimizer.step()


# Ops that are an optimizer's step, and the case that times them.
STEPS = {"adam": AdamCase}
