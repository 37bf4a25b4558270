"""Each instruction of csrc/cuda/device/ against its definition, which is computed here from the
maths: by tests/test_simt_instructions.py under the CPU model, and on a GPU (the first thing to run
there) by

    python tests/instructions.py [SHARED_OBJECT]

which builds tests/cuda/run_instructions.cu with nvcc for sm_90a unless it is given what
`python tests/instructions.py --build SHARED_OBJECT` has made elsewhere, and prints a line per case.
"""

from __future__ import annotations

import ctypes
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).resolve().parent
NVCC = ("nvcc", "-std=c++20", "-gencode=arch=compute_90a,code=sm_90a", "--threads", "2")
NVCC += ("-Xcompiler", "-fPIC", "-shared")
DTYPES = {  # bigops::DType
    torch.float32: 1,
    torch.bfloat16: 2,
    torch.float16: 3,
    torch.int32: 5,
}

Call = Callable[..., None]  # file, function, arguments


@dataclass(frozen=True)
class Case:
    """`run` calls kernels on tensors of `device` and raises AssertionError where they are wrong."""

    name: str
    run: Callable[[Call, str], None] = field(repr=False)


def _random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + 1)
    return torch.randn(*shape, generator=generator).to(dtype)


def _bits(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[x.element_size()])


def _same(got: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    """Bit by bit."""
    got, expected = _bits(got.cpu()), _bits(expected.cpu())
    assert got.shape == expected.shape, f"{what}: {tuple(got.shape)} for {tuple(expected.shape)}"
    wrong = (got != expected).flatten()
    if wrong.any():
        first = int(wrong.nonzero()[0])
        raise AssertionError(
            f"{what}: {int(wrong.sum())} of {wrong.numel()} differ, first at {first}:"
            f" {got.flatten()[first]:#x} for {expected.flatten()[first]:#x}"
        )


def _product(
    got: torch.Tensor, c: torch.Tensor | None, a: torch.Tensor, b: torch.Tensor, what: str
) -> None:
    """got = c + a @ b of exact operands, sums in fp32: half an ulp of the sum of magnitudes per
    term, and as much again for hardware that cuts off where it aligns."""
    a64, b64 = a.double().cpu(), b.double().cpu()
    exact, magnitude = a64 @ b64, a64.abs() @ b64.abs()
    if c is not None:
        exact, magnitude = exact + c.double().cpu(), magnitude + c.double().cpu().abs()
    limit = magnitude * (a.shape[1] + 1) * 2.0**-23
    error = (got.double().cpu() - exact).abs()
    assert not error.isnan().any(), f"{what}: {int(error.isnan().sum())} are NaN"
    worst = float((error / limit).max())
    assert worst <= 1, (
        f"{what}: {int((error > limit).sum())} of {error.numel()} wrong, {worst:.3g} limits"
    )


# ---- Warp


def _ulps(got: torch.Tensor, exact: torch.Tensor, what: str, limit: float) -> None:
    """Zeros for what is subnormal, and the hardware's bound in units in the last place."""
    exact = torch.where(exact.abs() < 2.0**-126, exact * 0, exact)
    rounded = exact.float()
    finite = rounded.isfinite() & (rounded != 0)
    _same(
        got[~finite & ~rounded.isnan()],
        rounded[~finite & ~rounded.isnan()],
        f"{what}, 0 and infinity",
    )
    assert got[rounded.isnan()].isnan().all(), f"{what}: NaN"
    unit = 2.0 ** (torch.frexp(exact[finite])[1].double() - 24)
    worst = float(((got[finite].double() - exact[finite]).abs() / unit).max())
    assert worst <= limit, f"{what}: {worst} ulp"


def _conversions(call: Call, device: str) -> None:
    special = [
        0.0,
        -0.0,
        1.0,
        -1.0,
        float("inf"),
        -float("inf"),
        float("nan"),
        3e-39,
        -3e-39,
        65504.0,
    ]
    special += [
        65519.0,
        65520.0,
        1e30,
        3.3895e38,
        3.4e38,
        127.5,
        128.0,
        -126.0,
        -126.5,
        -149.0,
        -151.0,
    ]
    special += [1 + 2.0**-8, 1 + 3 * 2.0**-8, 1 + 2.0**-11, 1 + 3 * 2.0**-11, 1 + 2.0**-24 * 2]
    special += [2.0**-24, 2.0**-25, 3 * 2.0**-25, 2.0**-14 - 2.0**-26]  # half's subnormals
    x = torch.cat([torch.tensor(special, dtype=torch.float32), _random(970) * 40])
    n = x.numel()
    out = torch.zeros(5, n, dtype=torch.int32)
    x_there, out_there = x.to(device), out.to(device)
    call("warp", "warp_conversions", x_there, out_there, n)
    got = out_there.cpu()
    flushed = torch.where(x.abs() < 2.0**-126, x * 0, x)
    _ulps(got[0].view(torch.float32), torch.exp2(flushed.double()), "exp2", 2)
    _ulps(got[1].view(torch.float32), 1 / flushed.double(), "reciprocal", 1)
    for row, dtype in ((2, torch.bfloat16), (3, torch.float16)):
        pair = torch.stack([x, x.flip(0)], 1)
        halves = _bits(pair.to(dtype))
        halves[pair.isnan()] = 0x7FFF
        _same(got[row], halves.contiguous().view(torch.int32).flatten(), f"pack {dtype}")
    # To nearest at 10 bits, ties away from zero, by adding half a unit to the magnitude.
    bits = _bits(x)
    nearest = (bits + 0x1000) & ~0x1FFF
    tf32 = torch.where(x.isfinite(), nearest, bits)
    _same(got[4][~x.isnan()] >> 13, tf32[~x.isnan()] >> 13, "to_tf32")


def _shuffles(call: Call, device: str) -> None:
    x = _random(64)
    out = torch.zeros(8, 64, device=device)
    call("warp", "warp_shuffles", x.to(device), out)
    warps = x.view(2, 32)
    _same(out[0], warps[:, 5:6].expand(2, 32).reshape(64), "shuffle")
    lanes = torch.arange(32)
    for bit in range(5):
        _same(out[1 + bit], warps[:, lanes ^ (1 << bit)].reshape(64), f"shuffle_xor {1 << bit}")
    elected = out[6].cpu().view(2, 32)
    assert (elected.sum(1) == 1).all(), f"elect_one: {elected.sum(1).tolist()} lanes of two warps"
    _same(out[7], lanes.repeat(2).float(), "lane_id")


def _named_barriers(call: Call, device: str) -> None:
    x = torch.randint(-99, 99, (7, 64), generator=torch.Generator().manual_seed(1)).float()
    out = torch.zeros(7, 64, device=device)
    call("warp", "warp_named_barriers", x.to(device), out, 7)
    _same(out, x.sum(1, keepdim=True).expand(7, 64), "sums handed over")


def _register_pool(call: Call, device: str) -> None:
    out = torch.zeros(384, dtype=torch.int32, device=device)
    call("warp", "warp_register_pool", out)
    _same(out, torch.tensor([24] * 128 + [240] * 256, dtype=torch.int32), "setmaxnreg")


# ---- mma


def _mma(function: str, dtype: torch.dtype) -> Callable[[Call, str], None]:
    def run(call: Call, device: str) -> None:
        a, b, c = (
            _random(16, 64, dtype=dtype),
            _random(8, 64, dtype=dtype, seed=1),
            _random(16, 8, seed=2),
        )
        d = torch.zeros(16, 8, device=device)
        call("mma", function, a.to(device), b.to(device), c.to(device), d, 64)
        if dtype == torch.float32:
            a, b = (((_bits(m) + 0x1000) & ~0x1FFF).view(torch.float32) for m in (a, b))
        _product(d, c, a, b.T, function)

    return run


def _matrices(transposed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Four 8 x 8 matrices and the 32 x 4 registers that hold them: lane l has row l // 4, columns
    2 (l % 4) and the next, of each or of its transpose."""
    matrices = torch.randperm(256, generator=torch.Generator().manual_seed(3)).to(torch.int16)
    matrices = matrices.view(4, 8, 8)
    held = matrices.transpose(1, 2) if transposed else matrices
    registers = held.reshape(4, 32, 2).permute(1, 0, 2).contiguous().view(torch.int32).view(32, 4)
    return matrices, registers


def _ldmatrix(call: Call, device: str) -> None:
    for transposed in (0, 1):
        matrices, registers = _matrices(transposed)
        out = torch.zeros(32, 4, dtype=torch.int32, device=device)
        call("mma", "mma_ldmatrix", matrices.to(device), out, transposed)
        _same(out, registers, f"ldmatrix, transposed {transposed}")


def _stmatrix(call: Call, device: str) -> None:
    for transposed in (0, 1):
        matrices, registers = _matrices(transposed)
        out = torch.zeros(4, 8, 8, dtype=torch.int16, device=device)
        call("mma", "mma_stmatrix", registers.to(device), out, transposed)
        _same(out, matrices, f"stmatrix, transposed {transposed}")


# ---- Copies


def _cp_async(call: Call, device: str) -> None:
    for chunks, valid in ((1, 512), (7, 7 * 512), (7, 5 * 512 + 4)):
        x = _random(chunks * 512)
        out = torch.zeros(chunks * 512, device=device)
        call("copy", "copy_cp_async", x.to(device), out, chunks, valid)
        expected = 2 * x
        expected[valid:] = 0
        _same(out, expected, f"cp.async of {chunks} chunks, {valid} floats")


def _mbarrier(call: Call, device: str) -> None:
    x = torch.randint(-99, 99, (11, 512), generator=torch.Generator().manual_seed(1)).float()
    out = torch.zeros(512, device=device)
    call("copy", "copy_mbarrier", x.to(device), out, 11)
    _same(out, x.sum(0), "sum of 11 chunks")


def _bulk_reduce(call: Call, device: str) -> None:
    x = torch.randint(-99, 99, (512,), generator=torch.Generator().manual_seed(1)).float()
    out = torch.arange(512, device=device).float()
    call("copy", "copy_bulk_reduce", out, x.to(device), 5)
    _same(out, torch.arange(512).float() + 5 * x, "bulk_reduce_add")


# ---- TMA


@dataclass
class Plan:
    """test::Plan of tests/cuda/instructions_tma.cu; dimensions from the innermost."""

    tensor: torch.Tensor  # dimensions from the outermost, as torch has them
    box: list[int]
    at: list[int]
    swizzle: int = 0
    steps: list[int] = field(default_factory=lambda: [1, 1, 1, 1])
    lower: tuple[int, int] = (0, 0)
    upper: tuple[int, int] = (0, 0)
    channels: int = 0
    pixels: int = 0
    offset: tuple[int, int] = (0, 0)
    bytes: int = 0

    def encoded(self) -> torch.Tensor:
        def four(values: list[int]) -> list[int]:
            return [*values, *[1] * (4 - len(values))]

        size = self.tensor.element_size()
        numbers = [DTYPES[self.tensor.dtype], self.tensor.dim(), self.swizzle]
        numbers += four(list(self.tensor.shape[::-1]))
        numbers += four([stride * size for stride in self.tensor.stride()[::-1]])
        numbers += four(self.box) + four(self.steps) + four(self.at)
        numbers += [*self.lower, *self.upper, self.channels, self.pixels, *self.offset, self.bytes]
        return torch.tensor(numbers, dtype=torch.int64)


def _taken(tensor: torch.Tensor, indices: list[torch.Tensor]) -> torch.Tensor:
    """The product of these indices, zeros where there is no such element."""
    grids = torch.meshgrid(*indices, indexing="ij")
    inside = torch.ones_like(grids[0], dtype=torch.bool)
    for grid, size in zip(grids, tensor.shape, strict=True):
        inside &= (grid >= 0) & (grid < size)
    safe = [grid.clamp(0, size - 1) for grid, size in zip(grids, tensor.shape, strict=True)]
    return torch.where(inside, tensor[tuple(safe)], torch.zeros((), dtype=tensor.dtype))


def _box_indices(plan: Plan) -> list[torch.Tensor]:
    return [
        torch.arange(at, at + box, step)
        for at, box, step in zip(plan.at, plan.box, plan.steps, strict=False)
    ][::-1]


def _swizzled(content: torch.Tensor, swizzle: int) -> torch.Tensor:
    """The bytes of a box as they lie in shared memory that begins at a multiple of 1024: a 16-byte
    chunk's number within its swizzle-wide row is XORed with the number of its 128-byte line."""
    flat = content.contiguous().view(torch.uint8).flatten()
    if swizzle == 0:
        return flat
    chunks = flat.view(-1, 16)
    number = torch.arange(chunks.shape[0])
    width = swizzle // 16
    to = number // width * width + (number % width ^ number // 8 % width)
    result = torch.empty_like(chunks)
    result[to] = chunks
    return result.flatten()


def _tma_plans() -> Iterator[tuple[str, Plan]]:
    bf16, f32 = torch.bfloat16, torch.float32
    yield "2d, 128", Plan(_random(40, 136, dtype=bf16), [64, 16], [64, 8], 128)
    yield "2d, 64", Plan(_random(40, 136, dtype=bf16), [32, 16], [96, 3], 64)
    yield "2d, 32", Plan(_random(40, 136, dtype=bf16), [16, 24], [32, 7], 32)
    yield "2d, none, fp32", Plan(_random(40, 24), [12, 10], [8, 5])
    yield "2d, past both ends", Plan(_random(10, 40, dtype=bf16), [64, 16], [-8, -3], 128)
    yield "2d, past the ends, 64", Plan(_random(10, 40, dtype=bf16), [32, 16], [24, 2], 64)
    yield "2d, all outside", Plan(_random(10, 40, dtype=bf16), [64, 8], [0, 10], 128)
    yield "3d, strided rows", Plan(_random(6, 20, 64)[:, ::2].to(f32), [32, 4, 3], [16, 8, 4], 128)
    transposed = _random(5, 12, 3, 64, dtype=torch.float16).transpose(
        1, 2
    )  # strides do not descend
    yield "4d, 128", Plan(transposed, [64, 8, 1, 1], [0, 6, 2, 4], 128)
    yield (
        "4d, 32, box of boxes",
        Plan(_random(5, 3, 12, 64, dtype=bf16), [16, 4, 2, 2], [48, 9, 2, 3], 32),
    )
    broadcast = _random(4, 1, 16, 64, dtype=bf16).expand(4, 3, 16, 64)  # stride 0
    yield "4d, broadcast", Plan(broadcast, [64, 8, 2, 1], [0, 4, 1, 2], 128)
    steps = [1, 2, 3, 1]
    yield (
        "4d, steps",
        Plan(_random(3, 9, 16, 64, dtype=bf16), [64, 8, 7, 1], [0, 3, 1, 1], 128, steps),
    )


def _tma_load(plan: Plan) -> Callable[[Call, str], None]:
    def run(call: Call, device: str) -> None:
        expected = _swizzled(_taken(plan.tensor, _box_indices(plan)), plan.swizzle)
        plan.bytes = expected.numel()
        out = torch.zeros(plan.bytes, dtype=torch.uint8, device=device)
        there = _on(plan.tensor, device)
        call("tma", "tma_load", there, out, plan.encoded())
        _same(out, expected, "tma_load")

    return run


def _on(tensor: torch.Tensor, device: str) -> torch.Tensor:
    """With the same strides, which .to() would not keep for an expanded or strided one."""
    span = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True)) + 1
    flat = tensor.as_strided((span,), (1,)).to(device)
    return flat.as_strided(tensor.shape, tensor.stride())


def _tma_store(dtype: torch.dtype, add: int) -> Callable[[Call, str], None]:
    def run(call: Call, device: str) -> None:
        swizzle, columns = (128, 64) if dtype.itemsize == 2 else (0, 32)
        before = torch.randint(
            -9, 9, (3, 2, 11, 48), generator=torch.Generator().manual_seed(1)
        ).to(dtype)
        for at in ([16, 6, 1, 1], [-8, -3, -1, 2]):
            plan = Plan(before, [columns, 8, 2, 1], at, swizzle)
            box = torch.randint(
                -9, 9, (1, 2, 8, columns), generator=torch.Generator().manual_seed(2)
            )
            content = box.to(dtype)
            raw = _swizzled(content, swizzle)
            plan.bytes = raw.numel()
            there = before.clone().to(device)
            call("tma", "tma_store", there, raw.to(device), plan.encoded(), add)
            expected = before.clone()
            indices = _box_indices(plan)
            for place in torch.cartesian_prod(*[torch.arange(len(i)) for i in indices]).tolist():
                where = tuple(int(i[p]) for i, p in zip(indices, place, strict=True))
                if all(0 <= w < n for w, n in zip(where, before.shape, strict=True)):
                    value = content[tuple(place)]
                    expected[where] = expected[where] + value if add else value
            _same(there, expected, f"tma_store at {at}, add {add}")

    return run


def _im2col(call: Call, device: str) -> None:
    """Columns of a convolution: for each tap the pixels that it meets, from any output pixel on."""
    images, height, width, channels = 3, 7, 9, 64
    tensor = _random(images, height, width, channels, dtype=torch.bfloat16)
    taps, dilation, padding, pixels = 3, 2, 2, 24
    for stride in ((1, 1), (2, 3)):  # width, height
        upper = padding - (taps - 1) * dilation
        bases = [
            (n, h, w)
            for n in range(images)
            for h in range(-padding, height + upper, stride[1])
            for w in range(-padding, width + upper, stride[0])
        ]
        for start in (0, 5, len(bases) - 10):
            for tap_h, tap_w in ((0, 0), (1, 2), (2, 1)):
                n, h, w = bases[start]
                plan = Plan(tensor, [1] * 4, [0, w, h, n], 128, [1, *stride, 1])
                plan.lower, plan.upper = (-padding, -padding), (upper, upper)
                plan.channels, plan.pixels = channels, pixels
                plan.offset = (tap_w * dilation, tap_h * dilation)
                rows = []
                for n, h, w in (bases + [(images, 0, 0)] * pixels)[start : start + pixels]:
                    h, w = h + plan.offset[1], w + plan.offset[0]
                    inside = n < images and 0 <= h < height and 0 <= w < width
                    rows.append(tensor[n, h, w] if inside else torch.zeros_like(tensor[0, 0, 0]))
                expected = _swizzled(torch.stack(rows), 128)
                plan.bytes = expected.numel()
                out = torch.zeros(plan.bytes, dtype=torch.uint8, device=device)
                call("tma", "tma_im2col", tensor.to(device), out, plan.encoded())
                _same(
                    out,
                    expected,
                    f"im2col from pixel {start}, tap {tap_h} {tap_w}, stride {stride}",
                )


# ---- wgmma

LEFT = ("A K-major", "A M-major", "A in registers")
# N, depth, dtypes. K-major rows of depth 16, 32, 64 are swizzled by 32, 64, 128 bytes; N-major too.
SHAPES = (
    (8, 64, "bf"),
    (64, 16, "bf"),
    (64, 32, "bf"),
    (64, 64, "bf"),
    (96, 128, "bf"),
    (80, 64, "b"),
    (128, 96, "b"),
    (176, 64, "b"),
    (192, 64, "b"),
    (256, 64, "b"),
)


def _wgmma(
    n: int, depth: int, left: int, n_major: int, is_bf16: int
) -> Callable[[Call, str], None]:
    def run(call: Call, device: str) -> None:
        dtype = torch.bfloat16 if is_bf16 else torch.float16
        a, b = _random(128, depth, dtype=dtype), _random(n, depth, dtype=dtype, seed=1)
        c = _random(128, n, seed=2)
        b_there = b
        if n_major:
            b_there = torch.zeros(depth, max(n, 16), dtype=dtype)
            b_there[:, :n] = b.T
        a_there = (a.T if left == 1 else a).contiguous().to(device)
        for start in (None, c):
            out = torch.zeros(128, n, device=device)
            c_there = None if start is None else start.to(device)
            call(
                "wgmma",
                "wgmma",
                a_there,
                b_there.to(device),
                c_there,
                out,
                n,
                depth,
                left,
                n_major,
                is_bf16,
            )
            _product(out, start, a, b.T, "from zero" if start is None else "added to C")

    return run


def _wgmma_groups(call: Call, device: str) -> None:
    a, b = _random(64, 64, dtype=torch.bfloat16), _random(64, 64, dtype=torch.bfloat16, seed=1)
    out = torch.zeros(2, 64, 64, device=device)
    call("wgmma", "wgmma_groups", a.to(device), b.to(device), out)
    _product(out[0], None, a, b.T, "the first group")
    _product(out[1], None, b, a.T, "the second group")


def cases() -> Iterator[Case]:
    yield Case("exp2, reciprocal, pack, to_tf32", _conversions)
    yield Case("shuffle, elect_one", _shuffles)
    yield Case("named barriers", _named_barriers)
    yield Case("setmaxnreg", _register_pool)
    yield Case("mma m16n8k16 bf16", _mma("mma_bf16", torch.bfloat16))
    yield Case("mma m16n8k16 f16", _mma("mma_f16", torch.float16))
    yield Case("mma m16n8k8 tf32", _mma("mma_tf32", torch.float32))
    yield Case("ldmatrix", _ldmatrix)
    yield Case("stmatrix", _stmatrix)
    yield Case("cp.async", _cp_async)
    yield Case("mbarrier, bulk_load", _mbarrier)
    yield Case("bulk_reduce_add", _bulk_reduce)
    for name, plan in _tma_plans():
        yield Case(f"tma_load {name}", _tma_load(plan))
    yield Case("tma_store bf16", _tma_store(torch.bfloat16, 0))
    yield Case("tma_store f32", _tma_store(torch.float32, 0))
    yield Case("tma_reduce_add f32", _tma_store(torch.float32, 1))
    yield Case("tma_reduce_add bf16", _tma_store(torch.bfloat16, 1))
    yield Case("tma_reduce_add f16", _tma_store(torch.float16, 1))
    yield Case("tma_load_im2col", _im2col)
    for n, depth, dtypes in SHAPES:
        for letter in dtypes:
            for left, name in enumerate(LEFT):
                for n_major in (0, 1):
                    title = (
                        f"wgmma n{n} depth {depth} {letter}16, {name}, B {'NK'[1 - n_major]}-major"
                    )
                    yield Case(title, _wgmma(n, depth, left, n_major, int(letter == "b")))
    yield Case("wgmma, two groups", _wgmma_groups)


# ---- On a GPU


def build(target: Path) -> None:
    source = HERE / "cuda" / "run_instructions.cu"
    subprocess.run([*NVCC, "-o", str(target), str(source)], check=True)


def gpu_call(file: Path) -> Call:
    library = ctypes.CDLL(str(file))
    library.run_instructions.restype = ctypes.c_char_p

    def word(value: Any) -> int:
        if isinstance(value, torch.Tensor):
            return value.data_ptr()
        return 0 if value is None else value

    def call(_: str, function: str, *args: Any) -> None:
        words = (ctypes.c_int64 * 9)(*map(word, args))
        address = ctypes.cast(getattr(library, function), ctypes.c_void_p)
        error = library.run_instructions(address, ctypes.byref(words))
        if error is not None:
            raise AssertionError(error.decode())

    return call


def main(arguments: list[str]) -> int:
    if arguments[:1] == ["--build"]:
        build(Path(arguments[1]))
        return 0
    start = time.perf_counter()
    if not torch.cuda.is_available():
        print("there is no GPU")
        return 1
    file = Path(arguments[0]).resolve() if arguments else HERE.parent / "build" / "instructions.so"
    if not arguments:
        file.parent.mkdir(exist_ok=True)
        build(file)
    print(f"{torch.cuda.get_device_name()}; built after {time.perf_counter() - start:.1f} s")
    call, failed, count = gpu_call(file), 0, 0
    for case in cases():
        count += 1
        try:
            case.run(call, "cuda")
        except AssertionError as error:
            failed += 1
            print(f"FAIL {case.name}: {error}", flush=True)
            if "CUDA" in str(error) or "illegal" in str(error):
                print("the device is not usable any more")
                break
        else:
            print(f"pass {case.name}", flush=True)
    print(f"{count - failed} of {count} pass, {time.perf_counter() - start:.1f} s")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
