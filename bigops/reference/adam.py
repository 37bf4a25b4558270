"""Adam (Kingma and Ba 2015, algorithm 1), AdamW and AMSGrad, one parameter at a time."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def adam(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    max_exp_avg_sqs: Sequence[Tensor],
    state_steps: Sequence[Tensor],
    *,
    lr: float | Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    amsgrad: bool,
    decoupled_weight_decay: bool,
    grad_factor: float | Tensor,
) -> None:
    """Update every list but `grads` in place; gradients count as multiplied by `grad_factor`."""
    for i, (param, grad, step) in enumerate(zip(params, grads, state_steps, strict=True)):
        step += 1
        count = step.double()
        grad = (grad.to(param.dtype) * grad_factor).to(param.dtype)
        if decoupled_weight_decay:
            param.mul_(1 - lr * weight_decay)
        elif weight_decay != 0:
            grad = grad + weight_decay * param
        exp_avgs[i].lerp_(grad, 1 - beta1)
        exp_avg_sqs[i].mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        second = exp_avg_sqs[i]
        if amsgrad:
            second = max_exp_avg_sqs[i].copy_(torch.maximum(max_exp_avg_sqs[i], second))
        denominator = (second / (1 - beta2**count)).sqrt() + eps
        param.sub_(lr / (1 - beta1**count) * (exp_avgs[i] / denominator))


def grad_norm(grads: Sequence[Tensor]) -> Tensor:
    """The 2-norm of all gradients taken as one vector, in float32 (float64 if any of them is)."""
    wide = any(grad.dtype == torch.float64 for grad in grads)
    dtype = torch.float64 if wide else torch.float32
    norms = [torch.linalg.vector_norm(grad, dtype=dtype) for grad in grads]
    return torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.zeros((), dtype=dtype)
