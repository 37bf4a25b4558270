"""Activations and their slopes, in fp32, as csrc/cpu/activation.h has them."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def tanh(x):
    # From the end that does not cancel: e^2|x| - 1 loses digits where |x| is small.
    size = tl.abs(x)
    e = tl.exp(-2.0 * size)
    large = (1.0 - e) / (1.0 + e)
    u = x * x
    small = size * (
        1.0 + u * (-0.333333333 + u * (0.133333333 + u * (-0.0539682540 + u * 0.0218694885)))
    )
    y = tl.where(size < 0.2, small, large)
    return tl.where(x < 0, -y, y)


@triton.jit
def normal_cdf(x):
    return 0.5 * (1.0 + tl.math.erf(x * 0.707106781))


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    if ACTIVATION == "relu":
        x = tl.where(x <= 0, 0.0, x)  # as torch: NaN stays NaN
    elif ACTIVATION == "sigmoid":
        x = sigmoid(x)
    elif ACTIVATION == "tanh":
        x = tanh(x)
    elif ACTIVATION == "gelu":
        x = x * normal_cdf(x)
    elif ACTIVATION == "silu":
        x = x * sigmoid(x)
    return x


@triton.jit
def activation_grad(grad, saved, ACTIVATION: tl.constexpr):
    """The gradient before the activation; saved is its output, of gelu and silu its input."""
    if ACTIVATION == "relu":
        grad = tl.where(saved <= 0, 0.0, grad)
    elif ACTIVATION == "sigmoid":
        grad = grad * saved * (1.0 - saved)
    elif ACTIVATION == "tanh":
        grad = grad * (1.0 - saved * saved)
    elif ACTIVATION == "gelu":
        density = 0.398942280 * tl.exp(-0.5 * saved * saved)
        grad = grad * (normal_cdf(saved) + saved * density)
    elif ACTIVATION == "silu":
        s = sigmoid(saved)
        grad = grad * s * (1.0 + saved * (1.0 - s))
    return grad
