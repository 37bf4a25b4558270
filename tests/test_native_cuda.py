"""The CUDA C++ kernels without a GPU: the module builds by setup.py's rules, is imported and says
why nothing runs; and calls take kernels that no GPU run has proven only where that is asked for.
"""

from __future__ import annotations

import functools
import json
import math
import runpy
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import bigops
from bigops.backends import cuda
from bigops.cli import doctor
from bigops.ledger import nvcc
from bigops.ops import attention_cuda

ROOT = Path(__file__).resolve().parents[1]
HOPPER, AMPERE = (9, 0), (8, 0)


# ---- the road of a call


@pytest.fixture
def _on_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU for which the kernels are built, as far as nothing is launched."""
    monkeypatch.setattr(cuda, "PROVEN", {})
    monkeypatch.setattr(cuda, "_why_not", functools.cache(lambda: None))
    monkeypatch.setattr(cuda, "_capability", functools.cache(lambda index: HOPPER))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)


def reason(size: int = 64, dtype: torch.dtype = torch.bfloat16) -> str | None:
    query = torch.zeros(1, 1, 4, size, dtype=dtype)
    return attention_cuda.why_not("attention", query, query, query, (), 1.0)


@pytest.mark.usefixtures("_on_hopper")
def test_unproven_kernels_serve_only_where_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "unproven on sm_90: opt in" in str(reason())
    with bigops.use_backend("native"):
        assert reason() is None
    with bigops.use_backend("triton"):
        assert "unproven" in str(reason())
    monkeypatch.setitem(cuda.PROVEN, ("attention", AMPERE), "x.json")
    assert "unproven" in str(reason())
    monkeypatch.setitem(cuda.PROVEN, ("attention", HOPPER), "x.json")
    assert reason() is None


@pytest.mark.usefixtures("_on_hopper")
def test_what_is_not_served_is_said() -> None:
    with bigops.use_backend("native"):
        assert "head sizes other than 64, 96, 128, 256" in str(reason(size=80))
        assert "float32" in str(reason(dtype=torch.float32))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_reason_is_said() -> None:
    assert "not built" in str(reason()) or "no CUDA device" in str(reason())


@pytest.mark.usefixtures("_on_hopper")
def test_dynamo_asks_and_does_not_trace() -> None:
    """It would warn of the caches, and the driver's answer would become a part of the graph."""

    def ask(t: Tensor) -> Tensor:
        return t + 2.0 * (attention_cuda.why_not("attention", t, t, t, (), 1.0) is None)

    t = torch.zeros(1, 1, 4, 64, dtype=torch.bfloat16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for forced, answer in (("native", 2.0), (None, 0.0)):
            with bigops.use_backend(forced):
                got = torch.compile(ask, backend="eager", fullgraph=True)(t)
            assert got.unique().tolist() == [answer]


@pytest.mark.usefixtures("_on_hopper")
def test_doctor_says_what_is_proven(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "SMOKE", "")
    assert doctor._try("native", "cuda").note == " (unproven: opt-in)"
    monkeypatch.setitem(cuda.PROVEN, ("attention", HOPPER), "x.json")
    assert doctor._try("native", "cuda").note == " (proven: attention; others opt-in)"
    monkeypatch.setattr(cuda, "_why_not", lambda: "no driver")
    assert doctor._try("native", "cuda").problem == "no driver"


# ---- what proves a kernel


def unsupported(op: str, capability: tuple[int, int], content: Any) -> str | None:
    """None if these results prove a kernel right and faster than Triton's, else what is missing."""
    gpu = content["machine"]["gpu"]
    if gpu is None or gpu["capability"] != "{}.{}".format(*capability):
        return "measured on another architecture"
    own = [r for r in content["records"] if r.get("op") == op and r["backend"] == "native"]
    own = [r for r in own if r["device"].startswith("cuda")]
    if not own:
        return "no record of the kernel"
    if not all(r["error"] <= r["error_limit"] for r in own if r["error"] is not None):
        return "an error above its limit"
    if all(r["error"] is None for r in own):
        return "no error was measured"
    triton = {
        (r["case"], r["pass"], r["dtype"]): r["time_ms"]
        for r in content["records"]
        if r.get("op") == op and r["backend"] == "triton"
    }
    pairs = [(r["time_ms"], triton.get((r["case"], r["pass"], r["dtype"]))) for r in own]
    logs = [math.log(ours / theirs) for ours, theirs in pairs if theirs is not None]
    if not logs:
        return "not measured beside Triton's"
    return None if sum(logs) < 0.0 else "slower than Triton's, by the geometric mean"


def results(**change: Any) -> dict[str, Any]:
    record = {
        "op": "attention", "case": "c", "pass": "forward", "device": "cuda:0", "dtype": "bfloat16",
        "backend": "native", "time_ms": 1.0, "error": 1e-3, "error_limit": 2e-3,
    }  # fmt: skip
    triton = {**record, "backend": "triton", "time_ms": 1.5}
    return {
        "machine": {"gpu": {"name": "x", "capability": "9.0"}},
        "records": [{**record, **change}, triton],
    }


def test_what_is_no_proof() -> None:
    assert unsupported("attention", HOPPER, results()) is None
    assert "architecture" in str(unsupported("attention", AMPERE, results()))
    assert "no record" in str(unsupported("adam", HOPPER, results()))
    assert "no record" in str(unsupported("attention", HOPPER, results(device="cpu")))
    assert "above its limit" in str(unsupported("attention", HOPPER, results(error=3e-3)))
    assert "above its limit" in str(unsupported("attention", HOPPER, results(error=float("nan"))))
    assert "no error" in str(unsupported("attention", HOPPER, results(error=None)))
    assert "slower" in str(unsupported("attention", HOPPER, results(time_ms=2.0)))
    assert "beside" in str(unsupported("attention", HOPPER, results(case="d")))


@pytest.mark.parametrize(("key", "file"), cuda.PROVEN.items())
def test_proofs_hold(key: tuple[str, tuple[int, int]], file: str) -> None:
    content = json.loads((ROOT / "bench" / "results" / file).read_text())
    assert unsupported(*key, content) is None


# ---- the module without a GPU


@pytest.fixture(scope="module")
def built() -> Path:
    """The module, by setup.py's rules for ninja, which compiles only what has changed."""
    setup = runpy.run_path(str(ROOT / "setup.py"), run_name="setup")
    folder = ROOT / "build" / "test-cuda"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "build.ninja").write_text(setup["ninja_file"]("g++", [], "", cuda=True))
    file = folder / setup["module_file"]("_native_cuda")
    subprocess.run(["ninja", "-C", str(folder), file.name], check=True)
    return file


IMPORT = """
import importlib.util, sys, torch
spec = importlib.util.spec_from_file_location("bigops._native_cuda", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
print(module.why_not())
"""
# On CPU tensors: what is wrong with a call is said before its device is.
CALLS = """
t = torch.zeros(1, 2, 8, 64, dtype=torch.bfloat16)
right = dict(
    query=t, key=t, value=t, out=t, lse=torch.zeros(1, 2, 8), scale=1.0, offset=0, left=-1,
    right=-1, softcap=0.0, packed=None, workspace=torch.zeros(16, dtype=torch.uint8),
)
starts = torch.zeros(3, dtype=torch.int32)
for change in (
    {},
    {"query": t.half()},
    {"key": t[:, :1], "value": t},
    {"key": t.expand(2, 2, 8, 64)},
    {"key": torch.zeros(1, 3, 8, 64, dtype=t.dtype)},
    {"value": torch.zeros(1, 2, 8, 65, dtype=t.dtype)[..., :64]},
    {"out": torch.zeros(1, 2, 64, 8, dtype=t.dtype).transpose(2, 3)},
    {"out": torch.zeros(1025, dtype=t.dtype)[1:].view(t.shape)},
    {"out": t[0]},
    {"lse": torch.zeros(1, 2, 7)},
    {"lse": torch.zeros(1, 2, 8, dtype=torch.float64)},
    {"workspace": torch.zeros(15, dtype=torch.uint8)},
    {"packed": (starts, starts[:2], 8, 8)},
    {"packed": (starts.long(), starts.long(), 8, 8)},
    {"query": t.as_strided(t.shape, (1, 512, 64, 1))},  # of a single batch: any stride will do
):
    try:
        module.attention_forward_sm80(**{**right, **change})
    except ValueError as error:
        print(error)
"""
ERRORS = [
    "tensors must be on a CUDA device",
    "attention: tensors differ in dtype",
    "attention: tensors differ in shape",
    "attention: tensors differ in shape",
    "attention: key's heads must divide query's",
    *["attention: rows must lie in pieces of 16 bytes"] * 3,
    "attention: tensors differ in shape",
    *["attention: lse must be a contiguous float32 tensor, a number for each row of query"] * 2,
    "attention: workspace must be that many uint8, aligned to 16 bytes",
    *["attention: cu_seqlens must be two contiguous int32 tensors of one length"] * 2,
    "tensors must be on a CUDA device",
]


@pytest.mark.slow
@pytest.mark.skipif(nvcc.nvcc_version() is None, reason="nvcc is not installed")
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_module_is_imported_and_says_what_is_wrong(built: Path) -> None:
    command = [sys.executable, "-c", IMPORT + CALLS, str(built)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    why, *errors = done.stdout.splitlines()
    assert why.startswith(("no CUDA driver", "no CUDA device", "the driver knows CUDA"))
    assert errors == ERRORS
