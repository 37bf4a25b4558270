from __future__ import annotations

from .fault import ROUNDED, Fault, truth

# Nothing is scaled.
MAX_POOL = (
    Fault(
        "max_pool2d", "native", "mask", "csrc/cpu/max_pool2d_rows.h",
        "std::min(p.kernel[axis], (size - start + d - 1) / d)",
        "std::min(p.kernel[axis], (size - start + d - 2) / d)",
        truth("max_pool2d", "native", "stem"),
    ),
    Fault(
        "max_pool2d", "native", "block", "csrc/cpu/max_pool2d_rows.h",
        "k = p.kernel[axis] - 1; k >= 0; --k",
        "k = p.kernel[axis] - 1; k > 0; --k",
        truth("max_pool2d", "native", "stem, channels_last"),
    ),
    Fault(
        "max_pool2d", "native", "epilogue", "csrc/cpu/max_pool2d_square.h",
        "best.meet(taps[1][0], 2);",
        "best.meet(taps[1][0], 3);",
        truth("max_pool2d", "native", "4096 elements"),
    ),
    Fault(
        "max_pool2d", "native", "precision", "csrc/cpu/max_pool2d_rows.h",
        "line[phase * deal.length + place] = to_float(row[w * step]);",
        "line[phase * deal.length + place] = "
        f"{ROUNDED.format('A', 'to_float(row[w * step])')};",
        truth("max_pool2d", "native", "stride 3"),
    ),
    Fault(
        "max_pool2d", "native", "unwritten", "csrc/cpu/max_pool2d_square.h",
        "if (s.width % 2) row[s.width - 1] = T{};",
        "",
        truth("max_pool2d", "native", "odd sizes"),
    ),
    Fault(
        "max_pool2d", "native", "input", "csrc/cpu/max_pool2d_square.h",
        "const T* p = rows[kh] + 2 * w;",
        "const T* p = rows[kh] + 2 * w;\n"
        "                const_cast<T&>(*p) = T{};",
        truth("max_pool2d", "native", "4096 elements"),
    ),
    Fault(
        "max_pool2d", "triton", "mask", "kernels/max_pool2d.py",
        "mask = mask_o & (h >= 0) &",
        "mask = mask_o & (h > 0) &",
        truth("max_pool2d", "triton", "odd sizes"),
    ),
    Fault(
        "max_pool2d", "triton", "block", "kernels/max_pool2d.py",
        "for window in range(OVER_H * OVER_W):",
        "for window in range(OVER_H * OVER_W - 1):",
        truth("max_pool2d", "triton", "stem"),
    ),
    Fault(
        "max_pool2d", "triton", "epilogue", "kernels/max_pool2d.py",
        "index = tl.where(better, place, index)",
        "index = tl.where(better & (place > 0), place, index)",
        truth("max_pool2d", "triton", "odd sizes"),
    ),
    Fault(
        "max_pool2d", "triton", "precision", "kernels/max_pool2d.py",
        "other=float(\"-inf\")).to(compute)",
        "other=float(\"-inf\")).to(tl.bfloat16).to(compute)",
        truth("max_pool2d", "triton", "stem"),
    ),
    Fault(
        "max_pool2d", "triton", "unwritten", "kernels/max_pool2d.py",
        "total.to(grad_x_ptr.dtype.element_ty), mask=mask_x)",
        "total.to(grad_x_ptr.dtype.element_ty), mask=mask_x & (w < width - 1))",
        truth("max_pool2d", "triton", "odd sizes"),
    ),
    Fault(
        "max_pool2d", "triton", "input", "kernels/max_pool2d.py",
        "    index = made(torch.empty_like(out, dtype=torch.uint8))\n",
        "    index = made(torch.empty_like(out, dtype=torch.uint8))\n    input.clamp_(min=0.0)\n",
        truth("max_pool2d", "triton", "odd sizes"),
    ),
)  # fmt: skip
