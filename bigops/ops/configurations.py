"""The calls whose launches the compile ledger holds: all that a launcher may choose.

Values do not matter, only what a launcher chooses by and Triton specialises on. What stands for
what: fp16 is as wide as bf16, so it comes once; 3x3 taps stand for all (Triton sees only whether
there is one); convolution's full grid of tiles is channels_last, and its corners contiguous.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .declare import Call, Sample

BOTH = (torch.float32, torch.bfloat16)
HALF = (torch.bfloat16,)
FLOAT = (torch.float32,)
FP8 = (torch.float8_e4m3fn,)


# Each feature of attention by itself, in the words of the function's arguments; tensors by name.
FEATURES: dict[str, dict[str, Any]] = {
    "causal, window": {"causal": True, "window_size": (100, -1)},
    "causal, softcap": {"causal": True, "softcap": 20.0},
    "causal, ALiBi": {"causal": True, "tensors": ("alibi_slopes",)},
    "causal, dropout": {"causal": True, "dropout_p": 0.1},
    "bias": {"tensors": ("bias",)},
    "bias of keys": {"tensors": ("bias of keys",)},
    "mask": {"tensors": ("mask",)},
}
# The most that a tile's registers can be asked for.
EVERYTHING: dict[str, Any] = {
    **FEATURES["causal, window"],
    "softcap": 20.0,
    "dropout_p": 0.1,
    "tensors": ("alibi_slopes", "sinks", "bias"),
}


def attention() -> Iterator[Sample]:
    """Head sizes of each bucket, and what makes a kernel of its own besides."""
    for head in (64, 128, 256):
        yield _attention(f"{head}, causal", head, BOTH, causal=True)
        yield _attention(f"{head}", head, BOTH)
    yield _attention("128, causal, fp16", 128, (torch.float16,), causal=True)
    # 192 is padded to 256; rows of 33 elements are not 16-byte aligned.
    yield _attention("192/128, causal", 192, HALF, value=128, causal=True)
    yield _attention("33/20, causal", 33, HALF, value=20, causal=True)
    # Without the fold of log2(e) into the scale.
    yield _attention("128, causal, negative scale", 128, HALF, causal=True, scale=-0.1)
    yield _attention("128, causal, key's gradient", 128, HALF, needs="k", causal=True)
    yield _attention("128, causal, value's gradient", 128, HALF, needs="v", causal=True)
    for name, kwargs in FEATURES.items():
        yield _attention(f"128, {name}", 128, HALF, **kwargs)
    for head in (64, 256):
        # Of the features by themselves the one that takes most registers.
        yield _attention(f"{head}, causal, dropout", head, HALF, **FEATURES["causal, dropout"])
    for head, dtypes in ((64, BOTH), (128, FLOAT), (256, BOTH)):
        yield _attention(f"{head}, bias' gradient", head, dtypes, needs="b", **FEATURES["bias"])
    pair = FEATURES["causal, window"] | FEATURES["causal, softcap"]
    yield _attention("128, causal, window, softcap", 128, HALF, **pair)
    for head in (64, 128, 256):
        yield _attention(f"{head}, everything", head, BOTH, **EVERYTHING)
    yield _attention("64, causal", 64, FP8, needs="", causal=True)
    descales = ("q_descale", "k_descale", "v_descale")
    yield _attention("128, causal, descales", 128, FP8, needs="", causal=True, tensors=descales)


def varlen_attention() -> Iterator[Sample]:
    """What packing makes a kernel of its own of; the rest is attention's."""
    for head in (64, 128):
        yield _attention(f"{head}, causal", head, HALF, packed=True, causal=True)
    yield _attention("128, everything", 128, HALF, packed=True, **EVERYTHING)


def _attention(
    name: str,
    head: int,
    dtypes: tuple[torch.dtype, ...],
    value: int | None = None,
    needs: str = "qkvbs",
    tensors: tuple[str, ...] = (),
    packed: bool = False,
    **kwargs: Any,
) -> Sample:
    def make(device: str, dtype: torch.dtype) -> Call:
        def empty(*shape: int, dtype: torch.dtype = dtype, role: str = "") -> Tensor:
            drawn = torch.empty(shape, dtype=dtype, device=device)
            return drawn.requires_grad_() if role and role in needs else drawn

        def rows(heads: int, size: int, role: str) -> Tensor:
            shape = (512, heads, size) if packed else (1, heads, 256, size)
            return empty(*shape, role=role)

        args: tuple[Any, ...] = (
            rows(4, head, "q"),
            rows(2, head, "k"),
            rows(2, value or head, "v"),
        )
        if packed:
            starts = [torch.tensor((0, 256, 512), dtype=torch.int32) for _ in range(2)]
            args = (*args, *starts, 256, 256)
        batch = 2 if packed else 1
        made = {
            "bias": lambda: empty(1, 4, 256, 256, role="b"),
            "bias of keys": lambda: empty(1, 1, 1, 256, role="b"),
            "mask": lambda: empty(1, 1, 256, 256, dtype=torch.bool),
            "sinks": lambda: empty(4, dtype=torch.float32, role="s"),
            "alibi_slopes": lambda: empty(batch, 4, dtype=torch.float32),
        }

        def descale() -> Tensor:
            return empty(batch, 2, dtype=torch.float32)

        given = {
            "bias" if word in ("bias of keys", "mask") else word: made.get(word, descale)()
            for word in tensors
        }
        return args, kwargs | given

    return Sample(name, make, dtypes=dtypes)


def conv2d_act() -> Iterator[Sample]:
    """Channels and filters of every bucket, so that each is a tile's depth and its width."""
    for channels in (16, 32, 64, 128):
        for filters in (16, 32, 64, 128):
            # TF32's tiles are half as deep.
            dtypes = BOTH if min(channels, filters) < 64 or channels == filters else HALF
            yield _conv(channels, filters, 3, dtypes, channels_last=True, padding=1)
    for channels in (16, 64):
        for filters in (32, 128):
            yield _conv(channels, filters, 3, BOTH, padding=1)
    yield _conv(64, 16, 3, BOTH, padding=1, input_grad=False)
    # First layers and single taps: few enough weights for the weight gradient's small tiles.
    for channels, size in ((1, 3), (3, 3), (3, 4)):
        for filters in (16, 32, 64):
            yield _conv(channels, filters, size, BOTH, input_grad=False)
    yield _conv(3, 128, 7, HALF, input_grad=False, stride=2, padding=3)
    for channels in (16, 32, 64):
        for filters in (16, 32, 64):
            grad = filters == 64
            yield _conv(channels, filters, 1, BOTH, channels_last=True, input_grad=grad)
    # What descriptors pay for: products of many channels, many pixels of a weight's gradient.
    for filters in (64, 128):
        yield _conv(256, filters, 1, BOTH, channels_last=True)
    for channels in (64, 128):
        for filters in (16, 32, 64):
            dtypes = BOTH if channels == filters == 64 else HALF
            yield _conv(channels, filters, 3, dtypes, channels_last=True, padding=1, batch=14)
    yield _conv(64, 64, 3, HALF, channels_last=True, stride=2, padding=1)
    yield _conv(64, 64, 3, HALF, groups=64, padding=1)
    yield _conv(64, 64, 3, (torch.float16,), channels_last=True, padding=1)
    for activation in ("none", "sigmoid", "tanh", "gelu", "silu"):
        yield _conv(
            128, 128, 3, BOTH, channels_last=True, padding=1, activation=activation, residual=True
        )
    yield _conv(64, 64, 3, BOTH, padding=1, activation="gelu", residual=True)


def conv2d_relu_max_pool2d() -> Iterator[Sample]:
    """Tiles that pool, gradients without ReLU's mask, windows that take kernels of their own."""
    for channels in (16, 32, 64, 128):
        for filters in (16, 32, 64, 128):
            # TF32's tiles are half as deep.
            dtypes = BOTH if min(channels, filters) < 64 or channels == filters else HALF
            yield _conv(channels, filters, 3, dtypes, channels_last=True, padding=1)
    for channels in (16, 64):
        for filters in (32, 128):
            yield _conv(channels, filters, 3, HALF, padding=1)
    for channels in (1, 3):
        yield _conv(channels, 32, 3, BOTH, input_grad=False, padding=1)
    window: dict[str, Any] = {"pool_kernel_size": 3, "pool_stride": 2, "pool_padding": 1}
    yield _conv(64, 64, 3, BOTH, channels_last=True, padding=1, **window)
    yield _conv(64, 64, 3, HALF, padding=1, **window)


def _conv(
    channels: int,
    filters: int,
    size: int,
    dtypes: tuple[torch.dtype, ...],
    *,
    channels_last: bool = False,
    input_grad: bool = True,
    groups: int = 1,
    residual: bool = False,
    batch: int = 2,
    **kwargs: Any,
) -> Sample:
    def make(device: str, dtype: torch.dtype) -> Call:
        def empty(*shape: int) -> Tensor:
            drawn = torch.empty(shape, dtype=dtype, device=device)
            return drawn.contiguous(memory_format=layout) if len(shape) == 4 else drawn

        layout = torch.channels_last if channels_last else torch.contiguous_format
        image = empty(batch, channels, 24, 24).requires_grad_(input_grad)
        weight = empty(filters, channels // groups, size, size).requires_grad_()
        given = {"groups": groups, **kwargs}
        if residual:  # of an image that keeps its size
            given["residual"] = empty(2, filters, 24, 24).requires_grad_()
        return (image, weight, empty(filters).requires_grad_()), given

    words = [f"{channels} -> {filters}, {size}x{size}"]
    words += [f"batch {batch}"] if batch > 2 else []
    words += ["channels_last"] if channels_last else []
    words += [f"stride {kwargs['stride']}"] if "stride" in kwargs else []
    words += [f"groups {groups}"] if groups > 1 else []
    words += [kwargs["activation"]] if "activation" in kwargs else []
    words += ["residual"] if residual else []
    words += ["3x3 windows"] if "pool_stride" in kwargs else []
    return Sample(", ".join(words), make, dtypes=dtypes)


def adam() -> Iterator[Sample]:
    """Dtypes, alignments and rules; kinds of states, copies, rounding; counting on the device."""
    for amsgrad in (False, True):
        for aligned in (True, False):
            words = ["amsgrad" if amsgrad else "adamw", *([] if aligned else ["unaligned"])]
            rule: dict[str, Any] = {"amsgrad": amsgrad, "decoupled_weight_decay": True}
            yield _adam(", ".join(words), aligned=aligned, **rule)
    yield _adam("coupled, beta1 below 0.5", FLOAT, weight_decay=0.1, beta1=0.3)
    yield _adam("clipped", FLOAT, max_grad_norm=1.0)
    yield _adam("clipped, scaled", FLOAT, max_grad_norm=1.0, grad_scale=torch.ones(()))
    on_device: dict[str, Any] = {"lr": torch.ones(()), "found_inf": torch.zeros(())}
    yield _adam("counted on the device", FLOAT, **on_device)
    yield _adam("bfloat16 averages", FLOAT, states=torch.bfloat16)
    yield _adam("codes", BOTH, states=torch.uint8)
    yield _adam("bfloat16 copies", FLOAT, low=torch.bfloat16)
    yield _adam("codes, bfloat16 copies", FLOAT, states=torch.uint8, low=torch.bfloat16)
    seed = torch.zeros((), dtype=torch.int64)
    yield _adam("rounded", HALF, rounding_seed=seed)
    yield _adam("codes, rounded", HALF, states=torch.uint8, rounding_seed=seed)


def _adam(
    name: str,
    dtypes: tuple[torch.dtype, ...] = (),
    aligned: bool = True,
    states: torch.dtype | None = None,
    low: torch.dtype | None = None,
    **kwargs: Any,
) -> Sample:
    def make(device: str, dtype: torch.dtype) -> Call:
        params, grads = (_vectors(5000, aligned, device, dtype) for _ in range(2))
        averages = [_vectors(5000, aligned, device, states or dtype) for _ in range(3)]
        names = ("exp_avg_scales", "exp_avg_sq_scales")
        given = kwargs | _extra(names, states, low, device)
        return (params, grads, *averages, [torch.ones(())]), given

    return Sample(name, make, dtypes=dtypes)


def sgd() -> Iterator[Sample]:
    """Dtypes, alignments and rules; what buffers are of, copies, rounding."""
    momentum: dict[str, Any] = {"momentum": 0.9, "weight_decay": 0.1}
    yield _sgd("momentum", **momentum)
    yield _sgd("momentum, unaligned", aligned=False, **momentum)
    yield _sgd("none", FLOAT)
    yield _sgd("Nesterov, first step", FLOAT, nesterov=True, is_first_step=True, momentum=0.9)
    yield _sgd("clipped", FLOAT, max_grad_norm=1.0, **momentum)
    yield _sgd("clipped, scaled", FLOAT, max_grad_norm=1.0, grad_scale=torch.ones(()), **momentum)
    on_device: dict[str, Any] = {"lr": torch.ones(()), "found_inf": torch.zeros(())}
    yield _sgd("lr on the device", FLOAT, **on_device, **momentum)
    yield _sgd("codes, bfloat16 copies", FLOAT, states=torch.uint8, low=torch.bfloat16, **momentum)
    seed = torch.zeros((), dtype=torch.int64)
    yield _sgd("codes, rounded", HALF, states=torch.uint8, rounding_seed=seed, **momentum)


def _sgd(
    name: str,
    dtypes: tuple[torch.dtype, ...] = (),
    aligned: bool = True,
    states: torch.dtype | None = None,
    low: torch.dtype | None = None,
    **kwargs: Any,
) -> Sample:
    def make(device: str, dtype: torch.dtype) -> Call:
        params, grads = (_vectors(5000, aligned, device, dtype) for _ in range(2))
        buffers = _vectors(5000, aligned, device, states or dtype)
        given = kwargs | _extra(("momentum_buffer_scales",), states, low, device)
        return (params, grads, buffers), given

    return Sample(name, make, dtypes=dtypes)


def _extra(
    names: Sequence[str], states: torch.dtype | None, low: torch.dtype | None, device: str
) -> dict[str, Any]:
    """Scales of states that are codes, and copies of parameters."""
    found: dict[str, Any] = {}
    if states == torch.uint8:
        found |= {name: _vectors(20, True, device, torch.float32) for name in names}
    if low is not None:
        found["low_precision_params"] = _vectors(5000, True, device, low)
    return found


def grad_norm() -> Iterator[Sample]:
    """Dtypes and alignments."""
    for aligned in (True, False):
        yield Sample(
            "aligned" if aligned else "unaligned",
            lambda device, dtype, a=aligned: (  # type: ignore[misc]
                (_vectors(5000, a, device, dtype),),
                {},
            ),
        )


def _vectors(size: int, aligned: bool, device: str, dtype: torch.dtype) -> Sequence[Tensor]:
    """A list of one tensor, whose address is a multiple of 16 or not."""
    first = 0 if aligned else 1
    return [torch.empty(size + 1, dtype=dtype, device=device)[first : first + size]]


def decode_attention() -> Iterator[Sample]:
    """Head sizes of each bucket, few rows and many, and what makes a kernel of its own besides."""
    for head in (64, 128, 256):
        yield _decode(f"{head}", head, BOTH)
    yield _decode("128, 32 rows of a head", 128, HALF, rows=16)
    yield _decode("128, fp16", 128, (torch.float16,))
    yield _decode("192/128", 192, HALF, value=128)
    yield _decode("33/20", 33, HALF, value=20)
    yield _decode("128, pages, append, rotary", 128, BOTH, page_size=16, rotary=128)
    yield _decode("128, interleaved rotary", 128, HALF, rotary=64, rotary_interleaved=True)
    yield _decode("128, append", 128, HALF, append=True)
    # All that a score can meet.
    rest: dict[str, Any] = {"window_size": (100, 0), "softcap": 30.0}
    yield _decode("128, window, softcap, slopes, sinks", 128, BOTH, slopes=True, sinks=True, **rest)
    yield _decode("128, not causal, one split", 128, HALF, causal=False, num_splits=1, sinks=True)


def _decode(
    name: str,
    head: int,
    dtypes: tuple[torch.dtype, ...],
    *,
    value: int | None = None,
    rows: int = 1,
    append: bool = False,
    page_size: int = 0,
    rotary: int = 0,
    slopes: bool = False,
    sinks: bool = False,
    **kwargs: Any,
) -> Sample:
    def make(device: str, dtype: torch.dtype) -> Call:
        def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        extra = dict(kwargs)
        caches = [empty(4, 2, 512, size) for size in (head, value or head)]
        if page_size:
            extra["block_table"] = empty(4, 32, dtype=torch.int32)
            caches = [empty(128, 2, page_size, size) for size in (head, value or head)]
        if append or rotary:
            extra["k_new"], extra["v_new"] = empty(4, 2, 1, head), empty(4, 2, 1, value or head)
        if rotary:
            extra["rotary_cos"], extra["rotary_sin"] = (empty(512, rotary // 2) for _ in range(2))
        if slopes:
            extra["alibi_slopes"] = empty(4, 4, dtype=torch.float32)
        if sinks:
            extra["sinks"] = empty(4, dtype=torch.float32)
        return (empty(4, 4, rows, head), *caches, empty(4, dtype=torch.int32)), extra

    return Sample(name, make, dtypes=dtypes)


def combine_attention() -> Iterator[Sample]:
    """Head sizes of each bucket, with gradients."""
    for head in (64, 128, 256, 33):
        yield _parts(head, BOTH if head == 64 else HALF)


def _parts(head: int, dtypes: tuple[torch.dtype, ...]) -> Sample:
    def make(device: str, dtype: torch.dtype) -> Call:
        outs = torch.empty(4, 2, 4, 256, head, dtype=dtype, device=device, requires_grad=True)
        return (outs, torch.empty(4, 2, 4, 256, device=device, requires_grad=True)), {}

    return Sample(f"{head}", make, dtypes=dtypes)


def max_pool2d() -> Iterator[Sample]:
    """The usual windows, in both layouts."""
    for channels_last in (False, True):
        yield _pooled("2x2", 2, BOTH, channels_last)
        yield _pooled("3x3 stride 2", 3, BOTH, channels_last, stride=2, padding=1)
    yield _pooled("3x3, dilation 2", 3, HALF, True, dilation=2)


def _pooled(
    name: str, kernel: int, dtypes: tuple[torch.dtype, ...], channels_last: bool, **kwargs: Any
) -> Sample:
    layout = torch.channels_last if channels_last else torch.contiguous_format

    def make(device: str, dtype: torch.dtype) -> Call:
        image = torch.empty(2, 64, 24, 24, dtype=dtype, device=device, memory_format=layout)
        return (image.requires_grad_(), kernel), dict(kwargs)

    return Sample(name + (", channels_last" if channels_last else ""), make, dtypes=dtypes)


def batch_norm_act() -> Iterator[Sample]:
    """Both layouts, planes that fill a tile and small ones, and what else makes a kernel."""
    for channels_last in (False, True):
        for side in (56, 4):
            yield _normed(f"64x{side}x{side}", side, BOTH, channels_last, residual=True)
    yield _normed("64x56x56, no residual", 56, HALF, True)
    yield _normed("64x56x56, given statistics", 56, HALF, True, residual=True, training=False)
    yield _normed("64x56x56, no activation", 56, HALF, True, residual=True, activation="none")


def _normed(
    name: str,
    side: int,
    dtypes: tuple[torch.dtype, ...],
    channels_last: bool,
    residual: bool = False,
    training: bool = True,
    **kwargs: Any,
) -> Sample:
    layout = torch.channels_last if channels_last else torch.contiguous_format

    def make(device: str, dtype: torch.dtype) -> Call:
        def image() -> Tensor:
            shape = (8, 64, side, side)
            drawn = torch.empty(shape, dtype=dtype, device=device, memory_format=layout)
            return drawn.requires_grad_()

        rows = [torch.empty(64, device=device) for _ in range(4)]
        affine = {n: row.requires_grad_() for n, row in zip(("weight", "bias"), rows, strict=False)}
        more = {"residual": image()} if residual else {}
        return (image(), *rows[2:]), {"training": training, **affine, **more, **kwargs}

    return Sample(name + (", channels_last" if channels_last else ""), make, dtypes=dtypes)
