"""The op table: every op of bigops, declared once (see `declare.py`)."""

from . import adam, arguments, attention, sgd
from .declare import Backend, Chooser, Cost, Op, Peer, Sample, declare, get, table
from .dispatch import BackendError, Explanation, FallbackWarning, explain, is_fast, use_backend

__all__ = [
    "Backend",
    "BackendError",
    "Chooser",
    "Cost",
    "Explanation",
    "FallbackWarning",
    "Op",
    "Peer",
    "Sample",
    "adam",
    "arguments",
    "attention",
    "conv2d_act",
    "conv2d_relu_max_pool2d",
    "declare",
    "explain",
    "get",
    "is_fast",
    "sgd",
    "table",
    "use_backend",
]
