"""The functions of bigops, where torch has its own: `import bigops.nn.functional as F`."""

from ..functional import *  # noqa: F403  (the public functions, named in functional.__all__)
from ..functional import __all__ as __all__
