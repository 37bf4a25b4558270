"""adam: one Adam or AdamW step over lists of tensors; grad_norm: the norm that clips it.

Neither is a torch op: both take lists that change from step to step, adam writes them in place,
and neither has a gradient.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.optim.adam import adam as torch_adam

from ..backends import native, triton
from ..reference import adam as reference
from .arguments import ArgumentError
from .declare import Backend, Call, Cost, Op, Sample, declare
from .dispatch import is_fast

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
PLAIN = {Tensor, torch.nn.Parameter}
COMPILING = "torch.compile fuses the reference itself"


class Options(NamedTuple):
    """What is one value for all tensors of a call."""

    lr: float | Tensor
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    amsgrad: bool
    maximize: bool
    decoupled_weight_decay: bool
    max_grad_norm: float | None
    total_norm: Tensor | None
    grad_scale: Tensor | None
    found_inf: Tensor | None


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
) -> None:
    """One step of `torch.optim.adam.adam`, for all tensors in one native call or launch.

    `bigops.optim.Adam` and `AdamW` are the usual way to it.

    Args:
        params: updated in place; float32, bfloat16, float16 or float64 (mixed, if you like), any
            shapes and strides, all on one device.
        grads, exp_avgs, exp_avg_sqs: one per parameter, of its shape and dtype; the averages
            must not be negative views (`torch.Tensor.is_neg`), which is not checked.
        max_exp_avg_sqs: the same if `amsgrad`, else ignored.
        state_steps: one number each, float32 or float64, increased by one.
        lr: a number or a tensor of one element.
        weight_decay: an L2 penalty, or AdamW's decay where `decoupled_weight_decay`.
        max_grad_norm: gradients count as scaled by min(1, max_grad_norm / (norm + 1e-6)), as by
            `torch.nn.utils.clip_grad_norm_`, but are not written.
        total_norm: the norm to clip by, if it goes over more than `grads` (see `grad_norm`).
        grad_scale: gradients count as divided by it, `total_norm` as well.
        found_inf: nothing is done, if it holds anything but 0.

    Raises:
        TypeError, ValueError: naming the argument that is wrong, before anything is written.

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
    )
    call = (params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, state_steps, options)
    _require_tensors("params", params)
    with torch.no_grad():
        if not is_fast(OP, call, COMPILING if torch.compiler.is_compiling() else None):
            if not torch.compiler.is_compiling():
                check(*call)
            _reference(*call)
        elif params:
            OP.forward(*call)
            # Autograd must notice that a parameter which it saved has changed.
            increment_version(params)


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
    grads = list(grads)
    _require_tensors("grads", grads)
    with torch.no_grad():
        if is_fast(GRAD_NORM, (grads,), COMPILING if torch.compiler.is_compiling() else None):
            return GRAD_NORM.forward(grads)
        return reference.grad_norm(grads)


def check(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    max_exp_avg_sqs: list[Tensor],
    state_steps: list[Tensor],
    options: Options,
) -> None:
    """Raise for the first tensor that does not fit its parameter, naming it."""
    lists = {"grads": grads, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs}
    if options.amsgrad:
        lists["max_exp_avg_sqs"] = max_exp_avg_sqs
    for name, tensors in {**lists, "state_steps": state_steps}.items():
        if len(tensors) != len(params):
            raise ArgumentError(
                f"{name} must have params' length {len(params)}, got {len(tensors)}"
            )
    for i, param in enumerate(params):
        _check_tensor(f"params[{i}]", param)
        if param.device != params[0].device:
            raise ArgumentError(
                f"params[{i}] must be on params[0]'s device {params[0].device}, got {param.device}"
            )
        for name, tensors in lists.items():
            _check_tensor(f"{name}[{i}]", tensors[i])
            for what in ("dtype", "shape", "device"):
                wanted, got = getattr(param, what), getattr(tensors[i], what)
                if got != wanted:
                    raise ArgumentError(
                        f"{name}[{i}] must have params[{i}]'s {what} {wanted}, got {got}"
                    )
        step = state_steps[i]
        if not isinstance(step, Tensor) or step.numel() != 1 or not step.is_floating_point():
            raise ArgumentError(
                f"state_steps[{i}] must be a tensor of one floating number, got {step!r}"
            )


def _require_tensors(name: str, tensors: Sequence[Any]) -> None:
    if not all(issubclass(kind, Tensor) for kind in set(map(type, tensors))):
        for i, value in enumerate(tensors):
            _check_tensor(f"{name}[{i}]", value)


def _check_tensor(name: str, value: Any) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if value.layout != torch.strided:
        raise ArgumentError(f"{name} must be a dense tensor, got layout {value.layout}")
    if value.dtype not in DTYPES:
        raise ArgumentError(
            f"{name} must be one of {', '.join(map(str, DTYPES))}, got {value.dtype}"
        )
    if value.dim() > 8:
        raise ArgumentError(f"{name} must have 8 dimensions or fewer, got {value.dim()}")
    written = not name.startswith("grads")
    if written and any(n > 1 and s == 0 for n, s in zip(value.shape, value.stride(), strict=True)):
        raise ArgumentError(f"{name} must not be an expanded tensor: it is written")
    if value.is_neg():
        raise ArgumentError(f"{name} must not be a negative view; call resolve_neg()")


def _skipped(options: Options) -> bool:
    return options.found_inf is not None and float(options.found_inf) != 0.0


def _grad_factor(options: Options, grads: list[Tensor]) -> Tensor | float:
    """What gradients are multiplied by: the sign, the loss scale and clip_grad_norm_'s factor."""
    sign = -1.0 if options.maximize else 1.0
    factor: Any = 1.0
    if options.grad_scale is not None:
        factor = 1.0 / options.grad_scale.reshape(()).double()
    if options.max_grad_norm is not None:
        total = reference.grad_norm(grads) if options.total_norm is None else options.total_norm
        clip = options.max_grad_norm / (total.double() * factor + 1e-6)
        factor = factor * clip.clamp(max=1.0)
    return sign * factor


def _reference(*args: Any) -> None:
    *lists, options = args
    if _skipped(options):
        return
    lr = options.lr.reshape(()) if isinstance(options.lr, Tensor) else options.lr
    reference.adam(
        *lists,
        lr=lr,
        beta1=options.beta1,
        beta2=options.beta2,
        eps=options.eps,
        weight_decay=options.weight_decay,
        amsgrad=options.amsgrad,
        decoupled_weight_decay=options.decoupled_weight_decay,
        grad_factor=_grad_factor(options, lists[1]),
    )


def _unserved(params: Sequence[Tensor]) -> Iterator[str]:
    for kind in set(map(type, params)) - PLAIN:
        yield f"tensors of type {kind.__name__} are not served yet"


def _native_why_not(params: Sequence[Tensor], *_: Any) -> str | None:
    return native.why_not() or next(_unserved(params), None)


def _native(*args: Any) -> None:
    *lists, options = args
    if _skipped(options):
        return
    try:
        native.kernels.adam(
            *lists,
            float(options.lr),
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
        )
    except Exception:
        # The kernel refuses in a few words what is wrong before it writes; the slow check names it.
        check(*args)
        raise


def _native_norm(grads: list[Tensor]) -> Tensor:
    wide = any(grad.dtype == torch.float64 for grad in grads)
    out = torch.empty((), dtype=torch.float64 if wide else torch.float32)
    native.kernels.grad_norm(grads, out)
    return out


def _triton_why_not(params: Sequence[Tensor], *args: Any) -> str | None:
    reason = next(_unserved(params), None)
    device = params[0].device.type if params else "cpu"
    if any(param.dtype == torch.float64 for param in params):
        return "dtype torch.float64"
    if args and args[4] and args[4][0].device.type == "cuda":
        return "step counts on the device (capturable, fused) are not served yet"
    return reason or triton.why_not(device)


def _triton(*args: Any) -> None:
    from ..kernels import adam as kernels

    *lists, options = args
    check(*args)
    if not _skipped(options):
        kernels.adam(*lists, options)


def _triton_norm(grads: list[Tensor]) -> Tensor:
    from ..kernels import adam as kernels

    return kernels.grad_norm(grads)


def _eager(*args: Any, **kwargs: Any) -> None:
    """torch.optim's own function, after torch.nn.utils' clipping."""
    params, grads, *states = args
    max_grad_norm = kwargs.pop("max_grad_norm", None)
    if max_grad_norm is not None:
        factor = max_grad_norm / (torch.nn.utils.get_total_norm(grads) + 1e-6)
        grads = [grad * factor.clamp(max=1.0) for grad in grads]
    rest = {"amsgrad": False, "beta1": 0.9, "beta2": 0.999, "lr": 1e-3, "eps": 1e-8}
    rest |= {"weight_decay": 0.0, "maximize": False}
    torch_adam(params, grads, *states, **(rest | kwargs))


def _eager_norm(grads: list[Tensor]) -> Tensor:
    return torch.nn.utils.get_total_norm(grads)


def _cost(passes: str, params: Sequence[Tensor], *args: Any, **kwargs: Any) -> Cost:
    reads = 4 + bool(kwargs.get("amsgrad")) + (kwargs.get("max_grad_norm") is not None)
    writes = 3 + bool(kwargs.get("amsgrad"))
    count = sum(p.numel() for p in params)
    size = sum(p.numel() * p.element_size() for p in params)
    return Cost(16.0 * count, float((reads + writes) * size))


def _norm_cost(passes: str, grads: Sequence[Tensor]) -> Cost:
    count = sum(g.numel() for g in grads)
    return Cost(2.0 * count, float(sum(g.numel() * g.element_size() for g in grads)))


def _reference_bytes(params: Sequence[Tensor], *_: Any) -> int:
    return 4 * max((p.numel() * p.element_size() for p in params), default=0)


def _drawn(shapes: Sequence[tuple[int, ...]], device: str, dtype: torch.dtype) -> list[Tensor]:
    return [torch.randn(shape, device=device, dtype=dtype) for shape in shapes]


def _sample(
    name: str,
    shapes: Sequence[tuple[int, ...]],
    *,
    bench: bool = False,
    strided: bool = False,
    **kwargs: Any,
) -> Sample:
    def make(device: str, dtype: torch.dtype) -> Call:
        def draw() -> list[Tensor]:
            if not strided:
                return _drawn(shapes, device, dtype)
            return [t.transpose(0, -1) for t in _drawn([s[::-1] for s in shapes], device, dtype)]

        params, exp_avgs = draw(), draw()
        grads = _drawn(shapes, device, dtype)
        squares = [(t * t).to(dtype) for t in draw()]
        maxima = [1.5 * t for t in squares] if kwargs.get("amsgrad") else []
        steps = [torch.tensor(5.0) for _ in shapes]
        return (params, grads, exp_avgs, squares, maxima, steps), dict(kwargs)

    return Sample(name, make, bench=bench)


ADAMW: dict[str, Any] = {"decoupled_weight_decay": True, "weight_decay": 0.01}
SHAPES = [(3, 5), (0,), (), (4097,), (64, 65)]
LAYER = [(1331, 444), (1331,), (444, 444), (444,), (1776, 444), (1776,), (444, 1776), (444,)]

SAMPLES = (
    _sample("plain", SHAPES),
    _sample("nothing", []),
    _sample("one element", [(1,)]),
    _sample("adamw", SHAPES, **ADAMW),
    _sample("l2", SHAPES, weight_decay=0.1, lr=0.01),
    _sample("amsgrad", SHAPES, amsgrad=True, **ADAMW),
    _sample("maximize", SHAPES, maximize=True, weight_decay=0.1),
    _sample("betas 0", [(65, 64)], beta1=0.0, beta2=0.0, eps=1e-3),
    _sample("betas 0.3, 0.5", [(65, 64)], beta1=0.3, beta2=0.5),
    _sample("clipped", SHAPES, max_grad_norm=1.0, **ADAMW),
    _sample("clipped above the norm", SHAPES, max_grad_norm=1e6),
    _sample("strides differ", [(3, 5), (64, 9, 65)], strided=True, max_grad_norm=1.0, **ADAMW),
    _sample("long and short", [(70001,), (5,), (0,), (32768,), (3, 3), (40000,)], **ADAMW),
    _sample("200 tensors", [(7 * i % 50,) for i in range(200)], **ADAMW),
    _sample("48 tensors, 14.2M", LAYER * 6, bench=True, **ADAMW),
    _sample("48 tensors, 14.2M, clipped", LAYER * 6, bench=True, max_grad_norm=1.0, **ADAMW),
    _sample("1000 tensors of 1000", [(1000,)] * 1000, bench=True, **ADAMW),
)


def _norm_sample(name: str, shapes: Sequence[tuple[int, ...]], bench: bool = False) -> Sample:
    def make(device: str, dtype: torch.dtype) -> Call:
        return (_drawn(shapes, device, dtype),), {}

    return Sample(name, make, bench=bench)


READS = {"aten._local_scalar_dense": "reads found_inf, a tensor's lr and, for triton, step counts"}
TABLE = {
    "aten._to_copy": "the table of addresses goes to the device",
    "aten.copy_": "the same, and tensors that do not lie alike are copied to kernels and back",
    "aten.clone": "tensors that do not lie alike are copied",
    "aten.add_": "counts steps",
    "aten.zeros": "the norm of nothing",
}

OP = declare(
    Op(
        name="adam",
        function=adam,
        eager=_eager,
        backends=(
            Backend("native", ("cpu",), _native_why_not, _native, aten=READS),
            Backend("triton", ("cuda", "cpu"), _triton_why_not, _triton, aten=READS | TABLE),
        ),
        samples=SAMPLES,
        dtypes=DTYPES,
        cost=_cost,
        reference_bytes=_reference_bytes,
        mutates=("params", "exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs", "state_steps"),
    )
)

GRAD_NORM = declare(
    Op(
        name="grad_norm",
        function=grad_norm,
        eager=_eager_norm,
        backends=(
            Backend("native", ("cpu",), _native_why_not, _native_norm),
            Backend("triton", ("cuda", "cpu"), _triton_why_not, _triton_norm, aten=TABLE),
        ),
        samples=(
            _norm_sample("shapes", SHAPES),
            _norm_sample("one element", [(1,)]),
            _norm_sample("100 tensors", [(13 * i % 700,) for i in range(100)]),
            _norm_sample("48 tensors, 14.2M", LAYER * 6, bench=True),
        ),
        dtypes=DTYPES,
        cost=_norm_cost,
    )
)
