"""Random calls of every op, legal and illegal.

Legal ones agree with the reference on every backend that runs here, give the same bits when they
are repeated, and lie as the fakes say. Illegal ones are refused in a message that begins with the
argument's name, and nothing is written.

Seeds are drawn anew in every run but CI's; a failure prints its own, and `--hypothesis-seed=N`
repeats it.
"""

from __future__ import annotations

import os
import random
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, seed, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

import bigops
from bigops import check, shrink
from bigops.backends import native
from bigops.ops import BackendError, Op, Sample

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
BACKEND = "triton" if INTERPRETED else "native"
OPS = [op for op in bigops.ops.table().values() if op.function.__module__.startswith("bigops.")]
EXAMPLES, MANY = 300, 1000 if INTERPRETED else 5000
MOST_ELEMENTS = 2**12  # interpreted: as many programs as there are tiles take their time
SEEDS = st.integers(0, 2**32 - 1)
# Of the CPU alone: for other devices torch.manual_seed notes its caller's stack, a millisecond.
manual_seed = torch.default_generator.manual_seed


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """A second one would wait for the first: calls are small. tests/test_threads.py has several."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


pytestmark = [
    pytest.mark.skipif(BACKEND == "native" and native.why_not() is not None, reason="not built"),
    pytest.mark.usefixtures("nan_memory"),
    pytest.mark.filterwarnings("ignore::bigops.ops.FallbackWarning"),
]
every_op = pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
how_many = pytest.mark.parametrize(
    "examples", [EXAMPLES, pytest.param(MANY, marks=pytest.mark.slow)], ids=["some", "many"]
)


def fuzz(
    request: pytest.FixtureRequest,
    examples: int,
    holds: Callable[..., None],
    *drawn: st.SearchStrategy[Any],
) -> None:
    """`holds` for as many examples of what the strategies draw; the run's seed is printed."""
    given_seed = request.config.getoption("hypothesis_seed", None)
    if given_seed is None and os.environ.get("CI") == "true":
        given_seed = 0  # whether a change lands is no matter of luck; all other runs draw anew
    number = random.SystemRandom().getrandbits(32) if given_seed is None else int(given_seed)
    print(f"repeat with --hypothesis-seed={number}")
    kinds = settings(
        max_examples=examples,
        deadline=None,
        derandomize=False,
        print_blob=True,
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
    )
    kinds(seed(number)(given(*drawn)(holds)))()


def make(sample: Sample, dtype: torch.dtype, number: int) -> tuple[Any, Any]:
    """The sample's call; of one number it is the same, in other memory."""
    manual_seed(number)
    return sample.make("cpu", dtype)


def tensors(tree: Any) -> list[Tensor]:
    return [t for t in pytree.tree_leaves(tree) if isinstance(t, Tensor)]


@every_op
def test_is_declared(op: Op) -> None:
    assert op.arbitrary is not None
    assert op.illegal is not None


@every_op
@how_many
def test_legal_calls(op: Op, examples: int, request: pytest.FixtureRequest) -> None:
    def holds(sample: Sample, dtype: torch.dtype, number: int) -> None:
        manual_seed(number)
        reason = check.serves(op, sample, BACKEND, dtype, "cpu")
        if INTERPRETED:
            assume(reason is None)
            assume(sum(t.numel() for t in tensors(make(sample, dtype, number))) <= MOST_ELEMENTS)
            sample = replace(sample, bench=True)  # one draw instead of three
        assert reason is None, reason
        manual_seed(number)
        op.routes.clear()
        with nullcontext([]) if op.schema is None else watched(op) as caught:
            for compared in check.check_arbitrary(op, sample, BACKEND, dtype):
                assert compared.ok, compared
        lie_as_declared(caught)
        if INTERPRETED and number % 4:
            return  # a call takes its time there
        # The second call, by the short road, gives the bits of the first.
        op.routes.clear()
        first = results(op, *make(sample, dtype, number))
        for one, other in zip(first, results(op, *make(sample, dtype, number)), strict=True):
            same_bits(one, other)

    assert op.arbitrary is not None
    calls = shrink.drawn(op.arbitrary)
    fuzz(request, examples, holds, calls, st.sampled_from(op.dtypes), SEEDS)


def same_bits(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


def results(op: Op, args: Any, kwargs: Any) -> list[Tensor]:
    """Outputs, gradients, and what was written."""
    with bigops.use_backend(BACKEND):
        outputs = tensors(op.function(*args, **kwargs))
        roots = [t for t in outputs if t.requires_grad]
        leaves = [t for t in tensors((args, kwargs)) if t.requires_grad]
        grads = (
            torch.autograd.grad(roots, leaves, [torch.ones_like(t) for t in roots]) if roots else ()
        )
    return [*outputs, *grads, *(tensors((args, kwargs)) if op.mutates else [])]


Caught = list[tuple[Callable[..., Any], Any, Any]]


@contextmanager
def watched(op: Op) -> Iterator[Caught]:
    """Fakes, arguments and results of the op's calls, forward and backward."""
    caught: Caught = []

    def watch(call: Callable[..., Any], fake: Any) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            found = call(*args)
            caught.append((fake, args, found))
            return found

        return run

    calls = op.call, op.call_backward
    op.call, op.call_backward = watch(calls[0], op.fake), watch(calls[1], op.backward_fake)
    try:
        yield caught
    finally:
        op.call, op.call_backward = calls
    assert caught


def lie_as_declared(caught: Caught) -> None:
    """Sizes, strides and dtypes of outputs and gradients are those of the fakes."""
    for fake, args, found in caught:
        with FakeTensorMode() as mode:
            declared = fake(*pytree.tree_map_only(Tensor, mode.from_tensor, args))
        pairs = zip(pytree.tree_leaves(found), pytree.tree_leaves(declared), strict=True)
        assert [how(t) for t, _ in pairs] == [how(t) for t in pytree.tree_leaves(declared)]


def how(t: Tensor | None) -> Any:
    """Strides of dimensions that are walked; others hold anything."""
    if t is None:
        return None
    walked = {d: t.stride(d) for d in range(t.dim()) if t.shape[d] > 1 and t.numel()}
    return t.shape, walked, t.dtype


@every_op
@how_many
def test_illegal_calls(op: Op, examples: int, request: pytest.FixtureRequest) -> None:
    def holds(call: tuple[Sample, str], dtype: torch.dtype, number: int) -> None:
        sample, argument = call
        for backend in (None, BACKEND, "reference"):
            args, kwargs = make(sample, dtype, number)
            before = [t.clone() for t in plain((args, kwargs))]
            with bigops.use_backend(backend):
                for _ in range(2):
                    with pytest.raises((TypeError, ValueError, BackendError)) as raised:
                        op.function(*args, **kwargs)
                    # Forced, Triton may refuse the rest of the call first, float64 say.
                    other = r"bigops.*triton is forced" if INTERPRETED else "$^"
                    assert re.match(rf"{argument}\b|{other}", str(raised.value)), raised.value
            for old, new in zip(before, plain((args, kwargs)), strict=True):
                same_bits(old, new)

    assert op.illegal is not None
    calls = shrink.drawn(op.illegal)
    fuzz(request, examples, holds, calls, st.sampled_from(op.dtypes), SEEDS)


def plain(tree: Any) -> list[Tensor]:
    """The tensors with values that can be compared."""
    return [
        t.detach() for t in tensors(tree) if t.layout == torch.strided and t.device.type == "cpu"
    ]


def session_of(ops: list[Op]) -> tuple[list[str], int]:
    """Some ops' tests, and how many they are."""
    kinds = [f"{kind}_calls[some-{op.name}]" for op in ops for kind in ("legal", "illegal")]
    return [f"{__file__}::test_{kind}" for kind in kinds], len(kinds)


@pytest.mark.skipif(INTERPRETED, reason="it starts the process that this one is")
@pytest.mark.beside(*session_of(OPS[::2]))
@pytest.mark.beside(*session_of(OPS[1::2]))
def test_interpreted(beside: list[str]) -> None:
    """The same on Triton's interpreter."""
    for output in beside:
        print(output)
