"""Modules: subclasses of torch's own, so that parameters' names and state dicts are unchanged."""

from . import functional
from .multihead_attention import MultiheadAttention

__all__ = ["MultiheadAttention", "functional"]
