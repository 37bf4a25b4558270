"""--tune: how a choice is found, kept, followed by dispatch, shown by explain, and undone."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import bigops
from bigops.bench import cases, run, timing, tuning
from bigops.bench.cases import OpCase
from bigops.cli import main
from bigops.ops import Backend, Cost, Op, Sample, declare, dispatch, get, tuned
from bigops.ops.dispatch import is_fast


@dataclass(frozen=True)
class Fast(Backend):
    """Chosen unforced wherever it is."""

    def automatic(self, device: str) -> bool:
        return True


def toy_function(x: torch.Tensor) -> str:
    """Which backend it takes."""
    if is_fast(TOY, (x,)):
        return str(dispatch.backend_for(TOY, (x,)).forward(x))
    return "reference"


def _served(x: torch.Tensor) -> str | None:
    return "too long" if x.numel() > 100 else None


TOY = Op(
    name="toy",
    function=toy_function,
    eager=lambda x: x,
    backends=(
        Fast("native", ("cpu",), lambda x: None, lambda x: "native"),
        Fast("triton", ("cpu",), _served, lambda x: "triton"),
    ),
    samples=(Sample("ten", lambda device, dtype: ((torch.ones(10, dtype=dtype),), {}), True),),
    dtypes=(torch.float32,),
    cost=lambda passes, x: Cost(1.0, 1.0),
)
X = torch.ones(10)


@pytest.fixture(autouse=True)
def _cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setenv("BIGOPS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("BIGOPS_TUNED", "1")
    monkeypatch.setitem(declare.__globals__["_table"], "toy", TOY)
    tuned.forget()
    yield
    tuned.forget()
    for name in ("attention", "conv2d_act"):
        get(name).routes.clear()


def entry(backend: str, x: torch.Tensor = X, **changes: Any) -> dict[str, Any]:
    signature = tuned.signature((x,))
    return {
        "op": "toy",
        "device": tuned.place((x,)),
        "signature": signature,
        **tuned.versions(),
        "backend": backend,
        "over": "native",
        "speedup": 1.3,
        "date": "2026-01-02",
    } | changes


def keep(*entries: dict[str, Any]) -> None:
    tuned.path().parent.mkdir(exist_ok=True)
    tuned.path().write_text(json.dumps({"entries": entries}))
    tuned.forget()


def test_without_a_file_the_usual_choice() -> None:
    assert toy_function(X) == "native"
    assert bigops.explain(toy_function, X).tuned is None


@pytest.mark.parametrize("backend", ["triton", "reference", "native"])
def test_a_choice_is_followed_and_explained(backend: str) -> None:
    keep(entry(backend))
    assert toy_function(X) == backend
    found = bigops.explain(toy_function, X)
    assert found.backend == backend
    told = f"{backend} was 1.30x as fast as native for this call (2026-01-02, {tuned.path()})"
    assert found.tuned == told
    assert f"\n  tuned: {told}\n" in str(found)
    others = {"native", "triton"} - {backend}
    assert dict(found.passed_over) == dict.fromkeys(others, "slower for this call when tuned")


def test_the_reference_by_choice_is_no_fallback(monkeypatch: pytest.MonkeyPatch) -> None:
    keep(entry("reference"))
    monkeypatch.setattr(dispatch, "_strict", True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert toy_function(X) == "reference"


@pytest.mark.parametrize("forced", ["native", "triton", "reference"])
def test_a_forced_backend_wins(forced: str) -> None:
    keep(entry("triton" if forced != "triton" else "reference"))
    with bigops.use_backend(forced):
        assert toy_function(X) == forced
        assert bigops.explain(toy_function, X).tuned is None


def test_a_chosen_backend_that_does_not_serve_is_not_taken() -> None:
    long = torch.ones(200)
    keep(entry("triton", long))
    assert toy_function(long) == "native"
    assert bigops.explain(toy_function, long).tuned is None
    assert dict(bigops.explain(toy_function, long).passed_over) == {"triton": "too long"}


@pytest.mark.parametrize(
    "x",
    [
        torch.ones(11),
        torch.ones(10).double(),
        torch.ones(20)[::2],
        torch.ones(10, requires_grad=True),
        torch.ones(1, 10),
    ],
    ids=["shape", "dtype", "strides", "gradient", "dimensions"],
)
def test_another_call_is_not_tuned(x: torch.Tensor) -> None:
    keep(entry("reference"))
    assert toy_function(x) == "native"


def test_a_gradient_that_nobody_wants_is_none() -> None:
    keep(entry("reference"))
    with torch.no_grad():
        assert toy_function(torch.ones(10, requires_grad=True)) == "reference"


@pytest.mark.parametrize(
    "changes",
    [{"torch": "1.0"}, {"bigops": "0.0"}, {"device": "another"}, {"op": "other"}],
    ids=lambda changes: next(iter(changes)),
)
def test_what_was_measured_elsewhere_does_not_hold(changes: dict[str, str]) -> None:
    keep(entry("reference", **changes))
    assert toy_function(X) == "native"


def test_other_threads_are_another_device() -> None:
    keep(entry("reference"))
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        assert toy_function(X) == "native"
    finally:
        torch.set_num_threads(threads)
    assert toy_function(X) == "reference"


def test_other_options_are_another_call() -> None:
    calls = [tuned.signature((X, None, option)) for option in (1, 1.0, None, 2, [1], [1, 1])]
    assert len(set(calls)) == len(calls)
    assert tuned.signature(([X, X], 1)) is None
    assert tuned.signature((X.to_sparse(),)) is None
    assert tuned.signature((X.as_subclass(type("Other", (torch.Tensor,), {})),)) is None


def test_it_can_be_turned_off(monkeypatch: pytest.MonkeyPatch) -> None:
    keep(entry("reference"))
    monkeypatch.setenv("BIGOPS_TUNED", "0")
    assert toy_function(X) == "native"


@pytest.mark.parametrize(
    "content",
    ["{", "[]", '{"entries": 1}', '{"entries": [{"op": "toy"}]}', '{"entries": [1]}', "\x80"],
)
def test_a_file_that_cannot_be_used_is_named_once(content: str) -> None:
    tuned.path().parent.mkdir()
    tuned.path().write_bytes(content.encode("latin-1"))
    with pytest.warns(UserWarning, match="tuned.json is ignored: .*--tune --forget") as seen:
        taken = [toy_function(X) for _ in range(2)]
    assert taken == ["native", "native"]
    assert len(seen) == 1


def test_the_file_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[int] = []
    entries = tuned.entries
    monkeypatch.setattr(tuned, "entries", lambda: reads.append(1) or entries())
    for _ in range(3):
        toy_function(X)
    assert len(reads) == 1


def test_a_compiled_call_reads_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    keep(entry("reference"))
    monkeypatch.setattr(tuned, "_read", None)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert is_fast(TOY, (X,))


def test_reading_the_file_compiles_nothing_anew() -> None:
    from torch._dynamo.testing import CompileCounter

    counter, x = CompileCounter(), torch.randn(1, 2, 8, 4)
    torch.compiler.reset()
    compiled = torch.compile(lambda q: bigops.attention(q, q, q), fullgraph=True, backend=counter)
    for _ in range(3):
        got = compiled(x)
        tuned.forget()
        torch.testing.assert_close(got, bigops.attention(x, x, x))
    assert counter.frame_count == 1


@pytest.mark.parametrize(
    ("variable", "where"),
    [("BIGOPS_CACHE", "x/tuned.json"), ("XDG_CACHE_HOME", "x/bigops/tuned.json")],
)
def test_where_the_file_is(variable: str, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BIGOPS_CACHE")
    monkeypatch.setenv(variable, "x")
    assert tuned.path() == Path(where)
    monkeypatch.delenv(variable)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", "/somewhere")
    assert tuned.path() == Path("/somewhere/.cache/bigops/tuned.json")


def _timed(monkeypatch: pytest.MonkeyPatch, **seconds: list[float]) -> None:
    """A contest in which each backend takes these seconds, one number a round."""
    monkeypatch.setattr(
        timing,
        "contest",
        lambda calls, *_: timing.Contest({name: seconds[name] for name in calls}),
    )


PLAN = run.quick(ops=("toy",), models=(), training=False)


@pytest.mark.parametrize(
    ("native", "triton", "reference", "chosen", "over"),
    [
        ([1.0, 1.0], [2.0, 2.0], [3.0, 3.0], "native", "triton"),
        ([2.0, 2.0], [1.0, 1.0], [3.0, 3.0], "triton", "native"),
        ([2.0, 2.0], [3.0, 3.0], [1.0, 1.0], "reference", "native"),
        ([1.04, 1.04], [1.0, 1.0], [3.0, 3.0], "native", "triton"),  # within a twentieth
        ([1.06, 1.06], [1.0, 1.0], [3.0, 3.0], "triton", "native"),
        # Usually slower, but not in a quarter of the rounds.
        ([1.0, 1.0, 9.0, 9.0, 9.0], [2.0] * 5, [9.0] * 5, "native", "triton"),
    ],
)
def test_what_is_chosen(
    native: list[float],
    triton: list[float],
    reference: list[float],
    chosen: str,
    over: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _timed(monkeypatch, native=native, triton=triton, reference=reference)
    (found,) = tuning.tune(PLAN, [])
    assert (found["backend"], found["over"]) == (chosen, over)
    tuning.save([found])
    assert toy_function(X) == chosen


def test_candidates_are_those_that_serve_unforced(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def contest(calls: Any, *_: Any) -> timing.Contest:
        seen.append({name: call(0) for name, call in calls.items()})
        return timing.Contest({name: [1.0] for name in calls})

    monkeypatch.setattr(timing, "contest", contest)
    tuning.tune(PLAN, [])
    assert seen == [{name: name for name in ("native", "triton", "reference")}]
    monkeypatch.setattr(Fast, "automatic", lambda self, device: self.name != "triton")
    tuning.tune(PLAN, [])
    assert list(seen[1]) == ["native", "reference"]
    plan = run.quick(ops=("attention",), models=(), case="1x8x2048x64", dtypes=(torch.float32,))
    monkeypatch.setattr(timing, "contest", lambda calls, *_: seen.append(list(calls)))
    tuning.tune(plan, [])
    assert seen[2] in (["native", "reference"], ["native"])  # by what memory this machine has


def test_what_has_no_choice_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    notes: list[str] = []
    plan = run.quick(ops=("grad_norm",), models=("CNN",), dtypes=(torch.float32,))
    assert tuning.tune(plan, notes) == []
    assert notes == [
        "grad_norm 48 tensors, 14.2M float32: "
        "it takes lists of tensors, for which no choice is kept"
    ]
    monkeypatch.setattr(cases, "memory_bytes", lambda device: 0)
    plan = run.quick(ops=("attention",), models=(), case="1x8x2048x64", dtypes=(torch.float32,))
    tuning.tune(plan, notes)
    assert notes[1].endswith("only native serves it, and the reference would take too much memory")
    monkeypatch.setattr(tuning, "_entry", lambda case, seconds: 1 / 0)
    tuning.tune(PLAN, notes)
    assert notes[2] == "toy ten float32: ZeroDivisionError: division by zero"


def test_inference_is_tuned_beside_training() -> None:
    sample = Sample(
        "with gradients",
        lambda device, dtype: ((torch.ones(10, dtype=dtype, requires_grad=True),), {}),
    )
    both = tuning._variants(OpCase(TOY, sample, torch.float32, "cpu"))
    assert [case._one[0][0].requires_grad for case in both] == [True, False]
    assert len(tuning._variants(OpCase(TOY, TOY.samples[0], torch.float32, "cpu"))) == 1


def test_newer_entries_take_the_place_of_older_ones() -> None:
    tuning.save([entry("triton"), entry("triton", torch="1.0")])
    assert toy_function(X) == "triton"
    tuning.save([entry("reference")])
    assert toy_function(X) == "reference"
    assert [e["backend"] for e in tuned.entries()] == ["reference", "triton"]
    assert [path.name for path in tuned.path().parent.iterdir()] == ["tuned.json"]


def test_a_call_that_is_known_is_decided_anew() -> None:
    image, weight = torch.randn(1, 3, 8, 8), torch.randn(4, 3, 3, 3)
    bigops.conv2d_relu(image, weight)
    op, args, _ = dispatch.decision(bigops.conv2d_relu, image, weight)
    if not op.routes:
        pytest.skip("the native kernels are not built")
    slow = entry("reference", op="conv2d_act", signature=tuned.signature(args))
    tuning.save([slow])
    assert not op.routes
    plain = bigops.conv2d_relu(image, weight)
    assert not op.routes  # only fast calls leave one
    assert bigops.explain(bigops.conv2d_relu, image, weight).backend == "reference"
    with bigops.use_backend("native"):
        torch.testing.assert_close(bigops.conv2d_relu(image, weight), plain)


def _status(*words: str) -> int:
    try:
        return main(words)
    except SystemExit as stop:
        return int(stop.code or 0)


def test_the_command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    _timed(monkeypatch, native=[2.0], triton=[1.0], reference=[3.0])
    monkeypatch.chdir(tuned.path().parent.parent)
    assert _status("bench", "toy", "--tune", "--quick") == 0
    out = capsys.readouterr().out
    assert f"1 choices kept in {tuned.path()}" in out
    assert "triton" in out
    assert toy_function(X) == "triton"
    assert _status("bench", "--tune", "--forget") == 0
    assert capsys.readouterr().out == f"deleted {tuned.path()}\n"
    assert toy_function(X) == "native"
    assert _status("bench", "--tune", "--forget") == 0
    assert capsys.readouterr().out == f"there is no {tuned.path()}\n"
    assert [path.name for path in Path().iterdir()] == ["cache"]


def test_wrong_words(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert _status("bench", "--forget") == 2
    assert capsys.readouterr().err == "bigops bench: --forget goes with --tune\n"
    assert _status("bench", "toy", "--tune", "--backend", "native") == 2
    assert "--tune chooses among the backends: leave out --backend" in capsys.readouterr().err
    tuned.path().parent.mkdir()
    tuned.path().write_text("{")
    monkeypatch.setattr(tuning, "tune", None)  # not before the file is looked at
    assert _status("bench", "toy", "--tune") == 2
    err = capsys.readouterr().err
    assert err.startswith(f"bigops bench: --tune: {tuned.path()}: ")
    assert err.count("\n") == 1
    assert tuned.path().read_text() == "{"
