"""sgd on CUDA tensors by the CUDA C++ kernels (csrc/cuda/sgd.h)."""

from __future__ import annotations

from torch import Tensor

from ..backends import cuda
from .sgd_arguments import Options, check
from .step import Named
from .step_cuda import rate, scalars, update


def sgd(params: list[Tensor], grads: list[Tensor], buffers: list[Tensor], options: Options) -> None:
    """One step in place."""
    with Named(check, params, grads, buffers, options):
        update(
            cuda.kernels().sgd,
            [params, grads, buffers if options.momentum != 0 else []],
            options,
            rate(options.lr),
            options.momentum,
            options.dampening,
            options.weight_decay,
            options.nesterov,
            options.maximize,
            options.is_first_step,
            *scalars(grads, options, params[0].device),
        )
