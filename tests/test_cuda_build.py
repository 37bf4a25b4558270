"""Rung 6 of the ladder: nvcc compiles every CUDA C++ kernel; what became of it is kept and judged.

The files of kernels/ledger/cuda.txt that still hold are taken from there, but for a sample; with
`-m slow` all are compiled.
"""

from __future__ import annotations

import re
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bigops.ledger import nvcc, nvcc_rules
from bigops.ledger.nvcc import Built, CudaKernel

VERSION = nvcc.nvcc_version()
SAMPLE = "adam.cu"  # of all that launches something, the quickest
CHANGED = nvcc.changed(VERSION)

needs_nvcc = pytest.mark.skipif(VERSION is None, reason="nvcc is not installed")
needs_cuobjdump = pytest.mark.skipif(nvcc.cuobjdump() is None, reason="cuobjdump is not installed")


def recorded() -> dict[str, Built]:
    return nvcc.recorded_files()[1]


def compiled_here(source: Path) -> bool:
    return source in CHANGED or source.name == SAMPLE


EACH = [
    pytest.param(source, id=source.name, marks=() if compiled_here(source) else pytest.mark.slow)
    for source in nvcc.sources()
]


@needs_nvcc
@needs_cuobjdump
@pytest.mark.parametrize("source", EACH)
def test_nvcc_builds(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if source not in CHANGED:
        monkeypatch.setattr(nvcc, "CACHE", tmp_path)
    try:
        built = nvcc.measured(source)
    except subprocess.CalledProcessError as error:
        pytest.fail(error.stderr[-4000:])
    hopper_only = source.stem.endswith("_sm90")
    wanted = {"sm_90a"} if hopper_only else {"sm_80", "sm_90", "sm_100"}
    assert {kernel.target for kernel in built.kernels} == wanted
    # Operands of matrix instructions wait there.
    assert all(kernel.shared > 0 for kernel in built.kernels if kernel.matrix)
    assert not nvcc_rules.complaints(built.kernels)
    if nvcc.recorded_files()[0] == VERSION:
        ours = recorded().get(source.name, Built([], 0)).kernels
        assert ours == built.kernels, "kernels/ledger/cuda.txt: run `bigops inspect --update`"


def test_the_record_is_of_these_sources() -> None:
    if nvcc.sources():
        assert recorded().keys() == {source.name for source in nvcc.sources()}
    assert all(file.kernels for file in recorded().values())


def test_the_record_keeps_the_rules() -> None:
    kernels = [kernel for file in recorded().values() for kernel in file.kernels]
    assert not nvcc_rules.complaints(kernels)
    told = "\n".join(nvcc_rules.excuses(kernels))
    for reason in nvcc_rules.REASONS:
        assert reason.why in told, f"nothing needs this reason: {reason}"


def test_all_is_built_in_five_minutes_on_two_cores() -> None:
    times = {name: file.seconds for name, file in recorded().items()}
    assert nvcc_rules.build_time(recorded()) < nvcc_rules.BUILD_SECONDS, times


def test_the_time_to_build_is_that_of_the_fuller_core() -> None:
    times = {"a": 5, "b": 4, "c": 3, "d": 3}
    built = {name: Built([], seconds) for name, seconds in times.items()}
    assert nvcc_rules.build_time(built, cores=2) == 8
    assert nvcc_rules.build_time({"a": Built([], 7), "b": Built([], 1)}, cores=2) == 7


GOOD = CudaKernel(
    "attention_sm90.cu", "kernel<128>", "sm_90a", "key", 168, 0, 0, 0, "wgmma:12", 7, 0, 128
)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"spills": 40}, "spills 40 bytes"),
        ({"shared": 233000}, "asks for 233000 bytes of shared memory of 232448"),
        ({"in_loops": 2}, "2 accesses to local memory in loops"),
        ({"matrix": ""}, "no matrix instruction where wgmma is due"),
        ({"matrix": "mma:8"}, "mma:8 where wgmma is due"),
        ({"source": "attention_sm80.cu"}, "wgmma:12 where mma is due"),
        ({"copies": 0}, "loads global memory by 0 bits"),
        ({"copies": 0, "load": 128, "store": 64}, "stores global memory by 64 bits"),
    ],
)
def test_rules(change: dict[str, Any], said: str) -> None:
    assert not nvcc_rules.complaints([GOOD])
    bad = replace(GOOD, **change)
    (line,) = nvcc_rules.complaints([bad])
    assert said in line
    (rule,) = nvcc_rules.broken(bad)
    assert not nvcc_rules.complaints([bad], [nvcc_rules.Reason(rule, "why", "kernel<*")])
    assert nvcc_rules.complaints([bad], [nvcc_rules.Reason(rule, "why", "other<*")])


def test_a_few_bytes_spilled_outside_loops_are_accepted_with_the_reason() -> None:
    few = replace(GOOD, spills=nvcc_rules.FEW)
    assert not nvcc_rules.complaints([few])
    assert "stored before the loops" in nvcc_rules.excuses([few])[0]
    assert len(nvcc_rules.complaints([replace(few, in_loops=1)])) == 2


CODE = """
        /*0000*/  LDG.E.64 R2, desc[UR4][R4.64] ;
        /*0010*/  LDL R3, [R1] ;
        /*0020*/  HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24 ;
        /*0030*/  HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24 ;
        /*0040*/  SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [UR4], R3 ;
        /*0050*/  @!P1 BRA 0x40 ;
        /*0060*/  STL [R1+0x4], R3 ;
        /*0070*/  @P0 BRA 0x20 ;
        /*0080*/  UTMALDG.4D [UR8], [UR4] ;
        /*0090*/  STL [R1+0x8], R3 ;
        /*00a0*/  LDG.E.128.STRONG.GPU R8, desc[UR4][R4.64] ;
        /*00b0*/  STG.E.STRONG.GPU desc[UR4][R4.64], R8 ;
        /*00c0*/  @P2 BRA 0x10 ;
"""


def test_contents_of_machine_code() -> None:
    assert nvcc.contents(CODE) == {
        "in_loops": 1, "matrix": "wgmma:2", "copies": 1, "load": 128, "store": 32,
    }  # fmt: skip
    # Without matrix instructions waiting is the inner loop, which is free of local memory.
    assert nvcc.contents(re.sub("HGMMA", "FFMA", CODE))["in_loops"] == 0
    plain = re.sub("HGMMA|@!P1 BRA", "FFMA", CODE)
    assert nvcc.contents(plain)["in_loops"] == 1


def test_what_is_written_is_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    plain = replace(GOOD, source="b.cu", matrix="", kernel="sums<A<float, 4>, true>")
    built = {"b.cu": Built([plain], 3), GOOD.source: Built([GOOD, replace(GOOD, load=64)], 12)}
    (tmp_path / "cuda.txt").write_text(nvcc.written("13.0.88", built))
    monkeypatch.setattr(nvcc, "folder", lambda: tmp_path)
    assert nvcc.recorded_files() == ("13.0.88", built)
    assert nvcc.recorded() == ("13.0.88", [*built[GOOD.source].kernels, plain])


def test_only_what_changed_is_compiled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("a.cu", "b_sm90.cu"):
        (tmp_path / name).write_text('#include "c.h"\nint x;\n')
    (tmp_path / "c.h").write_text("int y;\n")
    monkeypatch.setattr(nvcc, "SOURCES", tmp_path)
    monkeypatch.setattr(nvcc, "folder", lambda: tmp_path)
    a, b = nvcc.sources()
    built = {
        source.name: Built([replace(GOOD, source=source.name, key=nvcc.source_key(source))], 1)
        for source in (a, b)
    }
    assert nvcc.source_key(a) != nvcc.source_key(b), "of other architectures"
    (tmp_path / "cuda.txt").write_text(nvcc.written("13.0.88", built))
    assert nvcc.changed("13.0.88") == []
    assert nvcc.changed("13.1.0") == [a, b]
    b.write_text('#include "c.h"\nint z;\n')
    assert nvcc.changed("13.0.88") == [b]
    (tmp_path / "c.h").write_text("int w;\n")
    assert nvcc.changed("13.0.88") == [a, b]
