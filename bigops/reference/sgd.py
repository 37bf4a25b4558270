"""Stochastic gradient descent with momentum, in torch.optim.SGD's form, one parameter at a time."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def sgd(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
    *,
    lr: float | Tensor,
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: bool,
    is_first_step: bool,
    grad_factor: float | Tensor,
) -> None:
    """Update every list but `grads` in place; gradients count as multiplied by `grad_factor`."""
    for i, (param, grad) in enumerate(zip(params, grads, strict=True)):
        grad = (grad.to(param.dtype) * grad_factor).to(param.dtype)
        if weight_decay != 0:
            grad = grad + weight_decay * param
        if momentum != 0:
            buffer = grad
            if not is_first_step:
                buffer = momentum * momentum_buffers[i].to(grad.dtype) + (1 - dampening) * grad
            momentum_buffers[i].copy_(buffer)
            grad = grad + momentum * buffer if nesterov else buffer
        param.sub_(lr * grad)
