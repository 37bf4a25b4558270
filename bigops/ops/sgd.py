"""sgd: one step of stochastic gradient descent over lists of tensors.

As `adam`, no torch op: it takes lists that change from step to step, writes them in place and has
no gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from ..backends import native, triton
from ..reference import sgd as reference
from . import configurations, sgd_cuda, step_cuda
from . import sgd_cases as cases
from . import sgd_fuzz as fuzz
from .declare import Backend, Op, declare
from .dispatch import is_fast
from .sgd_arguments import Options, check, check_options
from .step import (
    COMPILING,
    Named,
    alike,
    copy_params,
    grad_factor,
    known,
    narrow,
    narrow_grads,
    narrow_params,
    narrower,
    native_serves,
    own_copies,
    remember,
    rounding,
    skipped,
    unserved,
    widen,
)
from .step_arguments import DTYPES, check_low_precision, require_tensors


def sgd(
    params: list[Tensor],
    grads: list[Tensor],
    momentum_buffers: list[Tensor],
    *,
    lr: float | Tensor = 1e-3,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    maximize: bool = False,
    is_first_step: bool = False,
    max_grad_norm: float | None = None,
    total_norm: Tensor | None = None,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    low_precision_params: list[Tensor] | None = None,
    momentum_buffer_scales: list[Tensor] | None = None,
    rounding_seed: Tensor | None = None,
) -> None:
    """One step of `torch.optim.sgd.sgd`, for all tensors in one native call or launch.

    `bigops.optim.SGD` is the usual way to it.

    Args:
        params: updated in place; float32, bfloat16, float16 or float64 (mixed, if you like), any
            shapes and strides, all on one device.
        grads: one per parameter, of its shape and dtype.
        momentum_buffers: the same, unless `momentum` is 0, when they are ignored. They may be
            bfloat16 (not of float64), or uint8 codes, see `momentum_buffer_scales`, and must not be
            negative views (`torch.Tensor.is_neg`), which is not checked.
        lr: a number or a tensor of one element, which a GPU reads itself if it is there.
        momentum: buffers become momentum * buffer + (1 - dampening) * grad, and parameters move
            against them.
        weight_decay: an L2 penalty.
        nesterov: parameters move against grad + momentum * buffer instead.
        is_first_step: buffers are only written: they become the gradients, whatever `dampening`.
        max_grad_norm, total_norm, grad_scale, found_inf, low_precision_params: as of `adam`.
        momentum_buffer_scales: float32, one per parameter, of ceil(numel / 256) numbers: buffers
            are codes of 8 bits, each block of 256 with a scale of its own (see
            `bigops.reference.codes`), counted in the order of the parameter's memory.
        rounding_seed: an int64 tensor of one number: bfloat16 parameters are rounded up or down in
            proportion (see `bigops.reference.rounding`), by Philox's bits of this seed.

    Raises:
        TypeError, ValueError: naming the argument that is wrong, before anything is written.

    Source: Sutskever et al. 2013, "On the importance of initialization and momentum in deep
    learning", with momentum in torch's form.

    Example:
        >>> param, grad = torch.randn(2, 3).unbind()
        >>> bigops.ops.sgd.sgd([param], [grad], [torch.zeros(3)], lr=0.1, momentum=0.9)
    """
    options = Options(
        lr,
        momentum,
        dampening,
        weight_decay,
        nesterov,
        maximize,
        is_first_step,
        max_grad_norm,
        total_norm,
        grad_scale,
        found_inf,
        low_precision_params,
        momentum_buffer_scales,
        rounding_seed,
    )
    call = (params, grads, momentum_buffers, options)
    require_tensors("params", params)
    with torch.no_grad():
        if not is_fast(OP, call, COMPILING if torch.compiler.is_compiling() else None):
            if not torch.compiler.is_compiling():
                check(*call)
            _reference(*call)
        elif params:
            OP.forward(*call)
            # Autograd must notice that a parameter which it saved has changed.
            increment_version(params)
            if low_precision_params:
                increment_version(low_precision_params)


def sgd_group(found: Any, **numbers: Any) -> bool:
    """`sgd` over what `native.kernels.collect` found of an optimizer's group.

    Returns:
        False, and nothing is done, where the native kernels do not serve it.
    """
    if not native_serves(found):
        return False
    options = Options(**numbers, low_precision_params=None, momentum_buffer_scales=None)
    with Named(check_options, found.params, options):
        if not skipped(options):
            native.kernels.sgd(found, *_numbers(options))
    return True


def _reference(
    params: list[Tensor], grads: list[Tensor], buffers: list[Tensor], options: Options
) -> None:
    if skipped(options):
        return
    states, scales = [buffers if options.momentum != 0 else []], [options.momentum_buffer_scales]
    wide, (found,) = widen(params, states, scales, (True,), options.rounding_seed)
    reference.sgd(
        wide,
        grads,
        found,
        lr=options.lr.reshape(()) if isinstance(options.lr, Tensor) else options.lr,
        momentum=options.momentum,
        dampening=options.dampening,
        weight_decay=options.weight_decay,
        nesterov=options.nesterov,
        is_first_step=options.is_first_step,
        grad_factor=grad_factor(options, grads),
    )
    narrow_params(wide, params, options.rounding_seed)
    narrow([found], states, scales, (True,))
    copy_params(params, options)


def _native_why_not(params: Sequence[Tensor], *args: Any) -> str | None:
    reason = next(unserved(params), None)
    if reason is None and params and params[0].is_cuda:
        return _narrow(params, args) or step_cuda.why_not("sgd", params)
    return native.why_not() or reason


def _narrow(params: Sequence[Tensor], args: Sequence[Any]) -> str | None:
    """What only the CPU's kernel serves."""
    buffers = args[1] if args and _has_momentum(args[-1]) else ()
    reason = narrow_grads(params, args) or narrower("momentum buffers", params, buffers)
    return reason or rounding(args)


def _numbers(options: Options) -> tuple[Any, ...]:
    """As the native kernels take them."""
    return (
        options.lr.item() if isinstance(options.lr, Tensor) else options.lr,
        options.momentum,
        options.dampening,
        options.weight_decay,
        options.nesterov,
        options.maximize,
        options.is_first_step,
        options.max_grad_norm,
        options.total_norm,
        options.grad_scale,
        options.rounding_seed,
    )


def _native(
    params: list[Tensor], grads: list[Tensor], buffers: list[Tensor], options: Options
) -> None:
    if params[0].is_cuda:
        sgd_cuda.sgd(params, grads, buffers, options)
        return
    with Named(check, params, grads, buffers, options):
        if skipped(options):
            return
        if options.low_precision_params is not None:  # some of which the kernel does not see
            check_low_precision(params, options.low_precision_params)
        copies = own_copies(params, options)
        native.kernels.sgd(
            params,
            grads,
            buffers,
            copies,
            options.momentum_buffer_scales,
            *_numbers(options),
        )
        if copies is None:
            copy_params(params, options)


def _has_momentum(options: Options) -> bool:
    """Before options are checked: of a tensor, which is refused, it is not known."""
    return isinstance(options.momentum, Tensor) or options.momentum != 0


def _triton_why_not(params: Sequence[Tensor], *args: Any) -> str | None:
    device = params[0].device.type if params else "cpu"
    if torch.float64 in {param.dtype for param in params}:
        return "dtype torch.float64"
    return next(unserved(params), None) or triton.why_not(device)


def _triton(
    params: list[Tensor], grads: list[Tensor], buffers: list[Tensor], options: Options
) -> None:
    from ..kernels import sgd as kernels

    read = [params, grads, buffers] if _has_momentum(options) else [params, grads]
    found = alike(read, options)
    if known(found):
        check_options(params, options._replace(low_precision_params=None))
    else:
        check(params, grads, buffers, options)
        remember(found)
    kernels.sgd(params, grads, buffers, options, found)


def _reference_bytes(params: Sequence[Tensor], *_: Any) -> int:
    return 4 * max((p.numel() * p.element_size() for p in params), default=0)


READS = {
    "aten._local_scalar_dense": "reads found_inf and a tensor's lr; on a GPU only an lr on the CPU",
    "aten.copy_": "low_precision_params that the kernel does not fill; on a GPU tensors that do "
    "not lie alike are copied",
    "aten.clone": "the same",
    "aten._to_copy": "single numbers go to the device",
}
TABLE = {
    "aten._to_copy": "the table of addresses goes to the device",
    "aten.copy_": "the same; tensors that do not lie alike are copied to kernels and back",
    "aten.clone": "on a GPU tensors that do not lie alike are copied",
    "aten.zeros": "the norm of nothing",
}

OP = declare(
    Op(
        name="sgd",
        function=sgd,
        eager=cases.eager,
        backends=(
            Backend("native", ("cpu", "cuda"), _native_why_not, _native, aten=READS),
            Backend("triton", ("cuda", "cpu"), _triton_why_not, _triton, aten=READS | TABLE),
        ),
        samples=cases.SAMPLES,
        arbitrary=fuzz.arbitrary,
        illegal=fuzz.illegal,
        sweeps=cases.SWEEPS,
        configurations=configurations.sgd,
        dtypes=DTYPES,
        cost=cases.cost,
        reference_bytes=_reference_bytes,
        mutates=("params", "momentum_buffers", "low_precision_params", "momentum_buffer_scales"),
    )
)
