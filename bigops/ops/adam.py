"""adam: one Adam or AdamW step over lists of tensors; grad_norm: the norm that clips it.

Neither is a torch op: both take lists that change from step to step, adam writes them in place,
and neither has a gradient.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from ..backends import native, triton
from ..reference import adam as reference
from . import adam_cases as cases
from . import adam_cuda, configurations
from . import adam_fuzz as fuzz
from .adam_arguments import Options, check, check_options
from .declare import Backend, Op, declare
from .dispatch import is_fast
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
    refuse_uncounted,
    remember,
    rounding,
    skipped,
    unserved,
    widen,
)
from .step_arguments import DTYPES, check_grads, check_low_precision, require_tensors


def adam(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    max_exp_avg_sqs: list[Tensor],
    state_steps: list[Tensor],
    *,
    amsgrad: bool = False,
    beta1: float = 0.9,
    beta2: float = 0.999,
    lr: float | Tensor = 1e-3,
    weight_decay: float = 0.0,
    eps: float = 1e-8,
    maximize: bool = False,
    decoupled_weight_decay: bool = False,
    max_grad_norm: float | None = None,
    total_norm: Tensor | None = None,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    low_precision_params: list[Tensor] | None = None,
    exp_avg_scales: list[Tensor] | None = None,
    exp_avg_sq_scales: list[Tensor] | None = None,
    rounding_seed: Tensor | None = None,
) -> None:
    """One step of `torch.optim.adam.adam`, for all tensors in one native call or launch.

    `bigops.optim.Adam` and `AdamW` are the usual way to it.

    Args:
        params: updated in place; float32, bfloat16, float16 or float64 (mixed, if you like), any
            shapes and strides, all on one device.
        grads, exp_avgs, exp_avg_sqs: one per parameter, of its shape and dtype. Gradients of
            float32 parameters may be of `low_precision_params`' dtype; averages may be bfloat16
            (not of float64), or uint8 codes, see `exp_avg_scales`, and must not be negative views
            (`torch.Tensor.is_neg`), which is not checked.
        max_exp_avg_sqs: the same if `amsgrad`, else ignored.
        state_steps: one number each, float32 or float64, increased by one. Where all of them are on
            a GPU, they are counted there, `lr` and `found_inf` are read there, nothing waits, and a
            CUDA graph may hold the step: whoever replays it leaves parameters, gradients and states
            where they were. Those on the CPU cost no more, but no graph counts them.
        lr: a number or a tensor of one element.
        weight_decay: an L2 penalty, or AdamW's decay where `decoupled_weight_decay`.
        max_grad_norm: gradients count as scaled by min(1, max_grad_norm / (norm + 1e-6)), as by
            `torch.nn.utils.clip_grad_norm_`, but are not written.
        total_norm: the norm to clip by, if it goes over more than `grads` (see `grad_norm`).
        grad_scale: gradients count as divided by it, `total_norm` as well.
        found_inf: nothing is done, if it holds anything but 0.
        low_precision_params: one per parameter, of its shape and any of the dtypes: gets its new
            value, rounded (the weights that a model computes with, where `params` are their float32
            masters). In the same pass, but for float32 and float64 on the CPU and by CUDA C++.
        exp_avg_scales, exp_avg_sq_scales: float32, one per parameter, of ceil(numel / 256) numbers:
            the averages are codes of 8 bits, each block of 256 with a scale of its own (see
            `bigops.reference.codes`), counted in the order of the parameter's memory.
        rounding_seed: an int64 tensor of one number: bfloat16 parameters are rounded up or down in
            proportion (see `bigops.reference.rounding`), by Philox's bits of this seed.

    Raises:
        TypeError, ValueError: naming the argument that is wrong, before anything is written.
        RuntimeError: a CUDA graph is captured, and steps are counted on the CPU.

    Source: Kingma and Ba 2015, "Adam"; Loshchilov and Hutter 2019, "Decoupled weight decay
    regularization"; Reddi et al. 2018, "On the convergence of Adam and beyond".

    Example:
        >>> param, grad = torch.randn(2, 3).unbind()
        >>> states = [torch.zeros(3)], [torch.zeros(3)]
        >>> bigops.ops.adam.adam([param], [grad], *states, [], [torch.tensor(0.0)], lr=0.1)
    """
    options = Options(
        lr,
        beta1,
        beta2,
        eps,
        weight_decay,
        amsgrad,
        maximize,
        decoupled_weight_decay,
        max_grad_norm,
        total_norm,
        grad_scale,
        found_inf,
        low_precision_params,
        exp_avg_scales,
        exp_avg_sq_scales,
        rounding_seed,
    )
    call = (params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, state_steps, options)
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


def adam_group(found: Any, **numbers: Any) -> bool:
    """`adam` over what `native.kernels.collect` found of an optimizer's group.

    Returns:
        False, and nothing is done, where the native kernels do not serve it.
    """
    if not native_serves(found):
        return False
    options = Options(
        **numbers, low_precision_params=None, exp_avg_scales=None, exp_avg_sq_scales=None
    )
    with Named(check_options, found.params, options):
        if not skipped(options):
            native.kernels.adam(found, *_numbers(options))
    return True


def grad_norm(grads: Sequence[Tensor]) -> Tensor:
    """The 2-norm of all gradients taken as one vector.

    Args:
        grads: floating tensors of any shapes, strides and dtypes, on one device.

    Returns:
        A tensor of no dimensions on their device, float32 (float64 if any of them is). Squares are
        added up in double on the CPU, on a GPU in float32 within a tile and in double across
        tiles; the same bits in every run.

    Example:
        >>> bigops.ops.adam.grad_norm([torch.ones(9), torch.ones(16)])
        tensor(5.)
    """
    grads = list(grads) if isinstance(grads, Iterable) else grads
    require_tensors("grads", grads)
    with torch.no_grad():
        if is_fast(GRAD_NORM, (grads,), COMPILING if torch.compiler.is_compiling() else None):
            return GRAD_NORM.forward(grads)
        if not torch.compiler.is_compiling():
            check_grads(grads)
        return reference.grad_norm(grads)


def grad_norm_of_groups(groups: Sequence[Any]) -> Tensor | None:
    """`grad_norm` of what `native.kernels.collect` found of several groups; None where the native
    kernels do not serve it."""
    if not all(map(native_serves, groups)):
        return None
    wide = any(group.has_double for group in groups)
    out = torch.empty((), dtype=torch.float64 if wide else torch.float32)
    native.kernels.grad_norm(groups, out)
    return out


def _reference(*args: Any) -> None:
    params, grads, *states, steps, options = args
    if skipped(options):
        return
    lr = options.lr.reshape(()) if isinstance(options.lr, Tensor) else options.lr
    scales, signed = (*options.scales.values(), None), (True, False, False)
    if not options.amsgrad:
        states = [*states[:2], []]
    wide, found = widen(params, states, scales, signed, options.rounding_seed)
    exp_avgs, exp_avg_sqs, max_exp_avg_sqs = found
    reference.adam(
        wide,
        grads,
        exp_avgs,
        exp_avg_sqs,
        max_exp_avg_sqs,
        steps,
        lr=lr,
        beta1=options.beta1,
        beta2=options.beta2,
        eps=options.eps,
        weight_decay=options.weight_decay,
        amsgrad=options.amsgrad,
        decoupled_weight_decay=options.decoupled_weight_decay,
        grad_factor=grad_factor(options, grads),
    )
    narrow_params(wide, params, options.rounding_seed)
    narrow(found, states, scales, signed)
    copy_params(params, options)


def _native_why_not(params: Sequence[Tensor], *args: Any, op: str = "adam") -> str | None:
    reason = next(unserved(params), None)
    if reason is None and params and params[0].is_cuda:
        return _narrow(params, args) or adam_cuda.why_not(op, params)
    return native.why_not() or reason


def _narrow(params: Sequence[Tensor], args: Sequence[Any]) -> str | None:
    """What only the CPU's kernel serves."""
    averages = args[1] if args else ()
    return narrow_grads(params, args) or narrower("averages", params, averages) or rounding(args)


def _native_norm_why_not(grads: Sequence[Tensor]) -> str | None:
    return _native_why_not(grads, op="grad_norm")


def _numbers(options: Options) -> tuple[Any, ...]:
    """As the native kernels take them."""
    return (
        options.lr.item() if isinstance(options.lr, Tensor) else options.lr,
        options.beta1,
        options.beta2,
        options.eps,
        options.weight_decay,
        options.decoupled_weight_decay,
        options.amsgrad,
        options.maximize,
        options.max_grad_norm,
        options.total_norm,
        options.grad_scale,
        options.rounding_seed,
    )


def _native(*args: Any) -> None:
    *lists, options = args
    if lists[0][0].is_cuda:
        adam_cuda.adam(*args)
        return
    with Named(check, *args):
        if skipped(options):
            return
        if options.low_precision_params is not None:  # some of which the kernel does not see
            check_low_precision(lists[0], options.low_precision_params)
        copies = own_copies(lists[0], options)
        native.kernels.adam(
            *lists,
            copies,
            options.exp_avg_scales,
            options.exp_avg_sq_scales,
            *_numbers(options),
        )
        if copies is None:
            copy_params(lists[0], options)


def _native_norm(grads: list[Tensor]) -> Tensor:
    if grads and grads[0].is_cuda:
        return adam_cuda.grad_norm(grads)
    wide = any(grad.dtype == torch.float64 for grad in grads)
    out = torch.empty((), dtype=torch.float64 if wide else torch.float32)
    with Named(check_grads, grads):
        native.kernels.grad_norm(grads, out)
    return out


def _triton_why_not(params: Sequence[Tensor], *args: Any) -> str | None:
    reason = next(unserved(params), None)
    device = params[0].device.type if params else "cpu"
    if torch.float64 in {param.dtype for param in params}:
        return "dtype torch.float64"
    return reason or triton.why_not(device)


def _triton(*args: Any) -> None:
    from ..kernels import adam as kernels

    *lists, options = args
    read = lists if options.amsgrad else [*lists[:4], lists[5]]
    found = alike(read, options)
    if known(found):
        check_options(lists[0], options._replace(low_precision_params=None))
    else:
        check(*args)
        remember(found)
    refuse_uncounted(lists[0], lists[5])
    kernels.adam(*lists, options, found)


def _triton_norm(grads: list[Tensor]) -> Tensor:
    from ..kernels import grad_norm as kernels

    found = alike([grads])
    if not known(found):
        check_grads(grads)
        remember(found)
    return kernels.grad_norm(grads, found)


def _reference_bytes(params: Sequence[Tensor], *_: Any) -> int:
    return 4 * max((p.numel() * p.element_size() for p in params), default=0)


READS = {
    "aten._local_scalar_dense": "reads found_inf and a tensor's lr; on a GPU only those, and step "
    "counts, that are on the CPU"
}
COPIES = {
    "aten.clone": "on a GPU tensors that do not lie alike are copied",
    "aten.copy_": "and copied back; low_precision_params that the kernel does not fill",
    "aten._to_copy": "single numbers go to the device",
}
TABLE = COPIES | {
    "aten._to_copy": "the table of addresses goes to the device",
    "aten.copy_": "the same; tensors that do not lie alike are copied to kernels and back",
    "aten._foreach_add_": "counts steps",
    "aten.ones": "the same",
    "aten.add_": "the same, where torch has no such op",
    "aten.zeros": "the norm of nothing",
}

OP = declare(
    Op(
        name="adam",
        function=adam,
        eager=cases.eager,
        backends=(
            Backend("native", ("cpu", "cuda"), _native_why_not, _native, aten=READS | COPIES),
            Backend("triton", ("cuda", "cpu"), _triton_why_not, _triton, aten=READS | TABLE),
        ),
        samples=cases.SAMPLES,
        arbitrary=fuzz.arbitrary,
        illegal=fuzz.illegal,
        sweeps=cases.SWEEPS,
        configurations=configurations.adam,
        dtypes=DTYPES,
        cost=cases.cost,
        reference_bytes=_reference_bytes,
        mutates=(
            "params",
            "exp_avgs",
            "exp_avg_sqs",
            "max_exp_avg_sqs",
            "state_steps",
            "low_precision_params",
            "exp_avg_scales",
            "exp_avg_sq_scales",
        ),
    )
)

GRAD_NORM = declare(
    Op(
        name="grad_norm",
        function=grad_norm,
        eager=cases.eager_norm,
        backends=(
            Backend("native", ("cpu", "cuda"), _native_norm_why_not, _native_norm, aten=COPIES),
            Backend("triton", ("cuda", "cpu"), _triton_why_not, _triton_norm, aten=TABLE),
        ),
        samples=cases.NORM_SAMPLES,
        arbitrary=fuzz.arbitrary_norm,
        illegal=fuzz.illegal_norm,
        sweeps=cases.NORM_SWEEPS,
        configurations=configurations.grad_norm,
        dtypes=DTYPES,
        cost=cases.norm_cost,
    )
)
