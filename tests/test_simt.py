"""Rung 5 of the ladder: the CPU model that runs CUDA C++ kernels. What CUDA's words mean, and every
mistake it has to find, each in a small kernel of tests/cuda/core_*.cu; test_simt_instructions.py
has the device header's instructions.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from bigops import simt
from bigops.simt import symbols

CUDA = Path(__file__).with_name("cuda")
RIGHT, WRONG = CUDA / "core_right.cu", CUDA / "core_wrong.cu"
BUILDS = ("plain", "race", "address")
ORDERS = ("forward", "reverse", "shuffled")

pytestmark = pytest.mark.skipif(simt.why_not() is not None, reason=str(simt.why_not()))


def right(build: str = "race") -> simt.Module:
    return simt.compile(RIGHT, build)


# ---- What the words mean


@pytest.mark.parametrize("build", BUILDS)
def test_every_thread_knows_where_it_is(build: str) -> None:
    grid, block = (3, 2, 2), (4, 3, 5)
    out = torch.full((12, 60, 6), -1, dtype=torch.int32)
    assert not right(build).launch("where_am_i", grid=grid, block=block, args=[out])
    blocks = torch.cartesian_prod(*(torch.arange(n) for n in reversed(grid))).flip(1)
    threads = torch.cartesian_prod(*(torch.arange(n) for n in reversed(block))).flip(1)
    assert torch.equal(out[:, :, :3], blocks[:, None].expand(12, 60, 3).int())
    assert torch.equal(out[:, :, 3:], threads[None].expand(12, 60, 3).int())


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize(
    ("kernel", "dtype", "threads"),
    [("sum_rows<float, 128>", torch.float32, 128), ("sum_rows<__half, 96>", torch.float16, 96)],
)
def test_a_template_by_its_name(build: str, kernel: str, dtype: torch.dtype, threads: int) -> None:
    x = torch.randint(-8, 9, (5, 201)).to(dtype)  # sums of whole numbers are exact in any order
    out = torch.zeros(5)
    assert not right(build).launch(kernel, grid=5, block=threads, args=[x, out, 201])
    assert torch.equal(out, x.float().sum(1))


@pytest.mark.parametrize("build", BUILDS)
def test_a_function_that_launches(build: str) -> None:
    x, out = torch.randint(-8, 9, (7, 33)).float(), torch.zeros(7)
    assert not right(build).call("rows_of", x, out)
    assert torch.equal(out, x.sum(1))
    with pytest.raises(RuntimeError, match="out has another number of rows"):
        right(build).call("rows_of", x, torch.zeros(6))


@pytest.mark.parametrize("order", ORDERS)
def test_words_of_a_warp(order: str) -> None:
    out = torch.full((16, 32), -1, dtype=torch.int32)
    assert not right().launch("words_of_a_warp", grid=1, block=32, args=[out], order=order)
    lane = torch.arange(32)
    x = 100 + 7 * lane
    segment = lane // 8 * 8
    up8, down16 = (lane - 2 >= segment), (lane + 1 < lane // 16 * 16 + 16)
    # The programming guide: a source in a later segment leaves the lane its own value.
    across = lane ^ 12
    wanted = [
        x[5].expand(32),
        x[31 - lane],
        x[segment + (lane + 3) % 8],
        torch.where(lane >= 3, x.roll(3), x),
        torch.where(up8, x.roll(2), x),
        torch.where(lane < 28, x.roll(-4), x),
        torch.where(down16, x.roll(-1), x),
        x[lane ^ 9],
        torch.where(across < segment + 8, x[across], x),
        torch.tensor(sum(1 << i for i in range(0, 32, 3)) - (1 << 32) * (31 % 3 == 0)).expand(32),
        torch.ones(32),
        torch.zeros(32),
        x.sum().expand(32),
        x.max().expand(32),
        torch.where(lane < 16, x[lane ^ 1], -1),
        torch.ones(32),
    ]
    for row, (got, want) in enumerate(zip(out, wanted, strict=True)):
        assert torch.equal(got, want.int()), f"row {row}: {got} instead of {want}"


@pytest.mark.parametrize("order", ORDERS)
def test_atomics(order: str) -> None:
    x = torch.randint(0, 64, (3001,), dtype=torch.int32)
    out, greatest = torch.zeros(64, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    args = [x, 3001, out, greatest]
    assert not right().launch("histogram", grid=5, block=96, args=args, order=order)
    assert torch.equal(out, torch.bincount(x, minlength=64).int())
    assert greatest.item() == 3000


@pytest.mark.parametrize("order", ORDERS)
def test_fences_and_atomics_order_blocks(order: str) -> None:
    x, out = torch.randint(-9, 10, (200,)).float(), torch.zeros(1)
    sums, finished = torch.zeros(7), torch.zeros(1, dtype=torch.int32)
    args = [x, 200, sums, finished, out]
    assert not right().launch("sum_of_all", grid=7, block=32, args=args, order=order)
    assert out.item() == x.sum().item()


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("kernel", ["handed_over", "polled"])
def test_a_flag_orders_two_warps(kernel: str, order: str) -> None:
    out = torch.zeros(1, dtype=torch.int32)
    assert not right().launch(kernel, grid=1, block=64, args=[out], order=order)
    assert out.item() == 17


@pytest.mark.parametrize("build", BUILDS)
def test_dynamic_shared_memory(build: str) -> None:
    x, y = torch.randn(100, 4), torch.zeros(100, 4)
    args = [x, y, 100]
    assert not right(build).launch("through_dynamic", grid=1, block=64, args=args, shared=1600)
    assert torch.equal(y, x.flip(0))


def test_16_bit_floats() -> None:
    bits = torch.arange(-(2**15), 2**15).to(torch.int16)
    bf16, f16 = bits.view(torch.bfloat16), bits.view(torch.float16)
    wide_b, wide_h = torch.zeros(2**16), torch.zeros(2**16)
    module = simt.compile(RIGHT)
    args = [bf16, f16, wide_b, wide_h, 2**16]
    assert not module.launch("widen", grid=2**8, block=2**8, args=args)
    assert torch.equal(wide_b.nan_to_num(7.0), bf16.float().nan_to_num(7.0))
    assert torch.equal(wide_h.nan_to_num(7.0), f16.float().nan_to_num(7.0))
    # Random bits, and what lies halfway between two neighbours.
    x = torch.randint(-(2**31), 2**31, (2**15,)).to(torch.int32).view(torch.float32)
    half = (bf16[::4].float().view(torch.int32) + 0x8000).view(torch.float32)
    x = torch.cat([x, half, (f16.float()[1:] + f16.float()[:-1])[::4] / 2])
    n = x.numel()
    narrow_b, narrow_h = torch.zeros(n, dtype=torch.bfloat16), torch.zeros(n, dtype=torch.float16)
    args = [x, narrow_b, narrow_h, n]
    assert not module.launch("narrow", grid=-(-n // 256), block=256, args=args)
    for got in (narrow_b, narrow_h):
        want = x.to(got.dtype)
        assert torch.equal(got.nan_to_num(7.0), want.nan_to_num(7.0))


def test_many_arguments() -> None:
    out = torch.zeros(2, dtype=torch.float64)
    args = [1, 2**40, 0.5, 0.25, True, 3, -7, 11, -(2**41), 1.5, 13, out]
    assert not right().launch("many_arguments", grid=1, block=2, args=args)
    assert out.tolist() == [float(sum(args[:-1]))] * 2


# ---- What is found

INT = torch.int32
# By kernel: the kind, how many of its lines are named, and what else the message says.
MISTAKES: dict[str, tuple[str, int, str]] = {
    "race_shared": ("race", 2, "__shared__ tile"),
    "race_within_a_warp": ("race", 2, "__shared__ tile"),
    "race_overwrites": ("race", 2, "__shared__ tile"),
    "race_global": ("race", 2, "argument 0, byte 0 of 256"),
    "race_of_bytes": ("race", 1, "argument 0"),
    "race_beside_syncwarp": ("race", 2, "__shared__ tile"),
    "race_without_fence": ("race", 2, "__shared__ value"),
    "race_without_second_fence": ("race", 2, "__shared__ value"),
    "race_plain_beside_atomic": ("race", 2, "argument 0, byte 0"),
    "race_of_blocks": ("race", 1, r"block \(\d, 0, 0\) writes"),
    "race_of_blocks_without_fence": ("race", 2, "argument 0"),
    "race_of_a_copy": ("race", 2, "asynchronous work writes"),
    "never_written": ("never written", 1, "__shared__ tile, byte 252 of 256 is read by thread 63"),
    "never_written_dynamic": ("never written", 1, "dynamic shared memory, byte 0 of 256"),
    "reads_past_the_end": ("out of bounds", 1, "reading 4 bytes.*argument 0, byte 256 of 256"),
    "writes_before_the_start": ("out of bounds", 1, "writing 4 bytes.*argument 0, byte -4 of 256"),
    "reads_past_shared": ("out of bounds", 1, "dynamic shared memory, byte 256 of 256"),
    "copies_past_the_end": ("out of bounds", 1, "reading 320 bytes"),
    "misaligned": ("misaligned", 1, "reading 16 bytes.*argument 0, byte 4"),
    "barrier_after_exit": ("not reached", 1, "thread 5, which has exited"),
    "barriers_of_one_warp_differ": ("mismatch", 2, "__syncthreads of thread 1"),
    "barrier_for_some": ("not reached", 1, "__syncthreads"),
    "collectives_differ": ("mismatch", 2, "__shfl_down_sync of thread 16 .* meets __shfl_xor"),
    "shuffle_of_an_exited_lane": ("not reached", 1, "thread 3, which has exited"),
    "shuffle_reads_outside": ("misuse", 1, "lane 16, which does not take part"),
    "not_in_its_mask": ("mismatch", 1, "not in its own mask"),
    "waits_forever": ("deadlock", 2, "threads 0-31 wait for a flag that nobody sets"),
    "wrong_forever": ("never written", 1, "__shared__ done, byte 0 of 4 is read by thread 0"),
    "polls_forever": ("deadlock", 1, r"threads [-0-9, ]+ poll"),
    "polls_forever_without_sleep": ("deadlock", 1, r"threads [-0-9, ]+ poll"),
    "missing_fence": ("missing fence", 2, "no fence.proxy.async between"),
    "fence_too_early": ("missing fence", 2, "no fence.proxy.async between"),
    "traps": ("misuse", 1, "__trap"),
}
# Those that need no instrumentation.
ALWAYS = {
    name
    for name, (kind, _, _) in MISTAKES.items()
    if kind in ("not reached", "mismatch", "deadlock", "misuse")
}


def line_of(kernel: str, place: int) -> str:
    for number, line in enumerate(WRONG.read_text().splitlines(), 1):
        if line.endswith(f"// {kernel} {place}"):
            return f"core_wrong.cu:{number}"
    raise AssertionError(f"no line is marked {kernel} {place}")


def run_wrong(kernel: str, build: str, order: str = "forward") -> list[simt.Finding]:
    module = simt.compile(WRONG, build)
    tensors = {
        "float const*": torch.ones(64),
        "float*": torch.zeros(64),
        "float4*": torch.zeros(256),
        "unsigned char*": torch.zeros(64, dtype=torch.uint8),
    }
    integers = torch.zeros(3, 64, dtype=INT).unbind()
    parameters = symbols.Symbols(module.file).function(kernel).parameters
    assert parameters is not None
    args = [tensors.get(p, integers[i]) for i, p in enumerate(parameters)]
    grid = 4 if "blocks" in kernel else 1
    shared = 256 if "dynamic" in kernel or kernel == "reads_past_shared" else 0
    return module.launch(
        kernel, grid=grid, block=64, args=args, shared=shared, order=order, patience=0.1
    )


def test_every_wrong_kernel_is_tested() -> None:
    kernels = set(re.findall(r"__global__ void (\w+)\(", WRONG.read_text()))
    assert kernels == {
        *MISTAKES,
        "reads_the_host",
        "bank_conflicts",
        "sums_of_blocks",
        "fenced_by_writers",
        "fenced_by_one",
    }


@pytest.mark.parametrize(
    ("build", "kernel"), [*(("race", k) for k in MISTAKES), *(("plain", k) for k in sorted(ALWAYS))]
)
def test_mistakes_are_found(build: str, kernel: str) -> None:
    kind, places, words = MISTAKES[kernel]
    found = run_wrong(kernel, build)
    named = [f for f in found if f.kind == kind and re.search(words, f.message)]
    assert named, found
    lines = [line_of(kernel, place + 1) for place in range(places)]
    assert any(all(line in f.message for line in lines) for f in named), (lines, named)


@pytest.mark.parametrize("order", ["reverse", "shuffled"])
@pytest.mark.parametrize("kernel", [name for name in MISTAKES if name.startswith("race")])
def test_races_are_found_in_any_order(kernel: str, order: str) -> None:
    assert "race" in {f.kind for f in run_wrong(kernel, "race", order)}


def test_bank_conflicts_are_counted_on_request() -> None:
    module = simt.compile(WRONG, "race")
    call: dict[str, Any] = {"grid": 1, "block": 32, "args": [torch.zeros(32)]}
    assert not module.launch("bank_conflicts", **call)
    found = module.launch("bank_conflicts", **call, bank_conflicts=True)
    assert [f.kind for f in found] == ["bank conflict"] * 2
    said = {"1 .* take 32 passes instead of 1": 1, "1 .* take 8 passes instead of 4": 2}
    for words, place in said.items():
        line = line_of("bank_conflicts", place)
        assert any(line in f.message and re.match(words, f.message) for f in found), found


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("left_out", range(6))
def test_sums_with_the_same_bits_are_added_in_order(left_out: int, order: str) -> None:
    """0: nothing is left out."""
    module, x, sums = simt.compile(WRONG, "race"), torch.ones(64), torch.zeros(64)
    for same_bits in (False, True):
        args = [x, sums, torch.zeros(1, dtype=INT), left_out]
        found = module.launch(
            "sums_of_blocks", grid=5, block=64, args=args, order=order, same_bits=same_bits
        )
        assert {f.kind for f in found} == ({"race"} if same_bits and left_out else set())
        assert all(line_of("sums_of_blocks", 1) in f.message for f in found)
    assert torch.equal(sums, 10 * x)


@pytest.mark.parametrize("kernel", ["fenced_by_writers", "fenced_by_one"])
def test_a_fence_is_enough(kernel: str) -> None:
    module = simt.compile(WRONG, "race")
    assert not module.launch(kernel, grid=1, block=32, args=[torch.zeros(1, dtype=INT)])


def test_memory_of_the_host_is_not_the_kernels() -> None:
    found = simt.compile(WRONG, "race").call("gives_what_is_the_hosts", torch.zeros(32))
    assert [f.kind for f in found] == ["out of bounds"]
    assert line_of("reads_the_host", 1) in found[0].message


@pytest.mark.parametrize(
    "kernel", ["reads_past_the_end", "writes_before_the_start", "reads_past_shared", "misaligned"]
)
def test_sanitizers_find(kernel: str) -> None:
    (found,) = run_wrong(kernel, "address")
    assert found.kind == "sanitizer"
    assert line_of(kernel, 1) in found.message


# ---- The Python face


def test_wrong_calls_are_errors() -> None:
    module = right()
    x, out = torch.zeros(4, 4), torch.zeros(4)
    rows = "sum_rows<float, 128>"
    with pytest.raises(ValueError, match="there is no function 'sum_rowz'"):
        module.launch("sum_rowz", grid=1, block=1)
    with pytest.raises(ValueError, match="sum_rows<float,128>"):
        module.launch("sum_rows<float, 7>", grid=1, block=1)
    with pytest.raises(TypeError, match="takes 3 arguments"):
        module.launch(rows, grid=1, block=128, args=[x, out])
    with pytest.raises(TypeError, match=r"argument 0.*float64"):
        module.launch(rows, grid=1, block=128, args=[x.double(), out, 4])
    with pytest.raises(TypeError, match=r"argument 2.*takes an integer"):
        module.launch(rows, grid=1, block=128, args=[x, out, 4.0])
    with pytest.raises(OverflowError, match="argument 2"):
        module.launch(rows, grid=1, block=128, args=[x, out, 2**40])
    with pytest.raises(RuntimeError, match="1 to 1024 threads, not 2048"):
        module.launch(rows, grid=1, block=2048, args=[x, out, 4])
    with pytest.raises(RuntimeError, match="232448 bytes of shared memory"):
        module.launch(rows, grid=1, block=128, args=[x, out, 4], shared=300_000)
    with pytest.raises(ValueError, match="order must be one of"):
        module.launch(rows, grid=1, block=128, args=[x, out, 4], order="sideways")
    with pytest.raises(ValueError, match="grid and block"):
        module.launch(rows, grid=0, block=128, args=[x, out, 4])
    with pytest.raises(ValueError, match="build must be one of"):
        simt.compile(RIGHT, "fast")
    with pytest.raises(FileNotFoundError, match=r"no file .*none\.cu"):
        simt.compile(CUDA / "none.cu")


def test_what_does_not_compile_says_where(tmp_path: Path) -> None:
    source = tmp_path / "broken.cu"
    source.write_text("__global__ void k(int* x) {\n    x = 1.5;\n}\n")
    with pytest.raises(simt.BuildError, match=r"broken\.cu:2"):
        simt.compile(source)


def test_a_changed_header_is_compiled_anew(tmp_path: Path) -> None:
    source, header = tmp_path / "k.cu", tmp_path / "k.h"
    source.write_text('#include "k.h"\n__global__ void k(int* x) { *x = kValue; }\n')
    out = torch.zeros(1, dtype=INT)
    for value in (3, 4, 3):
        header.write_text(f"constexpr int kValue = {value};\n")
        simt.compile(source).launch("k", grid=1, block=1, args=[out])
        assert out.item() == value


def test_the_guide(tmp_path: Path) -> None:
    """csrc/README.md, word for word."""
    guide = (CUDA.parents[1] / "csrc" / "README.md").read_text()
    blocks = re.findall(r"```(\w*)\n(.*?)```", guide, re.DOTALL)
    (kernel,) = (text for language, text in blocks if language == "cpp")
    (script,) = (text for language, text in blocks if language == "python")
    printed = next(text for language, text in blocks if not language)
    (tmp_path / "scale.cu").write_text(kernel)
    (tmp_path / "try_scale.py").write_text(script)
    command = [sys.executable, "try_scale.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == (printed, "")
