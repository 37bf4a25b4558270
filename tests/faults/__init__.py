"""The tests of the tests: for each flagship and backend, faults as they happen, and the test that
catches each.

`test_faults.py` plants every fault in a copy of the package, where its test must fail. Kinds:

    mask         an off-by-one in a mask
    scale        a dropped scale (convolution has none: the bias that adds to its sums)
    block        a missing block of keys, of taps and channels, or of a tensor's chunks
    epilogue     what is done to the result last, or saved for the backward pass, is wrong
    precision    TF32 where IEEE is due; in C++ bfloat16; half of a number that is kept in two
    unwritten    a row that is not written
    input        an input that is changed in place
"""

from __future__ import annotations

from .attention import ATTENTION
from .convolution import CONVOLUTION
from .fault import Fault
from .normalization import BATCH_NORM
from .optimizers import ADAM, SGD
from .pooling import MAX_POOL

__all__ = ["FAULTS", "KINDS", "Fault"]

KINDS = ("mask", "scale", "block", "epilogue", "precision", "unwritten", "input")
FAULTS = (*ATTENTION, *CONVOLUTION, *MAX_POOL, *BATCH_NORM, *ADAM, *SGD)
