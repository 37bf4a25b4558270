"""Rung 4 of the ladder: the compile ledger is of these kernels and breaks no rule; what it covers
is in test_ledger_cover.py.

The default run compiles what changed since kernels/ledger was written, and a sample; `-m slow` all.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import itertools
import linecache
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from bigops.kernels import attention_configurations as attention
from bigops.kernels import hardware
from bigops.ledger import compiling, difference, entries, files, rules
from bigops.ledger.architectures import ARCHITECTURES, occupancy
from bigops.ledger.entries import Entry
from bigops.ledger.launches import Launch
from bigops.ledger.machine_code import wanted, widest
from bigops.ledger.source import source_hash

TRITON = importlib.metadata.version("triton")
RECORDED = entries.recorded()
ENTRIES = [entry for _, found in RECORDED.values() for entry in found]
# Another version of Triton makes other code: it is held to the rules alone.
SAME_TRITON = {version for version, _ in RECORDED.values()} == {TRITON}
UPDATE = "run `bigops inspect --update`"


@pytest.fixture(scope="module")
def planned() -> list[Launch]:
    """What the kernels of this source tree launch."""
    return compiling.plan(files.own_ops())


def sample(found: Sequence[Launch]) -> list[Launch]:
    """A launch of each kernel, on one GPU after the other."""
    targets = itertools.cycle(ARCHITECTURES)
    chosen = []
    for kernel in sorted({launch.kernel for launch in found}):
        target = next(targets)
        ours = [x for x in found if x.kernel == kernel and x.target == target]
        chosen.append(next((x for x in ours if x.dtype == "bf16"), ours[0]))
    return chosen


def name_of(launch: Launch) -> entries.Name:
    """As Entry.name; launch.key is not enough where ops share a kernel."""
    return launch.kernel, launch.op, launch.call, launch.dtype, launch.step, launch.target


def entry_of(launch: Launch) -> Entry:
    found = [e for e in ENTRIES if e.name == name_of(launch)]
    assert found, f"no entry of {' '.join(name_of(launch))}: {UPDATE}"
    return found[0]


def meta(entry: Entry) -> dict[str, str]:
    return dict(word.split("=") for word in entry.config.split())


def differences(compiled: Sequence[Entry]) -> list[str]:
    now = {entry.name: entry for entry in compiled}
    old = [entry for entry in ENTRIES if entry.name in now]
    found = difference.changes(old, compiled)
    return [f"{' '.join(change.name)}: {'; '.join(change.words)}" for change in found]


def test_files_read_as_they_are_written() -> None:
    assert set(RECORDED) == {
        "adam", "attention_backward", "attention_extras", "attention_forward", "batch_norm_act",
        "combine_attention", "conv2d", "conv2d_act", "conv2d_relu_max_pool2d", "conv2d_weight",
        "decode_attention", "grad_norm", "max_pool2d", "sgd",
    }  # fmt: skip
    for name, (version, found) in RECORDED.items():
        text = (entries.folder() / f"{name}.txt").read_text()
        assert entries.written(f"{name}.py", version, found) == text, f"{name}.txt: {UPDATE}"
        assert len({entry.name for entry in found}) == len(found)


def test_no_rule_is_broken_without_a_reason() -> None:
    complaints = rules.complaints(ENTRIES)
    assert not complaints, "\n".join(complaints)


def test_every_reason_is_needed() -> None:
    for reason in rules.REASONS:
        excused = [
            entry
            for entry in ENTRIES
            if reason.rule in rules.broken(entry) and reason.covers(reason.rule, entry)
        ]
        assert excused, reason


def fills_threads(entry: Entry) -> bool:
    """Whether a gathered tile of the weight's gradient has 16 bytes for each thread.

    TF32's are left out: Triton lays them out as the product wants its operands.
    """
    words = meta(entry)
    elements = int(words["BLOCK_P"]) * max(int(words["BLOCK_J"]), int(words["BLOCK_F"]))
    size = 4 if entry.dtype == "fp32" else 2
    return entry.dtype != "tf32" and elements * size >= 16 * 32 * entry.warps


def test_loads_are_wide_where_rows_allow_it() -> None:
    """Where 16 neighbours or more lie in a row that starts at a multiple of 16 bytes."""
    wide = {
        "adam_kernel": lambda e: "ALIGNED=1" in e.config,
        "sgd_kernel": lambda e: "ALIGNED=1" in e.config,
        "squares_kernel": lambda e: "ALIGNED=1" in e.config,
        "conv_kernel": lambda e: "channels_last" in e.call,
        # For TF32 operands Triton lays out this gather's tiles as the product wants them.
        "weight_grad_kernel": lambda e: (
            "channels_last" in e.call and e.dtype != "tf32" and bytes_a_thread(e) >= 16
        ),
    }
    # Of sinks' gradient a program reads lines of numbers that start anywhere.
    attention_kernels = {e.kernel for e in ENTRIES if e.op == "attention"} - {"grad_sinks_kernel"}
    wide |= dict.fromkeys(attention_kernels, lambda e: "33/20" not in e.call)
    judged = [e for e in ENTRIES if e.kernel in wide and wide[e.kernel](e)]
    assert len(judged) > 500
    assert not [e.name for e in judged if rules.narrow(e)]


DESCRIBING = {
    "forward_kernel", "refine_kernel", "grad_query_kernel", "grad_key_value_kernel",
    "grad_bias_kernel",
}  # fmt: skip


def test_attention_reads_by_descriptors_where_a_gpu_has_them() -> None:
    """Where rows start at multiples of 16 bytes; IEEE products take operands from registers."""
    judged = [e for e in ENTRIES if e.kernel in DESCRIBING]
    for entry in judged:
        packed_bias = entry.kernel == "grad_bias_kernel" and entry.op == "varlen_attention"
        wanted = entry.target in ("sm_90", "sm_100") and "33/20" not in entry.call
        wanted = wanted and entry.dtype != "fp32" and not packed_bias
        assert meta(entry)["DESCRIBED"] == str(int(wanted)), entry.name
    assert {e.kernel for e in judged} == DESCRIBING


def test_convolution_reads_boxes_where_a_gpu_has_descriptors() -> None:
    """Of channels_last images, stride 1, and more than the fewest steps."""
    judged = [e for e in ENTRIES if e.kernel == "conv_kernel" and "channels_last" in e.call]
    judged = [e for e in judged if "3x3" in e.call and "stride" not in e.call]
    for entry in judged:
        wanted = entry.target in ("sm_90", "sm_100") and entry.dtype != "fp32"
        assert (meta(entry)["BOX_W"] != "0") == wanted, entry.name
    assert len(judged) > 100
    others = [e for e in ENTRIES if "BOX_W" in meta(e) and "channels_last" not in e.call]
    assert {meta(entry)["BOX_W"] for entry in others} == {"0"}


def test_descriptors_load_by_tma(planned: list[Launch]) -> None:
    found = [x for x in planned if (x.dtype, x.target) == ("bf16", "sm_90")]
    chosen = {x.kernel: x for x in found if x.call == "128, bias" and x.kernel in DESCRIBING}
    assert set(chosen) == DESCRIBING
    boxes = {(x.kernel, "BOX_H=1 " in x.config): x for x in found if " BOX_W=0" not in x.config}
    boxes = {key: x for key, x in boxes.items() if "BOX_W" in x.config}
    assert {kernel for kernel, _ in boxes} == {"conv_kernel", "weight_grad_kernel"}
    for code in compiling.code([*chosen.values(), *boxes.values()], "sass"):
        assert "UTMALDG" in code


def bytes_a_thread(entry: Entry) -> int:
    """What a thread loads of the larger of a weight gradient's tiles."""
    block = {name: int(size) for name, size in re.findall(r"BLOCK_(\w)=(\d+)", entry.config)}
    tile = max(block["J"], block["F"]) * block["P"] * (4 if entry.dtype == "fp32" else 2)
    return tile // (32 * entry.warps)


def test_ledger_is_of_these_kernels(planned: list[Launch]) -> None:
    """What changed is compiled and told."""
    version = None if not SAME_TRITON else TRITON
    comparison = files.compare(planned, version)
    if comparison.changed:
        compiled = compiling.compile_all(comparison.changed[:60])
        told = [*differences(compiled)[:20], *rules.complaints(compiled)]
        total = len(comparison.changed)
        pytest.fail("\n".join([f"{total} entries are of other kernels: {UPDATE}", *told]))
    names = {name_of(launch) for launch in planned}
    gone = [entry.name for entry in ENTRIES if entry.name not in names]
    assert not gone, f"{gone[:5]}: {UPDATE}"


def check_compiled(found: Sequence[Launch]) -> None:
    compiled = compiling.compile_all(found)
    complaints = rules.complaints(compiled, spare=0 if SAME_TRITON else rules.FEW)
    assert not complaints, "\n".join(complaints)
    if not SAME_TRITON:
        return
    for launch, entry in zip(found, compiled, strict=True):
        assert entry == entry_of(launch)


def test_a_sample_compiles_to_what_is_recorded(planned: list[Launch]) -> None:
    check_compiled(sample(planned))


@pytest.mark.slow
@pytest.mark.parametrize("target", ARCHITECTURES)
def test_all_compile_to_what_is_recorded(planned: list[Launch], target: str) -> None:
    check_compiled([launch for launch in planned if launch.target == target])


# ---- the parts ----


def test_pretend_answers_for_the_hardware() -> None:
    x = torch.empty(1)
    assert hardware.of(x).interpreted
    with hardware.pretend(hardware.Hardware("sm_90", 132, 227 << 10)):
        assert hardware.of(x).arch == "sm_90"
        with hardware.pretend(hardware.Hardware("gfx942", 304, 64 << 10)):
            assert attention.config_row(x.bfloat16()) == "sm86"
        assert attention.config_row(x.bfloat16()) == "sm90"
    assert hardware.of(x) is hardware.INTERPRETED


@pytest.mark.parametrize(
    ("target", "registers", "shared", "warps", "programs", "percent", "limit"),
    [
        ("sm_80", 32, 0, 8, 8, 100, "registers, warps"),
        ("sm_80", 64, 0, 8, 4, 50, "registers"),
        ("sm_80", 81, 0, 4, 5, 31, "registers"),  # given out in eights
        ("sm_80", 32, 80 << 10, 8, 2, 25, "shared memory"),
        ("sm_80", 32, 82 << 10, 8, 1, 12, "shared memory"),  # 82 KB and 1 KB of the system's
        ("sm_86", 40, 0, 4, 12, 100, "registers, warps"),
        ("sm_90", 255, 0, 8, 1, 12, "registers"),
        ("sm_90", 16, 0, 1, 32, 50, "programs"),
        ("gfx942", 128, 0, 4, 4, 50, "registers"),
        ("gfx942", 256, 80 << 10, 8, 0, 0, "shared memory"),
    ],
)
def test_occupancy(
    target: str, registers: int, shared: int, warps: int, programs: int, percent: int, limit: str
) -> None:
    found = occupancy(ARCHITECTURES[target], registers, shared, warps)
    assert (found.programs, found.percent, found.limit) == (programs, percent, limit)


def test_occupancy_knows_tensor_memory() -> None:
    found = occupancy(ARCHITECTURES["sm_100"], 64, 0, 4, tensor_memory=256)
    assert (found.programs, found.limit) == (2, "tensor memory")


@pytest.mark.parametrize(
    ("suffixes", "bits"),
    [([], 0), (["E", "E.U8"], 32), (["E.U16"], 16), (["E.64", "E.128.CONSTANT"], 128),
     (["E.BYPASS.LTC128B.128"], 128), (["E.LTC128B.64"], 64), (["E.ENL2.256"], 256)],
)  # fmt: skip
def test_widest_access(suffixes: list[str], bits: int) -> None:
    assert widest(suffixes) == bits


def product(rows: int, kind: str, precision: str = "") -> str:
    said = f", inputPrecision = {precision}" if precision else ""
    shapes = f"tensor<{rows}x32x{kind}> * tensor<32x64x{kind}> -> tensor<{rows}x64xf32>"
    return f"%a = tt.dot %x, %y, %z{said} : {shapes} loc(#loc1)"


@pytest.mark.parametrize(
    ("ttir", "target", "warps", "kind"),
    [
        (product(128, "bf16"), "sm_80", 8, "mma"),
        (product(128, "bf16"), "sm_90", 8, "wgmma"),
        (product(32, "bf16"), "sm_90", 8, "mma"),
        (product(128, "f16"), "sm_90", 2, "mma"),
        (product(32, "bf16") + "\n" + product(64, "bf16"), "sm_90", 4, "wgmma"),
        (product(128, "bf16"), "sm_100", 8, "tcgen05"),
        (product(128, "f32"), "sm_90", 8, ""),
        (product(128, "f32", "tf32"), "sm_90", 8, "wgmma"),
        (product(128, "f32"), "gfx942", 8, "mfma"),
        ("%a = tt.load %x", "gfx942", 8, ""),
    ],
)
def test_wanted_matrix_instruction(ttir: str, target: str, warps: int, kind: str) -> None:
    assert wanted(ttir, ARCHITECTURES[target], warps) == kind


def clean(target: str) -> Entry:
    """An entry with products that breaks no rule."""
    return next(
        e for e in ENTRIES if e.target == target and e.wants and not e.tf32 and not rules.broken(e)
    )


@pytest.mark.parametrize(
    ("rule", "change"),
    [
        ("spills", {"spills": 40}),
        ("spills", {"spills": 8, "in_loops": 2}),
        ("shared", {"shared": 228 << 10}),
        ("matrix", {"matrix": "mma:4"}),
        ("matrix", {"matrix": ""}),
        ("tf32", {"tf32": True}),
    ],
)
def test_rules(rule: str, change: dict[str, Any]) -> None:
    entry = clean("sm_90")
    spoiled = replace(entry, **change)
    assert not rules.complaints([entry])
    assert list(rules.broken(spoiled)) == [rule]
    assert len(rules.complaints([spoiled])) == 1
    reason = rules.Reason(rule, "a test", entry.kernel, target="sm_90")
    assert not rules.complaints([spoiled], [reason])
    assert rules.complaints([spoiled], [replace(reason, target="sm_80")])


KERNEL = '''
import triton
import triton.language as tl

FACTOR = tl.constexpr(2.0)

@triton.jit
def helper(x):
    return x * FACTOR

@triton.jit
def kernel(x_ptr, BLOCK: tl.constexpr):
    """Doubles."""
    offs = tl.arange(0, BLOCK)  # neighbours
    tl.store(x_ptr + offs, helper(tl.load(x_ptr + offs)))
'''


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="nothing is compiled there")
def test_source_hash_is_of_the_meaning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # edits come faster than its clock ticks

    def hash_of(edit: Callable[[str], str]) -> str:
        (tmp_path / "doubling.py").write_text(edit(KERNEL))
        sys.modules.pop("doubling", None)
        importlib.invalidate_caches()
        linecache.clearcache()
        return source_hash(importlib.import_module("doubling").kernel)

    plain = hash_of(lambda text: text)
    for edit in (
        lambda text: text.replace("# neighbours", "# others"),
        lambda text: text.replace('    """Doubles."""\n', ""),
        lambda text: text.replace("tl.arange(0, BLOCK)", "tl.arange(\n        0, BLOCK\n    )"),
    ):
        assert hash_of(edit) == plain
    for edit in (
        lambda text: text.replace("2.0", "3.0"),
        lambda text: text.replace("x * FACTOR", "x / FACTOR"),
        lambda text: text.replace("helper(tl", "-helper(tl"),
    ):
        assert hash_of(edit) != plain
