"""bigops: fused kernels for PyTorch, each with its proof.

    import bigops
    out = bigops.attention(query, key, value, causal=True)

The functions are in `bigops.functional` (and here), modules in `bigops.nn`, optimizers in
`bigops.optim`, reference models in `bigops.models`, the declarations of all ops in `bigops.ops`.
"""

import importlib.util

if importlib.util.find_spec("bigops.kernels") is None:
    raise ImportError(
        "bigops is imported from a source tree that is not installed: pip install -e ."
    )

from . import functional, models, nn, ops, optim
from .functional import *  # noqa: F403  (the public functions, named in functional.__all__)
from .functional import __all__ as _functions
from .ops import BackendError, FallbackWarning, explain, use_backend
from .ops.ranges import nvtx

__version__ = "0.1.0"

__all__ = [
    "BackendError",
    "FallbackWarning",
    "explain",
    "functional",
    "models",
    "nn",
    "nvtx",
    "ops",
    "optim",
    "use_backend",
    *_functions,
]
