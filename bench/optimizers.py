"""Optimizers' steps: an op that updates parameters is timed as users call it, through the class.

The tensors and the options come from the op's own samples, so truth and cost are the op's; the
contestants are optimizer objects that step over their own copies: ours, torch's default, torch's
foreach=True and fused=True, and other packages'. Clipping is ours inside the step and
`torch.nn.utils.clip_grad_norm_` before the others'.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from bigops import optim
from bigops.bench import agreement, timing
from bigops.bench.cases import EAGER, OURS, OpCase

FOREACH, FUSED = "foreach", "fused"


class StepCase(OpCase):
    """One step of an optimizer."""

    def classes(self, options: dict[str, Any]) -> tuple[Any, Any, dict[str, Any]]:
        """Our class, torch's and their arguments, of the op's options, which are used up."""
        raise NotImplementedError

    def peers(self) -> Sequence[str]:
        return (FOREACH, FUSED, *self._peers)

    def runner(self, contestant: str, fresh: bool = False) -> timing.Call:
        _, step = self._stepper(contestant, self.dtype)
        step()  # the first one allocates the states, which is not what a step costs
        return lambda index: step()

    def disagreement(self, peer: str) -> str | None:
        found, eager = self._updates(peer, self.dtype), self._updates(EAGER, self.dtype)
        return agreement.worst(found, eager, self._updates(EAGER, torch.float64))

    def _updates(self, contestant: str, dtype: torch.dtype) -> dict[str, Tensor]:
        """What two steps add to each parameter."""
        params, step = self._stepper(contestant, dtype)
        before = [param.detach().clone() for param in params]
        step()
        step()
        moved = zip(params, before, strict=True)
        return {f"update {i}": (param - old).detach() for i, (param, old) in enumerate(moved)}

    def _stepper(
        self, contestant: str, dtype: torch.dtype
    ) -> tuple[list[Tensor], Callable[[], None]]:
        """Parameters of their own, and what makes a step over them."""
        (params, grads, *_), given = self._one
        params = [param.to(dtype, copy=True).requires_grad_() for param in params]
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad.to(dtype, copy=True)
        given = dict(given)
        max_grad_norm = given.pop("max_grad_norm", None)
        own, torchs, options = self.classes(given)
        if contestant == OURS:
            ours = own(params, max_grad_norm=max_grad_norm, **options)
            return params, lambda: self._step(ours)
        if contestant in self._peers:
            theirs = self._peers[contestant].function(params, torchs, **options)
        else:
            flags = {} if contestant == EAGER else {contestant: True}
            theirs = torchs(params, **flags, **options)
        if max_grad_norm is None:
            return params, lambda: theirs.step()
        # fused=True has no clipping of its own; foreach is torch's faster way to clip.
        foreach = None if contestant == EAGER else True

        def clipped_step() -> None:
            clip_grad_norm_(params, max_grad_norm, foreach=foreach)
            theirs.step()

        return params, clipped_step

    def _step(self, optimizer: torch.optim.Optimizer) -> None:
        with self.as_forced():
            optimizer.step()


class AdamCase(StepCase):
    """One step of AdamW (or Adam, as the sample's options say)."""

    def classes(self, options: dict[str, Any]) -> tuple[Any, Any, dict[str, Any]]:
        decoupled = options.pop("decoupled_weight_decay", False)
        options["betas"] = (options.pop("beta1", 0.9), options.pop("beta2", 0.999))
        if decoupled:
            return optim.AdamW, torch.optim.AdamW, options
        return optim.Adam, torch.optim.Adam, options


class SgdCase(StepCase):
    """One step of SGD."""

    def classes(self, options: dict[str, Any]) -> tuple[Any, Any, dict[str, Any]]:
        return optim.SGD, torch.optim.SGD, options


# Ops that are an optimizer's step, and the case that times them.
STEPS = {"adam": AdamCase, "sgd": SgdCase}
