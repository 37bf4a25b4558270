"""conv2d_relu: a convolution with its bias and ReLU; and what the pooled op shares with it.

Results are laid out as torch lays out a convolution's: channels_last when the input or the weight
is, by its strides, else contiguous; the gradients of input and weight alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backends import native, triton
from ..reference.conv2d_relu import conv2d_relu as reference
from . import arguments, route
from .arguments import ArgumentError
from .declare import Backend, Call, Cost, Op, Sample, declare
from .dispatch import is_fast

Size = int | Sequence[int]
ConvCall = tuple[Tensor, Tensor, Tensor | None, list[int], list[int], list[int], int]


def conv2d_relu(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Size = 1,
    padding: Size | str = 0,
    dilation: Size = 1,
    groups: int = 1,
) -> Tensor:
    """relu(conv2d(input, weight, bias)) in one op that saves only its output.

    Args:
        input: (N, C, H, W) or (C, H, W); float32, bfloat16, float16 or float64; any strides.
        weight: (K, C / groups, KH, KW), input's dtype.
        bias: (K,), input's dtype, or None.
        stride, dilation: in pixels, one int or (height, width).
        padding: zeros on each side, one int or (height, width), or "valid" (none), or "same" (as
            many as keep the size; stride 1 only).
        groups: the channels are cut into this many groups, each with its own K / groups filters.

    Returns:
        (N, K, H', W'), H' = (H + 2 padding - dilation (KH - 1) - 1) // stride + 1; channels_last
        when input or weight is, else contiguous.

    Raises:
        TypeError, ValueError (also RuntimeError, torch's own kind): naming the argument.

    Example:
        >>> image, weight = torch.randn(8, 3, 32, 32), torch.randn(16, 3, 3, 3)
        >>> bigops.conv2d_relu(image, weight, padding=1).shape
        torch.Size([8, 16, 32, 32])
    """
    tensors, options = (input, weight, bias), (stride, padding, dilation, groups)
    if (known := route.find(OP, tensors, options)) is not None:
        return known(*tensors)
    call = conv_arguments(input, weight, bias, stride, padding, dilation, groups)
    if is_fast(OP, call):
        route.leave(OP, tensors, options, call)
        out = OP.call(*call)
    else:
        out = reference(*call)
    return out if input.dim() == 4 else out.squeeze(0)


def pair(name: str, value: Any, least: int) -> list[int]:
    """`value` for height and width; ArgumentError below `least`."""
    sizes = list(value) if isinstance(value, Sequence) else [value]
    if len(sizes) == 1:
        sizes *= 2
    if len(sizes) != 2 or not all(isinstance(s, int) for s in sizes):
        raise ArgumentError(f"{name} must be one or two ints, got {value!r}")
    if sizes[0] < least or sizes[1] < least:
        raise ArgumentError(f"{name} must be at least {least}, got {value!r}")
    return sizes


def out_size(size: int, kernel: int, stride: int, padding: int, dilation: int = 1) -> int:
    """How many places a window of `kernel` pixels has along an axis."""
    return (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1


def conv_sizes(
    input: Tensor, weight: Tensor, stride: list[int], padding: list[int], dilation: list[int]
) -> list[int]:
    """Height and width of the convolution's output."""
    h, w = input.shape[2:]
    kernel_h, kernel_w = weight.shape[2:]
    return [
        out_size(h, kernel_h, stride[0], padding[0], dilation[0]),
        out_size(w, kernel_w, stride[1], padding[1], dilation[1]),
    ]


def conv_arguments(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Size,
    padding: Size | str,
    dilation: Size,
    groups: int,
) -> ConvCall:
    """The torch op's arguments: checked, batched, cast under autocast, padding as numbers."""
    arguments.tensor("input", input)
    arguments.tensor("weight", weight, dims=4)
    if bias is not None:
        arguments.tensor("bias", bias, dims=1)
    if input.dim() == 3:
        input = input.unsqueeze(0)
    elif input.dim() != 4:
        raise ArgumentError(f"input must have 3 or 4 dimensions, got shape {tuple(input.shape)}")
    input, weight, bias = arguments.autocast(input, weight, bias)  # type: ignore[assignment]
    arguments.alike(input=input, weight=weight, bias=bias)
    stride, dilation = pair("stride", stride, 1), pair("dilation", dilation, 1)
    filters, group_channels, *kernel = weight.shape
    if groups < 1 or filters % groups:
        raise ArgumentError(f"groups must divide weight's {filters} filters, got {groups}")
    if input.shape[1] != group_channels * groups:
        raise ArgumentError(
            f"input must have {group_channels * groups} channels (weight's {group_channels} x "
            f"{groups} groups), got {input.shape[1]}"
        )
    if bias is not None and bias.shape[0] != filters:
        raise ArgumentError(f"bias must have weight's {filters} filters, got {bias.shape[0]}")
    if isinstance(padding, str):
        input, padding = _named_padding(input, kernel, stride, padding, dilation)
    padding = pair("padding", padding, 0)
    rows, columns = conv_sizes(input, weight, stride, padding, dilation)
    if rows < 1 or columns < 1:
        raise ArgumentError(
            f"weight's kernel {tuple(kernel)} must fit into the padded input, got an input of "
            f"{tuple(input.shape[2:])} with padding {tuple(padding)}, dilation {tuple(dilation)}"
        )
    return input, weight, bias, stride, padding, dilation, groups


def _named_padding(
    input: Tensor, kernel: list[int], stride: list[int], padding: str, dilation: list[int]
) -> tuple[Tensor, list[int]]:
    if padding == "valid":
        return input, [0, 0]
    if padding != "same":
        raise ArgumentError(f"padding must be ints, 'valid' or 'same', got {padding!r}")
    if stride != [1, 1]:
        raise ArgumentError(f"padding='same' takes stride 1 only, got {tuple(stride)}")
    total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    if any(t % 2 for t in total):  # torch puts the odd one at the end
        input = F.pad(input, (0, total[1] % 2, 0, total[0] % 2))
    return input, [t // 2 for t in total]


def is_channels_last(x: Tensor) -> bool:
    """torch's rule, by strides: is_contiguous would call one channel or one pixel both."""
    step_n, step_c, step_h, step_w = x.stride()
    if step_w < step_c or step_c == 0 or x.numel() == 0:
        return False
    _, channels, height, width = x.shape
    image = step_h * height
    return (
        step_w >= step_c * channels
        and step_h >= step_w * width
        and step_n >= image
        and image != step_c
    )


def memory_format(input: Tensor, weight: Tensor) -> torch.memory_format:
    """The layout of a convolution's output and of its gradients."""
    if is_channels_last(input) or is_channels_last(weight):
        return torch.channels_last
    return torch.contiguous_format


def empty_output(input: Tensor, weight: Tensor, shape: Sequence[int]) -> Tensor:
    """A tensor without values, laid out as the convolution's output."""
    if memory_format(input, weight) is torch.channels_last:
        return torch.empty(
            shape, dtype=input.dtype, device=input.device, memory_format=torch.channels_last
        )
    return input.new_empty(shape)


def empty_gradients(
    input: Tensor, weight: Tensor, needs: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of input, weight and bias without values; None where not needed."""
    layout = memory_format(input, weight)
    return (
        torch.empty_like(input, memory_format=layout) if needs[0] else None,
        torch.empty_like(weight, memory_format=layout) if needs[1] else None,
        weight.new_empty(weight.shape[0]) if needs[2] else None,
    )


# ---- the native backend ----

NO_POOL = ([1, 1], [1, 1], [0, 0])
DIRECT_TAPS = 64  # below: too few products per output for oneDNN to be worth its ways
TINY = 2**18  # below this product of sizes oneDNN's calls take longer than our arithmetic
ATEN = {
    "aten::convolution": "oneDNN's convolution, near the processor's limit where products dominate",
    "aten::convolution_backward": "the same for the products of the gradients",
    "aten::relu_": "after it; oneDNN's own would turn NaN into 0",
    "aten::to": "to float32 and back where oneDNN has no products of the dtype",
}
# Convolved in float32 and rounded.
WIDENED = {d for d in (torch.bfloat16, torch.float16) if not native.torch_multiplies(d)}


def fits_native(input: Tensor, weight: Tensor) -> bool:
    """Whether our own kernels can address one image and all filters."""
    _, channels, height, width = input.shape
    filters, group_channels, kernel_h, kernel_w = weight.shape
    return (
        channels * height * width * kernel_h * kernel_w < 2**31
        and filters * group_channels * kernel_h * kernel_w < 2**29
    )


def few_taps(weight: Tensor) -> bool:
    """Whether a filter is too small for oneDNN to be worth its ways."""
    return weight.numel() <= DIRECT_TAPS * weight.shape[0]


def _ours(input: Tensor, weight: Tensor, groups: int) -> bool:
    """Whether our own kernels do better than oneDNN's and a pass over their output."""
    if input.dtype == torch.float64 or input.numel() * weight.numel() < TINY:
        return True
    return few_taps(weight) and weight.shape[0] > 8 * groups and fits_native(input, weight)


def convolution(input: Tensor, weight: Tensor, bias: Tensor | None, *sizes: Any) -> Tensor:
    """torch's convolution, in float32 where the dtype has no fast one."""
    dtype, (stride, padding, dilation, groups) = input.dtype, sizes
    if dtype in WIDENED:
        input, weight = input.float(), weight.float()
        bias = None if bias is None else bias.float()
    out = torch.convolution(input, weight, bias, stride, padding, dilation, False, [0, 0], groups)
    return _as(dtype, out)


def _as(dtype: torch.dtype, t: Tensor) -> Tensor:
    return t if t.dtype == dtype else t.to(dtype)


def laid_out(t: Tensor, layout: torch.memory_format) -> Tensor:
    """`t` with the strides that a new tensor of `layout` has; a copy only if they differ."""
    _, channels, height, width = t.shape
    if layout == torch.channels_last:
        strides = (height * width * channels, 1, width * channels, channels)
    else:
        strides = (channels * height * width, height * width, width, 1)
    return t if t.stride() == strides else torch.empty_like(t, memory_format=layout).copy_(t)


def _native_forward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    if _ours(input, weight, groups):
        out = _fake(input, weight, bias, stride, padding, dilation, groups)
        native.kernels.conv2d_relu_pool_forward(
            input, weight, bias, out, None, stride, padding, dilation, groups, *NO_POOL
        )
        return out
    # Not oneDNN's convolution with its own ReLU: that one turns NaN into 0.
    got = convolution(input, weight, bias, stride, padding, dilation, groups).relu_()
    return laid_out(got, memory_format(input, weight))


def _native_backward(
    grad_out: Tensor,
    input: Tensor,
    weight: Tensor,
    out: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    needs: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    sizes = (stride, padding, dilation, groups)
    if _ours(input, weight, groups):
        grads = empty_gradients(input, weight, needs)
        native.kernels.conv2d_relu_pool_backward(
            grad_out, input, weight, out, *grads, *sizes, *NO_POOL
        )
        return grads
    grad_conv = torch.empty_like(out)
    grad_bias = weight.new_empty(weight.shape[0]) if needs[2] else None
    native.kernels.relu_pool_backward(grad_out, out, grad_conv, grad_bias, *NO_POOL)
    return (*convolution_gradients(grad_conv, input, weight, needs, *sizes), grad_bias)


def convolution_gradients(
    grad_conv: Tensor,
    input: Tensor,
    weight: Tensor,
    needs: Sequence[bool],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> tuple[Tensor | None, Tensor | None]:
    """torch's gradients of input and weight, laid out as the output is."""
    layout, dtype = memory_format(input, weight), input.dtype
    if not (needs[0] or needs[1]):
        return None, None
    if dtype in WIDENED:
        grad_conv, input, weight = grad_conv.float(), input.float(), weight.float()
    found = torch.ops.aten.convolution_backward.default(
        grad_conv,
        input,
        weight,
        None,
        stride,
        padding,
        dilation,
        False,
        [0, 0],
        groups,
        [needs[0], needs[1], False],
    )
    grad_input, grad_weight, _ = found
    return (
        laid_out(_as(dtype, grad_input), layout) if needs[0] else None,
        laid_out(_as(dtype, grad_weight), layout) if needs[1] else None,
    )


def native_why_not(input: Tensor, weight: Tensor, *rest: Any) -> str | None:
    """None when the native kernels serve the call, else the reason."""
    if input.dtype not in NATIVE_DTYPES:
        return f"dtype {input.dtype}"
    return native.why_not()


def _triton_why_not(*args: Any) -> str | None:
    if reason := triton.why_not(args[0].device.type):
        return reason
    from ..kernels import conv2d_relu as kernels

    return kernels.why_not(*args)


def _triton_forward(*args: Any) -> Tensor:
    from ..kernels import conv2d_relu as kernels

    return kernels.forward(*args)


def _triton_backward(*args: Any) -> tuple[Tensor | None, ...]:
    from ..kernels import conv2d_relu as kernels

    return kernels.backward(*args)


# ---- the declaration ----

NATIVE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _fake(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    sizes = conv_sizes(input, weight, stride, padding, dilation)
    return empty_output(input, weight, (input.shape[0], weight.shape[0], *sizes))


def _backward_fake(
    grad_out: Tensor, input: Tensor, weight: Tensor, *rest: Any
) -> tuple[Tensor | None, ...]:
    return empty_gradients(input, weight, rest[-1])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, weight, _, *ctx.sizes = inputs
    ctx.save_for_backward(input, weight, output)


def _backward_args(ctx: Any, grad_out: Tensor) -> Any:
    return (grad_out, *ctx.saved_tensors, *ctx.sizes, ctx.needs_input_grad[:3])


def _forward_args(grad_out: Tensor, input: Tensor, weight: Tensor, out: Tensor, *rest: Any) -> Any:
    return (input, weight, None, *rest[:-1])


def _eager(input: Tensor, weight: Tensor, bias: Tensor | None = None, *args: Any, **kw: Any) -> Any:
    return F.relu(F.conv2d(input, weight, bias, *args, **kw))


def conv_cost(
    passes: str,
    input: Tensor,
    weight: Tensor,
    out: int,
    sizes: Sequence[int],
) -> Cost:
    """Products and bytes of a convolution of `sizes` whose result keeps `out` elements."""
    pixels = input.shape[0] * sizes[0] * sizes[1]
    forward = 2.0 * pixels * weight.numel()
    moved = float(input.element_size() * (input.numel() + weight.numel() + out))
    if passes == "forward":
        return Cost(forward, moved)
    backward = 2.0 if input.requires_grad else 1.0
    return Cost((1.0 + backward) * forward, 3.0 * moved)


def _cost(
    passes: str,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Size = 1,
    padding: Size | str = 0,
    dilation: Size = 1,
    groups: int = 1,
) -> Cost:
    call = conv_arguments(input, weight, bias, stride, padding, dilation, groups)
    sizes = conv_sizes(call[0], weight, *call[3:6])
    out = input.shape[0] * weight.shape[0] * sizes[0] * sizes[1]
    return conv_cost(passes, input, weight, out, sizes)


def _reference_bytes(*args: Any) -> int:
    meta: tuple[Any, ...] = tuple(a.to("meta") if isinstance(a, Tensor) else a for a in args)
    out = _fake(*meta)
    return out.numel() * out.element_size()


def conv_sample(
    name: str,
    image: tuple[int, int, int, int],
    weight: tuple[int, int, int, int],
    *,
    bias: bool = True,
    channels_last: bool = False,
    input_grad: bool = True,
    bench: bool = False,
    gradcheck: bool = False,
    dtypes: tuple[torch.dtype, ...] = (),
    **kwargs: Any,
) -> Sample:
    """A sample call whose outputs have the spread of its inputs."""

    def make(device: str, dtype: torch.dtype) -> Call:
        def draw(*shape: int, scale: float = 1.0) -> Tensor:
            drawn = torch.randn(shape, device=device, dtype=dtype) * scale
            if channels_last and len(shape) == 4:
                drawn = torch.empty_like(drawn, memory_format=torch.channels_last).copy_(drawn)
            return drawn

        taps = weight[1] * weight[2] * weight[3]
        args = [
            draw(*image).requires_grad_(input_grad),
            draw(*weight, scale=taps**-0.5).requires_grad_(),
        ]
        if bias:
            args.append(draw(weight[0]).requires_grad_())
        return tuple(args), dict(kwargs)

    return Sample(name, make, bench=bench, gradcheck=gradcheck, dtypes=dtypes)


SAMPLES = (
    conv_sample("gradcheck", (2, 2, 5, 4), (3, 2, 3, 2), padding=1, gradcheck=True),
    conv_sample(
        "gradcheck, stride 2", (1, 4, 5, 6), (4, 2, 2, 3), stride=2, groups=2, gradcheck=True
    ),
    conv_sample("one element", (1, 1, 1, 1), (1, 1, 1, 1)),
    conv_sample("no bias", (2, 3, 8, 9), (5, 3, 3, 3), bias=False),
    conv_sample("padded", (2, 4, 9, 7), (17, 4, 3, 3), padding=1),
    conv_sample("one channel", (3, 1, 12, 11), (32, 1, 3, 3), padding=1),
    conv_sample("5x5 stride 2", (2, 3, 15, 16), (33, 3, 5, 5), stride=2, padding=2),
    conv_sample("stem 7x7 stride 2", (1, 3, 20, 22), (16, 3, 7, 7), stride=2, padding=3),
    conv_sample("11x11 stride 4", (1, 3, 27, 27), (8, 3, 11, 11), stride=4, padding=2),
    conv_sample("1x1", (2, 20, 6, 5), (40, 20, 1, 1)),
    conv_sample("1x1 stride 2", (2, 20, 7, 5), (24, 20, 1, 1), stride=2),
    conv_sample("dilation", (1, 6, 14, 13), (10, 6, 3, 3), padding=2, dilation=2),
    conv_sample(
        "uneven", (1, 2, 13, 10), (6, 2, 3, 2), stride=(2, 1), padding=(0, 1), dilation=(1, 2)
    ),
    conv_sample("groups", (2, 6, 9, 8), (9, 2, 3, 3), padding=1, groups=3),
    conv_sample("depthwise", (1, 12, 8, 8), (12, 1, 3, 3), padding=1, groups=12),
    conv_sample("same", (1, 3, 8, 9), (4, 3, 4, 3), padding="same"),
    conv_sample("channels_last", (2, 16, 10, 9), (32, 16, 3, 3), padding=1, channels_last=True),
    conv_sample("channels_last, one channel", (2, 1, 8, 8), (16, 1, 3, 3), channels_last=True),
    conv_sample("no batch", (0, 3, 8, 8), (4, 3, 3, 3)),
    conv_sample("4096 elements", (2, 32, 16, 16), (64, 32, 3, 3), padding=1),
    conv_sample("16x64x56x56 -> 64", (16, 64, 56, 56), (64, 64, 3, 3), padding=1, bench=True),
    conv_sample(
        "64x1x28x28 -> 32", (64, 1, 28, 28), (32, 1, 3, 3), padding=1, input_grad=False, bench=True
    ),
)

OP = declare(
    Op(
        name="conv2d_relu",
        schema="(Tensor input, Tensor weight, Tensor? bias, int[] stride, int[] padding, "
        "int[] dilation, int groups) -> Tensor",
        backward_schema="(Tensor grad_out, Tensor input, Tensor weight, Tensor out, int[] stride, "
        "int[] padding, int[] dilation, int groups, bool[] needs) -> (Tensor, Tensor, Tensor)",
        function=conv2d_relu,
        eager=_eager,
        backends=(
            Backend("native", ("cpu",), native_why_not, _native_forward, _native_backward, ATEN),
            Backend("triton", ("cuda", "cpu"), _triton_why_not, _triton_forward, _triton_backward),
        ),
        fake=_fake,
        backward_fake=_backward_fake,
        setup_context=_setup_context,
        backward_args=_backward_args,
        forward_args=_forward_args,
        samples=SAMPLES,
        dtypes=NATIVE_DTYPES[:3],
        cost=_cost,
        reference_bytes=_reference_bytes,
    )
)
