"""The CPU model's instructions: each of the device header's against its definition
(instructions.py), each misuse found, and nothing found in the same kernel without it."""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any

import instructions
import pytest
import torch

from bigops import simt

CUDA = Path(__file__).parent / "cuda"

if (reason := simt.why_not()) is not None:
    pytest.skip(reason, allow_module_level=True)


@functools.cache
def module(name: str, build: str) -> simt.Module:
    return simt.compile(CUDA / f"{name}.cu", build)


@pytest.mark.parametrize("case", list(instructions.cases()), ids=lambda case: case.name)
def test_definition(case: instructions.Case) -> None:
    # In whichever order threads run and loads come; with the checks of the race build in one.
    for order, build in (("forward", "race"), ("reverse", "plain"), ("shuffled", "plain")):

        def call(
            file: str, function: str, *args: Any, order: str = order, build: str = build
        ) -> None:
            found = module(f"instructions_{file}", build).call(function, *args, order=order)
            assert not found

        case.run(call, "cpu")


# Per kernel of instructions_wrong.cu, in the order of its enumeration: which finding, with what in
# it. LINE is a line of that file.
MISTAKES: dict[str, list[tuple[str, str]]] = {
    "cp_async": [
        ("never written", "is read by thread 127 at LINE"),
        ("never written", "is read by thread 127 at LINE"),
        ("race", "asynchronous work writes at LINE, thread 88 reads"),
        ("never written", "is read by thread 127 at LINE"),
        ("race", "thread 127 reads at LINE, asynchronous work writes"),
        ("misaligned", "the global address is no multiple of 16"),
        ("out of bounds", "argument 1, byte 0 of 512 is not shared memory"),
    ],
    "mbarrier": [
        ("misuse", "was not initialised"),
        ("race", "thread 0 writes at LINE, thread 1 reads"),
        ("missing fence", "no fence.mbarrier_init shows it to the async proxy"),
        ("misuse", "was overwritten by ordinary stores"),
        ("misuse", "initialised again without mbarrier.inval"),
        ("misuse", "more than its 1 arrivals in one phase"),
        ("deadlock", "parity 0: 1 of 1 arrivals, 16 bytes to come"),
        ("misuse", "16 bytes more have come than were expected"),
        ("never written", "is read by thread 127 at LINE"),
        ("never written", "is read by thread 127 at LINE"),
        ("race", "thread 88 reads at LINE, asynchronous work writes"),
        ("misaligned", "must be multiples of 16"),
        ("misuse", "before 1 loads were waited for, the first of them issued at"),
    ],
    "store": [
        ("missing fence", "asynchronous work reads at LINE through the async"),
        ("missing fence", "asynchronous work reads at LINE through the async"),
        ("misuse", "before 1 bulk stores were committed and waited for"),
        ("misuse", "before 1 bulk stores were committed and waited for"),
        ("race", "asynchronous work reads at LINE, thread 1 writes"),
        ("misaligned", "byte 64 of 2048 is no multiple of 128 bytes"),
        ("misuse", "with 4 coordinates, of a tensor map of 3 dimensions"),
        ("misuse", "this tensor map was never encoded"),
    ],
    "wgmma": [
        ("missing fence", "asynchronous work reads at LINE through the async"),
        ("misuse", "wgmma before any wgmma.fence"),
        ("misuse", "accumulators that were used since another wgmma, and no wgmma.fence"),
        ("misuse", "accumulators were written after the last wgmma.fence"),
        ("misuse", "before a wgmma was committed and waited for"),
        ("misuse", "before a wgmma was committed and waited for"),
        ("misuse", "accumulators were written while a wgmma with them was under way"),
        ("race", "asynchronous work reads at LINE, thread 31 writes"),
        ("misaligned", "a matrix begins at a multiple of 1024 bytes"),
        ("mismatch", "threads 0 and 77 of a warpgroup differ"),
        ("not reached", "was not reached by thread 127, which has exited"),
        ("misuse", "bits set that the format leaves out"),
        ("out of bounds", "is outside of shared memory"),
    ],
    "registers": [
        ("misuse", "registers of A were written after the last wgmma.fence"),
        ("misuse", "registers of A were written after the last wgmma.fence"),
        ("misuse", "registers of A were written while a wgmma with them was under way"),
    ],
    "warp": [
        ("misuse", "there are barriers 1 to 15, and 0 is __syncthreads'"),
        ("misuse", "barrier 1 of 120 threads: must be a multiple of 32"),
        ("mismatch", "one thread says 128 threads take part, another 96"),
        ("deadlock", "threads 64-127 wait for barrier 1 of 128 threads"),
        ("misuse", "barrier 1: thread 0 arrives a second time before all 128 threads have"),
        ("not reached", "the block ends while barrier 1 has 64 of 128 threads"),
        ("misuse", "setmaxnreg.dec 27: must be 24 to 256 and a multiple of 8"),
        ("mismatch", "meets setmaxnreg.dec of thread 0"),
        ("misaligned", "is no multiple of 16 bytes"),
        ("race", "thread 1 writes at LINE"),
        ("not reached", "was not reached by thread 1, which has exited"),
        ("out of bounds", "is not shared memory"),
    ],
    "pool": [
        ("deadlock", "threads 128-383 wait for setmaxnreg.inc: 240 registers a thread"),
        ("misuse", "setmaxnreg.dec to 240 registers, from 168"),
        ("deadlock", "threads 256-383 wait for setmaxnreg.inc: 240 registers a thread"),
    ],
}


def make(kernel: str, mistake: int) -> list[simt.Finding]:
    x, out = torch.ones(1024), torch.zeros(128)
    a, b = torch.randn(64, 64).bfloat16(), torch.randn(64, 64).bfloat16()
    box = torch.zeros(1024, dtype=torch.int8)
    args: dict[str, tuple[torch.Tensor, ...]] = {
        "cp_async": (x, out),
        "mbarrier": (x, out),
        "store": (box, torch.zeros_like(box)),
        "wgmma": (a, b, torch.zeros(64, 64)),
        "registers": (a, b, torch.zeros(64, 64)),
        "warp": (out,),
        "pool": (),
    }
    return module("instructions_wrong", "race").call(f"wrong_{kernel}", *args[kernel], mistake)


@pytest.mark.parametrize("kernel", MISTAKES)
def test_nothing_is_found_in_what_is_right(kernel: str) -> None:
    assert not make(kernel, 0)


@pytest.mark.parametrize(
    ("kernel", "mistake"), [(k, i + 1) for k, all_ in MISTAKES.items() for i in range(len(all_))]
)
def test_a_mistake_is_found(kernel: str, mistake: int) -> None:
    kind, text = MISTAKES[kernel][mistake - 1]
    pattern = re.escape(text).replace("LINE", r"instructions_wrong\.cu:\d+")
    found = make(kernel, mistake)
    assert any(f.kind == kind and re.search(pattern, f.message) for f in found), found


# By `wrong_map` of instructions_wrong.cu.
REFUSED = (
    "data must be a multiple of 16 bytes",
    "rank must be 1 to 5, got 6",
    "sizes[1] must be 1 to 4294967296, got 0",
    "byte_strides[1] (of dimension 2) must be a multiple of 16, got 1000",
    "byte_strides[0] (of dimension 1) must be less than 2^40",
    "box[1] must be 1 to 256, got 257",
    "box[0] must span the swizzle's 128 bytes, got 64",
    "box[0] must span a multiple of 16 bytes, got 8",
    "steps[2] must be 1 to 8, got 9",
    "steps[0] must be 1",
    "lower[1] must be -128 to 127, got -129",
    "upper[0] leaves the filter no position",
    "pixels must be 1 to 1024, got 1025",
    "steps[1] must be 1 to 8, got 0",
    "channels must span the swizzle's 128 bytes, got 64",
)


def test_a_tensor_map_is_accepted() -> None:
    module("instructions_wrong", "race").call("wrong_map", torch.zeros(64), 0)


@pytest.mark.parametrize("which", range(len(REFUSED)))
def test_a_wrong_tensor_map_is_refused_with_the_argument(which: int) -> None:
    with pytest.raises(RuntimeError) as caught:
        module("instructions_wrong", "race").call("wrong_map", torch.zeros(64), which + 1)
    assert REFUSED[which] in str(caught.value)


def test_im2col_from_outside_of_the_bounding_box_is_found() -> None:
    tensor = torch.zeros(2, 7, 9, 64).bfloat16()
    for at, offset, text in (
        ([0, -2, 0, 0], (0, 0), "the position -2 is outside of the bounding box, -1 to 7 in width"),
        ([0, 0, 6, 0], (0, 0), "the position 6 is outside of the bounding box, -1 to 5 in height"),
        ([0, 0, 0, 0], (0, 256), "the offset 256 is more than 255"),
    ):
        plan = instructions.Plan(tensor, [1] * 4, at, 128, lower=(-1, -1), upper=(-1, -1))
        plan.channels, plan.pixels, plan.offset, plan.bytes = 64, 16, offset, 16 * 128
        out = torch.zeros(plan.bytes, dtype=torch.uint8)
        found = module("instructions_tma", "race").call("tma_im2col", tensor, out, plan.encoded())
        assert [f.kind for f in found] == ["misuse"]
        assert text in found[0].message


@pytest.mark.parametrize("waits", [False, True])
def test_a_turn_is_passed_on_by_who_has_added(waits: bool) -> None:
    """That shared memory has been read does not do."""
    sums, turn = torch.zeros(32), torch.zeros(1, dtype=torch.int32)
    wrong = module("instructions_wrong", "race")
    args = [sums, turn, int(waits)]
    found = wrong.launch("adds_in_turn", grid=3, block=32, args=args, same_bits=True)
    assert {f.kind for f in found} == (set() if waits else {"race"})
    assert torch.equal(sums, torch.full_like(sums, 3.0))


def test_what_is_written_at_the_end_is_checked_too() -> None:
    args = [torch.zeros(16), torch.zeros(1, dtype=torch.int32), 0]
    wrong = module("instructions_wrong", "race")
    (found,) = wrong.launch("adds_in_turn", grid=1, block=32, args=args)
    assert found.kind == "out of bounds"
