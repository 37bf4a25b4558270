"""`bigops inspect`: entries, machine code, differences, ops declared elsewhere, wrong words."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("triton")

from bigops.backends import triton
from bigops.cli import main
from bigops.ledger import difference, entries, nvcc
from bigops.ledger.entries import Entry
from bigops.ops import declare

ONE = ["attention", "--arch", "sm_90", "--call", "64, causal, bf16, forward"]

ELSEWHERE = '''
"""An op as someone declares it outside bigops: no configurations, its launcher apart."""
import torch
from bigops.ops import Backend, Cost, Op, Sample, declare, is_fast
from torch import Tensor


def reference(x: Tensor) -> Tensor:
    return 2 * x


def doubled(x: Tensor) -> Tensor:
    return OP.call(x) if is_fast(OP, (x,)) else reference(x)


def _sample(name: str, *shape: int, **kind: bool) -> Sample:
    return Sample(name, lambda device, dtype: ((torch.randn(
        shape, device=device, dtype=dtype, requires_grad=True),), {}), **kind)


OP = declare(
    Op(
        name="doubled",
        function=doubled,
        eager=reference,
        schema="(Tensor x) -> Tensor",
        backward_schema="(Tensor grad_out, Tensor x) -> Tensor",
        fake=torch.empty_like,
        backward_fake=lambda grad_out, x: torch.empty_like(x),
        backends=(Backend.triton("doubled_kernels"),),
        samples=(_sample("odd", 3, 1021), _sample("large", 64, 4096, bench=True)),
        cost=lambda passes, x: Cost(x.numel(), 2 * x.nbytes),
    )
)
'''
KERNELS = """
import torch
import triton
import triton.language as tl


@triton.jit
def doubled_kernel(x_ptr, out_ptr, numel, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs, mask=offs < numel)
    tl.store(out_ptr + offs, BODY, mask=offs < numel)


def forward(x):
    out = torch.empty_like(x)
    doubled_kernel[(triton.cdiv(x.numel(), 1024),)](
        x, out, x.numel(), BLOCK=1024, enable_fp_fusion=True
    )
    return out


def backward(grad_out, x):
    return forward(grad_out)
"""


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of an op called `doubled`, which is in the table meanwhile."""
    folder = tmp_path_factory.mktemp("elsewhere")
    (folder / "doubled_op.py").write_text(ELSEWHERE)
    sys.path.insert(0, str(folder))
    name = importlib.import_module("doubled_op").OP.name
    yield folder
    sys.path.remove(str(folder))
    del sys.modules[declare.__module__]._table[name]


@pytest.fixture
def doubled(elsewhere: Path, request: pytest.FixtureRequest) -> None:
    """That op; the parameter is what its kernel stores."""
    body = getattr(request, "param", "2 * x")
    (elsewhere / "doubled_kernels.py").write_text(KERNELS.replace("BODY", body))


def rows(text: str) -> list[list[str]]:
    """The cells of the printed tables."""
    return [line.split() for line in text.splitlines() if line.startswith("  ")]


def test_entry_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", *ONE]) == 0
    header, row = rows(capsys.readouterr().out)
    assert header[:2] == ["kernel", "call"]
    assert row[0] == "forward_kernel"
    assert any(cell.startswith("wgmma:") for cell in row)
    assert "registers," in row  # and shared memory
    assert "BLOCK_N=128" in row


def test_kernel_function_is_a_word(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "squares_kernel", "--arch", "gfx950", "--op", "grad_norm"]) == 0
    kernels = {row[0] for row in rows(capsys.readouterr().out)[1:]}
    assert kernels == {"squares_kernel"}


def test_summary_has_every_kernel(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect"]) == 0
    printed = capsys.readouterr().out
    for entry in entries.all_recorded():
        assert f"  {entry.kernel} " in printed


@pytest.mark.parametrize(
    ("option", "instruction"),
    [("--sass", "HGMMA"), pytest.param("--ptx", "wgmma.mma", marks=pytest.mark.slow)],
)
def test_machine_code(option: str, instruction: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", *ONE, option]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("// forward_kernel: attention 64, causal, bf16, forward\n")
    assert instruction in printed


def test_assembly_of_amd(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "squares_kernel", "--arch", "gfx942", "--sass", "--call", "bf16"]) == 0
    assert "s_endpgm" in capsys.readouterr().out


def test_json_and_difference(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved = tmp_path / "saved.json"
    assert main(["inspect", *ONE, "--json", str(saved)]) == 0
    content = json.loads(saved.read_text())
    (entry,) = content["entries"]
    assert entry["matrix"].startswith("wgmma:")
    assert 0 < entry["occupancy"]["percent"] <= 100
    assert main(["inspect", *ONE, "--diff", str(saved)]) == 0
    assert "1 entries, 0 changed, 0 worse" in capsys.readouterr().out
    entry["registers"] -= 8
    saved.write_text(json.dumps(content))
    assert main(["inspect", *ONE, "--diff", str(saved)]) == 0
    printed = capsys.readouterr().out
    assert f"registers {entry['registers']} -> {entry['registers'] + 8}" in printed
    entry["matrix"] = "tcgen05:4"
    saved.write_text(json.dumps(content))
    assert main(["inspect", *ONE, "--diff", str(saved)]) == 1
    assert "lost a matrix instruction" in capsys.readouterr().out


def recorded() -> Entry:
    """An entry of bfloat16 on wgmma."""
    return next(e for e in entries.all_recorded() if e.wants == "wgmma" and e.dtype == "bf16")


@pytest.mark.parametrize(
    ("change", "words", "worse"),
    [
        ({"spills": 16}, "spills 0 -> 16", ["spills"]),
        ({"matrix": "mma:8"}, "-> mma:8", ["lost a matrix instruction"]),
        ({"registers": 255}, "-> 255", ["lower occupancy"]),
        ({"load": 32}, "load 128 -> 32", []),
        ({"tf32": True}, "TF32 appears", []),
        ({"key": "0"}, "", []),
    ],
)
def test_difference_of_an_entry(change: dict[str, int], words: str, worse: list[str]) -> None:
    old = replace(recorded(), registers=64, shared=1024)
    found = difference.changes([old], [replace(old, **change)])
    if not words:
        assert found == []
        return
    assert words in "; ".join(found[0].words)
    assert found[0].worse == worse


def test_difference_names_new_and_gone_entries() -> None:
    old = recorded()
    new = replace(old, call="another")
    words = [change.words for change in difference.changes([old], [new])]
    assert words == [["new"], ["gone"]]


@pytest.mark.usefixtures("doubled")
def test_op_declared_elsewhere_needs_no_further_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "doubled", "--arch", "sm_90"]) == 0
    found = rows(capsys.readouterr().out)[1:]
    assert {row[0] for row in found} == {"doubled_kernel"}
    assert {"forward"} <= {word for row in found for word in row}
    assert {"fp32", "bf16", "fp16"} <= {word for row in found for word in row}
    assert main(["inspect", "doubled_kernel", "--arch", "gfx942", "--call", "large, bf16"]) == 0


@pytest.mark.usefixtures("doubled")
@pytest.mark.parametrize(
    "doubled",
    ["tl.reshape(tl.dot(tl.reshape(x, (32, 32)), tl.reshape(x, (32, 32))), (1024,))"],
    indirect=True,
)
def test_broken_rule_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    """tl.dot's own default is TF32."""
    assert main(["inspect", "doubled", "--arch", "sm_90", "--call", "large, fp32"]) == 1
    assert "TF32 although torch's flags do not allow it" in capsys.readouterr().out


@pytest.mark.usefixtures("doubled")
@pytest.mark.parametrize("doubled", ["x + 'text'"], indirect=True)
def test_kernel_that_does_not_compile_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "doubled", "--arch", "sm_90", "--call", "large, fp32"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "doubled_kernel (doubled: large, fp32) on sm_90: " in line


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nothing"], "unknown op or kernel 'nothing'; known: adam"),
        (["--arch", "sm_70"], "unknown GPU 'sm_70'; known: sm_80"),
        (["--op", "nothing"], "unknown op 'nothing'"),
        (["adam", "--call", "nothing"], "no kernel matches these words"),
        (["--sass"], "--sass and --ptx need a KERNEL or --op"),
        (["--update", "adam"], "--update goes alone"),
        (["--diff", "/nothing/there"], "--diff /nothing/there: No such file"),
        (["--diff", __file__], f"--diff {__file__}: not a file of the ledger"),
        (["adam", "--json", "/nothing/there"], "--json"),
    ],
)
def test_wrong_words_get_one_line(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("bigops inspect: ")
    assert said in line


def test_without_triton_one_line_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(triton, "INSTALLED", False)
    assert main(["inspect", *ONE, "--sass"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "bigops inspect: compiling needs triton, which is not installed"
    # What is recorded can still be read.
    assert main(["inspect", *ONE]) == 0


REPORT = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z4sumsPf' for 'sm_90'
ptxas info    : Function properties for _Z4sumsPf
    16 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 41 registers, used 1 barriers, 2048 bytes smem, 400 bytes cmem[0]
ptxas info    : Compiling entry function '_Z4normPf' for 'sm_90'
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 24 registers, used 0 barriers
"""


def test_report_of_ptxas(tmp_path: Path) -> None:
    source = tmp_path / "sums_sm90.cu"
    source.write_text('#include "sums.h"\nint x;  // one\n')
    (tmp_path / "sums.h").write_text("int y;\n")
    key = nvcc.source_key(source)
    sums, norm = nvcc.ptxas_report(REPORT, source)
    assert sums == nvcc.CudaKernel("sums_sm90.cu", "_Z4sumsPf", "sm_90", key, 41, 20, 2048)
    assert (norm.registers, norm.spills, norm.shared) == (24, 0, 0)
    assert sums.op == "sums"
    assert replace(sums, source="attention_backward_sm80.cu").op == "attention"
    assert replace(sums, source="attention_backward_prepare.cu").op == "attention"
    source.write_text('#include "sums.h"\nint   x;\n')
    assert nvcc.source_key(source) == key
    (tmp_path / "sums.h").write_text("int z;\n")
    assert nvcc.source_key(source) != key


def test_cuda_kernels_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "adam", "--arch", "sm_90"]) == 0
    assert "adam_kernel<float, void, false, " in capsys.readouterr().out
