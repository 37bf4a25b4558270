"""Sweeps: the grammar, what an op makes of a size, and the way from words to records."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from bigops.bench import cases, ceilings, memory, run, sweeps, tables
from bigops.bench.cases import OURS, OpCase
from bigops.cli import main
from bigops.ops import Sample, get, table


@pytest.mark.parametrize(
    ("text", "sizes"),
    [
        ("S=512:16384", (512, 1024, 2048, 4096, 8192, 16384)),
        ("S=5:39", (5, 10, 20)),
        ("S=512", (512,)),
        ("S=3,1,3,2", (3, 1, 2)),
        ("S=1:4,100", (1, 2, 4, 100)),
        ("S=7:7", (7,)),
    ],
)
def test_grammar(text: str, sizes: tuple[int, ...]) -> None:
    assert sweeps.parse(text) == sweeps.Sweep("S", sizes)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("S", "must be like"),
        ("=4", "must be like"),
        ("S=", "must be like"),
        ("S=a", "a is no size"),
        ("S=4:", "nothing is no size"),
        ("S=4:8:2", "8:2 is no size"),
        ("S=0", "0 is no size"),
        ("S=-1", "-1 is no size"),
        ("S=٣", "is no size"),
        ("S=8:4", "8:4 must go upwards"),
        ("S=4,,8", "nothing is no size"),
        (f"S={','.join(map(str, range(1, 70)))}", "at most 64 sizes, got 69"),
    ],
)
def test_bad_grammar(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sweeps.parse(text)


@pytest.mark.parametrize("name", table())
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_dimension_of_an_op_grows_its_work(name: str, device: str) -> None:
    op = get(name)
    assert op.sweeps
    for dimension, sample_of in op.sweeps.items():
        small, large = sample_of(16, device), sample_of(32, device)
        assert small.bench
        assert small.name != large.name
        costs = []
        for sample in (small, large):
            with FakeTensorMode():
                args, kwargs = sample.make(device, op.dtypes[0])
                costs.append(op.cost("forward", *args, **kwargs).flops)
        assert costs[0] < costs[1], dimension


def test_attention_keeps_the_number_of_tokens() -> None:
    for device, tokens in (("cpu", 2048), ("cuda", 16384)):
        for length in (512, 2048):
            args, kwargs = get("attention").sweeps["S"](length, device).make("meta", torch.float32)
            assert kwargs == {"causal": True}
            assert args[0].shape[0] * args[0].shape[2] == tokens
            assert all(t.requires_grad for t in args)


def _toy_sample(size: int, device: str) -> Sample:
    def make(device: str, dtype: torch.dtype) -> Any:
        return (torch.randn(1, 1, size, 4, device=device, dtype=dtype),) * 3, {}

    return Sample(f"{size} rows", make, bench=True)


@pytest.fixture
def _small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """attention with a sweep of its own that takes no time."""
    monkeypatch.setattr(get("attention"), "sweeps", {"S": _toy_sample})
    monkeypatch.setattr(ceilings, "BUDGET", 0.005)
    monkeypatch.setattr(ceilings, "PRODUCT_SIZES", {"cpu": (64,)})
    monkeypatch.chdir(tmp_path)


BENCH = ("bench", "attention", "--quick", "--seconds", "0.01", "--no-compile", "--report", "")


@pytest.mark.usefixtures("_small")
def test_a_sweep_is_measured_instead_of_the_cases(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--sweep", "S=8:16", "--dtype", "fp32", "--json", "found.json")
    assert main([*BENCH, *words]) == 0
    found = json.loads(Path("found.json").read_text())
    assert [r["sweep"] for r in found["records"]] == [
        {"name": "S", "value": 8},
        {"name": "S", "value": 16},
    ]
    assert [r["case"] for r in found["records"]] == ["8 rows", "16 rows"]
    assert found["overhead"] == []
    assert found["training"] is None
    assert tables.command(found["records"][1], 2) == (
        "bigops bench attention --sweep S=16 --dtype float32 --quick --threads 2"
    )


def _status(*words: str) -> int:
    try:
        return main(words)
    except SystemExit as stop:
        return int(stop.code or 0)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ("attention", "--sweep", "X=4"),
            "--sweep X=4: no dimension 'X': attention has S, D, H, B",
        ),
        (
            ("attention", "adam", "--sweep", "S=4"),
            "--sweep S=4: no dimension 'S': adam has numel, tensors",
        ),
        (("--sweep", "Q=4"), "--sweep Q=4: no dimension 'Q': adam has numel, tensors; grad_norm"),
        (("attention", "--sweep", "S=x"), "--sweep S=x: x is no size"),
        (("CNN", "--sweep", "S=4"), "--sweep S=4: CNN is a model"),
    ],
)
def test_wrong_sweeps(
    words: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _status("bench", *words) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"bigops bench: {message}")
    assert err.count("\n") == 1


def test_without_names_the_ops_that_have_the_dimension() -> None:
    plan = run.quick(sweeps=(sweeps.parse("numel=8,16"),), dtypes=(torch.float32,))
    assert [(c.subject, c.name) for c in run.cases(plan)] == [
        ("adam", "8 elements"),
        ("adam", "16 elements"),
        ("grad_norm", "8 elements"),
        ("grad_norm", "16 elements"),
        ("sgd", "8 elements"),
        ("sgd", "16 elements"),
    ]


def test_memory_is_measured_of_a_sweeps_case() -> None:
    """The other process finds the case by its words."""
    plan = run.Plan(("attention",), sweeps=(sweeps.parse("S=16"),), dtypes=(torch.float32,))
    case = run.cases(plan)[0]
    peak = memory.peak_bytes(case, OURS)
    assert peak is not None


def test_a_reference_that_does_not_fit_is_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    attention = get("attention")
    monkeypatch.setattr(attention, "sweeps", {"S": _toy_sample})
    case = OpCase(attention, _toy_sample(64, "cpu"), torch.float32, "cpu")
    reference = 4 * 2 * 64 * 64 * 4
    monkeypatch.setattr(cases, "memory_bytes", lambda device: 2 * reference)
    assert case.truth()
    monkeypatch.setattr(cases, "memory_bytes", lambda device: 2 * reference - 1)
    with pytest.raises(cases.Unjudged, match="its reference would take"):
        case.truth()
    monkeypatch.setattr(ceilings, "BUDGET", 0.005)
    monkeypatch.setattr(ceilings, "PRODUCT_SIZES", {"cpu": (64,)})
    plan = run.quick(
        ops=("attention",),
        sweeps=(sweeps.parse("S=64"),),
        dtypes=(torch.float32,),
        seconds=0.01,
        compile_seconds=0.0,
        training=False,
    )
    found = run.run(plan)
    assert found.ok
    assert found.records[0]["error"] is None
    assert "attention 64 rows float32: its error is not known" in "\n".join(found.notes)


def test_a_name_beats_what_contains_it() -> None:
    names = [case.name for case in run.cases(run.quick(ops=("adam",), case="48 tensors, 14.2M"))]
    assert names == ["48 tensors, 14.2M"]
    names = [case.name for case in run.cases(run.quick(ops=("adam",), case="48 tensors"))]
    assert names == ["48 tensors, 14.2M", "48 tensors, 14.2M, clipped"]


@pytest.mark.parametrize("name", table())
def test_samples_of_sweeps_are_true(name: str) -> None:
    """At sizes at which everything else, which is fixed, takes no time."""
    op = get(name)
    small = {"S": 64, "C": 3, "HW": 5, "numel": 9, "tensors": 2}
    for dimension in small.keys() & op.sweeps.keys():
        case = OpCase(op, op.sweeps[dimension](small[dimension], "cpu"), op.dtypes[0], "cpu")
        assert all(c.ok for c in case.truth()), case.name
