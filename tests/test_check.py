"""What a failed check teaches: the worst element, the smallest call that fails, the command that
repeats it."""

from __future__ import annotations

import importlib.util
import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bigops import check, shrink
from bigops.cli import main
from bigops.ops import Backend, Chooser, Cost, Op, Sample, declare, get, is_fast

needs_hypothesis = pytest.mark.skipif(
    importlib.util.find_spec("hypothesis") is None, reason="hypothesis is not installed"
)


def double(x: Tensor) -> Tensor:
    return OP.backends[0].forward(x) if is_fast(OP, (x,)) else x + x


def forgets_the_last_column(x: Tensor) -> Tensor:
    """Of rows of five or more elements."""
    out = x + x
    if x.dim() == 2 and x.shape[1] >= 5:
        out = torch.cat([out[:, :-1], x[:, -1:]], dim=1)
    return out


def raises(x: Tensor) -> Tensor:
    raise ZeroDivisionError("tile of 0 rows\nsecond line")


def _sample(name: str, *shape: int, bench: bool = False) -> Sample:
    def make(device: str, dtype: torch.dtype) -> Any:
        return (torch.randn(shape, device=device, dtype=dtype).requires_grad_(),), {}

    return Sample(name, make, bench=bench)


def _arbitrary(choose: Chooser) -> Sample:
    return _sample("arbitrary", choose.integer(0, 50), choose.integer(0, 50))


OP = Op(
    name="double",
    function=double,
    eager=lambda x: x + x,
    backends=(Backend("native", ("cpu",), lambda x: None, forgets_the_last_column),),
    samples=(_sample("narrow", 7, 3), _sample("it's wide", 20, 30)),
    dtypes=(torch.float32,),
    cost=lambda passes, x: Cost(0.0, 0.0),
    arbitrary=_arbitrary,
)


@pytest.fixture(autouse=True)
def _declared(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(declare.__globals__["_table"], "double", OP)
    monkeypatch.setattr(OP, "backends", OP.backends)
    monkeypatch.chdir(tmp_path)


def failed(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[str, list[dict[str, Any]]]:
    """What is printed, and the failures of the JSON."""
    assert main(["check", "double", "--json", "found.json", *words]) == 1
    found = json.loads(Path("found.json").read_text())
    return capsys.readouterr().out, found["failures"]


def test_worst_element_of_a_tensor() -> None:
    want = torch.arange(12.0, dtype=torch.float64).view(3, 4)
    got, eager = want.float(), want.float()
    got[2, 1] = 7.5
    eager[2, 1] = 9.25
    found = check.compare("out", got, eager, want)
    assert found.worst == check.Element((2, 1), got=7.5, wanted=9.0, eager=9.25)
    assert "worst at [2, 1] got 7.5, wanted 9 (off by 1.5e+00, eager by 2.5e-01)" in str(found)
    assert check.compare("out", *[torch.tensor(1.0)] * 2, torch.tensor(2.0)).worst.index == ()  # type: ignore[union-attr]
    assert check.compare("out", *[torch.empty(0)] * 3).worst is None


def test_what_is_allowed_for_inputs_that_are_an_ulp_away() -> None:
    """Twice the usual limit, of eager's error and the move; a jump, as of ReLU, is no move."""
    want = torch.ones(100, dtype=torch.float64)
    eager, got = want.float(), want.float()
    eager[7] += 1e-5
    usual = check.compare("out", got, eager, want)
    moved = check.compare("out", got, eager, want, want + 2e-5)
    jumped = check.compare("out", got, eager, want, want + 0.5)
    assert usual.error_limit == pytest.approx(2e-5, rel=0.01)
    assert moved.error_limit == pytest.approx(4 * 3e-5, rel=0.01)
    assert jumped.error_limit == pytest.approx(4e-5, rel=0.01)


def test_worst_element_of_three_draws_is_in_its_own_tensor() -> None:
    for found in check.check_sample(OP, OP.samples[1], "native", torch.float32):
        assert not found.ok
        assert found.worst is not None
        row, column = found.worst.index
        assert 0 <= row < 20
        assert column == 29


def test_eager_attention_gives_none_of_an_empty_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """As torch 2.11 on an H200: its cuDNN attention returns before it has made an output."""
    plain = torch.nn.functional.scaled_dot_product_attention

    def cudnn(query: Tensor, *args: Any, **kwargs: Any) -> Tensor | None:
        return plain(query, *args, **kwargs) if query.numel() else None

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", cudnn)
    op = get("attention")
    for name in ("no batch", "no queries", "no keys"):
        (sample,) = (s for s in op.samples if s.name == name)
        found = check.check_sample(op, sample, "native", torch.bfloat16)
        assert {c.tensor for c in found} == {"out", "grad0", "grad1", "grad2"}
        assert all(c.ok for c in found)


def test_an_output_that_eager_lacks_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OP, "eager", lambda x: None)
    with pytest.raises(AssertionError, match="out: eager has none, only grad0"):
        check.check_sample(OP, OP.samples[0], "native", torch.float32)


@needs_hypothesis
def test_a_failure_names_element_and_smallest_call(capsys: pytest.CaptureFixture[str]) -> None:
    out, failures = failed(capsys)
    lines = out[out.index("FAILED double") :].splitlines()
    assert lines[0].startswith("FAILED double native float32 it's wide: out: max error ")
    assert lines[1].startswith("    worst at [")
    assert ", 29] got " in lines[1]
    assert "wanted" in lines[1]
    assert "eager by 0.0e+00" in lines[1]
    smallest = next(line for line in lines if "smallest" in line)
    assert "the smallest call that fails: double(float32[1, 5]): out: " in smallest
    assert lines[lines.index(smallest) + 1].startswith("    worst at [0, 4] got ")
    assert "  call: double(float32[20, 30])" in lines
    assert failures[0]["worst"]["index"][1] == 29
    assert failures[0]["smallest"]["call"] == "double(float32[1, 5])"
    assert {f["tensor"] for f in failures} == {"out", "grad0"}


def test_the_printed_command_repeats_the_failure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(OP, "arbitrary", None)
    out, (first, *_) = failed(capsys)
    printed = next(line for line in out.splitlines() if line.startswith("  replay: "))
    command = shlex.split(printed.removeprefix("  replay: "))
    assert command == shlex.split(first["replay"])
    assert command[0] == "bigops"
    assert main(command[1:]) == 1
    again = capsys.readouterr().out
    assert "1 samples checked, 2 tensors compared, 1 samples failed" in again
    worst = [line for line in out.splitlines() if line.startswith("    worst at")]
    assert [line for line in again.splitlines() if line.startswith("    worst at")] == worst


def test_triton_is_replayed_in_the_interpreter() -> None:
    from bigops.cli import failures

    case = failures.Case(OP, OP.samples[1], "triton", torch.bfloat16)
    (found,) = (
        c for c in check.check_sample(*case[:2], "native", torch.float32) if c.tensor == "out"
    )
    entry = failures.off_limit(case, found, "cuda")
    assert entry["replay"] == (
        "bigops check double --backend triton --dtype bfloat16 --case 'it'\"'\"'s wide'"
    )
    assert "  replay in Triton's interpreter: " + entry["replay"] in failures.lines([entry])


def test_a_kernel_that_raises(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    backend = Backend("native", ("cpu",), lambda x: None, raises)
    monkeypatch.setattr(OP, "backends", (backend,))
    monkeypatch.setattr(OP, "arbitrary", None)
    out, failures = failed(capsys, "--case", "narrow")
    assert "FAILED double native float32 narrow: ZeroDivisionError: tile of 0 rows\n" in out
    assert "    second line\n    raised at " in out
    assert "test_check.py:" in out
    assert "  call: double(float32[7, 3])" in out
    assert "smallest" not in out
    assert failures[0]["raised"].startswith("ZeroDivisionError: tile of 0 rows")


@needs_hypothesis
def test_shrinking_ends_when_its_time_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the last call that failed."""
    failed: list[Sample] = []

    def fails(op: Op, sample: Sample, *rest: Any) -> bool:
        wrong = real(op, sample, *rest)
        failed.extend([sample] if wrong and len(rest) == 3 else [])  # looked for, not confirmed
        return wrong

    real = shrink.fails
    monkeypatch.setattr(shrink, "fails", fails)
    end = shrink.SECONDS + 1.0
    monkeypatch.setattr(shrink.time, "monotonic", lambda: end if len(failed) == 3 else 0.0)
    found = shrink.smallest_failure(OP, "native", torch.float32, "cpu")
    assert found is failed[-1]
    assert len(failed) == 3


@needs_hypothesis
def test_nothing_is_shrunk_where_nothing_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = Backend("native", ("cpu",), lambda x: None, lambda x: x + x)
    monkeypatch.setattr(OP, "backends", (backend,))
    assert shrink.smallest_failure(OP, "native", torch.float32, "cpu") is None


def test_an_unwritten_element_is_seen(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def leaves_one_out(x: Tensor) -> Tensor:
        out = torch.empty_like(x)
        out[:, 1:] = (x + x)[:, 1:]
        return out

    backend = Backend("native", ("cpu",), lambda x: None, leaves_one_out)
    monkeypatch.setattr(OP, "backends", (backend,))
    out, _ = failed(capsys, "--case", "narrow")
    assert "got nan" in out
    assert not torch.are_deterministic_algorithms_enabled()


def test_calls_in_words() -> None:
    def make(device: str, dtype: torch.dtype) -> Any:
        return ([torch.ones(2), None], torch.ones(3, 4, dtype=dtype).mT), {"causal": True}

    words = shrink.describe(OP, Sample("x", make), torch.bfloat16)
    assert words == "double([float32[2], None], bfloat16[4, 3] strides [1, 4], causal=True)"
