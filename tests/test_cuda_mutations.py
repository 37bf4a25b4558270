"""Rung 5: each wait, fence and barrier of the CUDA C++ kernels removed in turn: the CPU model says
so, or the source says why it is not needed (cuda_mutations.py)."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cuda_mutations import PROGRAMS, Program, Site, program_of, sites, sites_of

from bigops import simt

pytestmark = pytest.mark.skipif(simt.why_not() is not None, reason=str(simt.why_not()))

# One of each kind by default, of as many kernels as there are; `-m slow` has all, and the kernels
# as they are.
DEFAULT = (
    ("attention_sm90.h", "fence_proxy_async"),
    ("attention_forward_sm90.h", "mbarrier_wait"),
    ("attention_forward_sm90.h", "wgmma_wait"),
    ("attention_backward_sm90.h", "bulk_wait_read"),
    ("attention_backward_sm90.h", "named_barrier_sync"),
    ("attention_forward_sm80.h", "cp_async_wait"),
    ("attention_backward_sm80.h", "__syncthreads"),
    ("adam.cu", "__threadfence"),
)


def by_default() -> list[Site]:
    def first(file: str, word: str) -> Site:
        return next(s for s in sites() if s.file == file and s.call.startswith(word))

    return [first(file, word) for file, word in DEFAULT]


def parameters() -> Iterator[Any]:
    chosen = by_default()
    for program in PROGRAMS:
        yield pytest.param(program, None, marks=pytest.mark.slow, id=program.source)
    for site in sites():
        marks = [] if site in chosen else pytest.mark.slow
        yield pytest.param(program_of(site), site, marks=marks, id=str(site))


@pytest.fixture(scope="module")
def verdicts(request: pytest.FixtureRequest) -> dict[str, str | None]:
    """Of all that was asked for, two at a time, from one process that does nothing else."""
    asked = [
        item.callspec.id
        for item in request.session.items
        if isinstance(item, pytest.Function) and item.function is test_what_the_model_says
    ]
    script = Path(__file__).with_name("cuda_mutations.py")
    done = subprocess.run(
        [sys.executable, str(script), "--json"],
        input=json.dumps(asked), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize(("program", "site"), list(parameters()))
def test_what_the_model_says(
    program: Program,
    site: Site | None,
    verdicts: dict[str, str | None],
    request: pytest.FixtureRequest,
) -> None:
    said = verdicts[request.node.callspec.id]
    assert said is None or not said.startswith("error"), said
    if site is None or site.redundant is not None:
        assert said is None
    else:
        assert said is not None, f"{site.file}:{site.line}: nobody misses {site.call}"


SOURCE = """
// A __syncthreads() in a comment is none.
__device__ void fence_proxy_async() { asm volatile(""); }
struct Role {
    __device__ void release(uint64_t* barrier) const {
        if (lane == 0) device::mbarrier_arrive(barrier);
    }
    __device__ void both() const {
        __syncwarp();
        this->release(&empty[stage]);
    }
    __device__ void store() const {
        const auto meet = [&] { device::named_barrier_sync(1, 128); };
        meet();
        x = 1;
        device::wgmma_wait<kWide ? 0 : 1>();  // redundant: said beside
    }
    __device__ void run() const {
        while (atomicAdd(turns, 0) < before) {
        }
        atomicAdd(turns, 1);
        atomicAdd(sums, x);
        const int drawn = atomicAdd(counter, 1);
        store();
        // redundant: said above,
        // in two lines
        both();
    }
};
"""


def test_sites_are_found() -> None:
    """None is defined or in a comment. What only wraps them counts too, what does more not."""
    found = {site.call: (site.line, site.redundant) for site in sites_of("x.h", SOURCE)}
    assert found == {
        "mbarrier_arrive(barrier)": (6, None),
        "__syncwarp()": (9, None),
        "this->release(&empty[stage])": (10, None),
        "named_barrier_sync(1, 128)": (13, None),
        "meet()": (14, None),
        "wgmma_wait<kWide ? 0 : 1>()": (16, "said beside"),
        "while (atomicAdd(turns, 0) < before) { }": (19, None),
        "atomicAdd(turns, 1)": (21, None),
        "both()": (27, "said above, in two lines"),
    }


def test_every_site_is_run_by_a_program() -> None:
    lost = [site for site in sites() if not any(site.file in p.files for p in PROGRAMS)]
    assert not lost
    assert len({str(site) for site in sites()}) == len(sites())
