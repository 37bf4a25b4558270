"""Modules: subclasses of torch's own, so that parameters' names and state dicts are unchanged."""

from . import functional
from .conv_relu import ConvReLU2d, ConvReLUMaxPool2d
from .multihead_attention import MultiheadAttention

__all__ = ["ConvReLU2d", "ConvReLUMaxPool2d", "MultiheadAttention", "functional"]
