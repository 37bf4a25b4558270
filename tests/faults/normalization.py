from __future__ import annotations

from .fault import ROUNDED, Fault, truth

BATCH_NORM = (
    Fault(
        "batch_norm_act", "native", "mask", "csrc/cpu/batch_norm_act_parts.h",
        "if (i < size) term(first, second, i, static_cast<int>(size - i));",
        "if (i < size) term(first, second, i, static_cast<int>(size - i - 1));",
        truth("batch_norm_act", "native", "planes"),
    ),
    Fault(
        "batch_norm_act", "native", "scale", "csrc/cpu/batch_norm_act.cpp",
        "const double slope = weights[channel] / std::sqrt",
        "const double slope = 1 / std::sqrt",
        truth("batch_norm_act", "native", "planes"),
    ),
    Fault(
        "batch_norm_act", "native", "block", "csrc/cpu/batch_norm_act.cpp",
        "summed && b < blocks",
        "summed && b < blocks - 1",
        truth("batch_norm_act", "native", "channels_last"),
    ),
    Fault(
        "batch_norm_act", "native", "epilogue", "csrc/cpu/batch_norm_act.cpp",
        "vars[channel] = its_var * unbiased;",
        "vars[channel] = its_var + 0 * unbiased;",
        truth("batch_norm_act", "native", "planes"),
    ),
    Fault(
        "batch_norm_act", "native", "epilogue", "csrc/cpu/batch_norm_act_parts.h",
        "select(load(out + i, some...) <= 0, V{}, g)",
        "select(load(out + i, some...) < 0, V{}, g)",
        truth("batch_norm_act", "native", "planes"),
    ),
    Fault(
        "batch_norm_act", "native", "precision", "csrc/cpu/batch_norm_act.cpp",
        "found[i] = to_float(view.ptr<T>()[static_cast<int64_t>(i) * view.strides[0]]);",
        "found[i] = "
        + ROUNDED.format(
            "double", "to_float(view.ptr<T>()[static_cast<int64_t>(i) * view.strides[0]])"
        )
        + ";",
        truth("batch_norm_act", "native", "planes"),
    ),
    Fault(
        "batch_norm_act", "native", "unwritten", "csrc/cpu/batch_norm_act_parts.h",
        "if (i < size) f(i, static_cast<int>(size - i));",
        "if (i < size) f(i, static_cast<int>(size - i - 1));",
        truth("batch_norm_act", "native", "planes"),
    ),
    Fault(
        "batch_norm_act", "native", "input", "csrc/cpu/batch_norm_act.cpp",
        "        const auto passing = passed(g, mask, at, some...);\n",
        "        const auto passing = passed(g, mask, at, some...);\n"
        "        store(const_cast<T*>(g) + at, passing, some...);\n",
        truth("batch_norm_act", "native", "planes"),
    ),
    Fault(
        "batch_norm_act", "triton", "mask", "kernels/batch_norm_act.py",
        "off = tl.where(mask, x - center[:, None], 0.0)",
        "off = x - center[:, None]",
        truth("batch_norm_act", "triton", "far from 0"),
    ),
    Fault(
        "batch_norm_act", "triton", "scale", "kernels/batch_norm_act.py",
        "scale = _or_else(weight_ptr, offs_c, mask_c, HAS_WEIGHT, 1.0) * inv_std",
        "scale = inv_std",
        truth("batch_norm_act", "triton", "planes"),
    ),
    Fault(
        "batch_norm_act", "triton", "block", "kernels/batch_norm_act.py",
        "for split in range(splits):",
        "for split in range(splits - 1):",
        truth("batch_norm_act", "triton", "planes"),
    ),
    Fault(
        "batch_norm_act", "triton", "epilogue", "kernels/batch_norm_act.py",
        "(var * (count / (count - 1.0))).to(tl.float32)",
        "var.to(tl.float32)",
        truth("batch_norm_act", "triton", "planes"),
    ),
    Fault(
        "batch_norm_act", "triton", "epilogue", "kernels/batch_norm_act.py",
        "g = tl.where(out <= 0.0, 0.0, g)",
        "g = tl.where(out < 0.0, 0.0, g)",
        truth("batch_norm_act", "triton", "planes"),
    ),
    Fault(
        "batch_norm_act", "triton", "precision", "kernels/batch_norm_act.py",
        "other=0.0).to(tl.float32)\n        off = tl.where",
        "other=0.0).to(tl.bfloat16).to(tl.float32)\n        off = tl.where",
        truth("batch_norm_act", "triton", "planes"),
    ),
    Fault(
        "batch_norm_act", "triton", "unwritten", "kernels/batch_norm_act.py",
        "tl.store(out_ptr + offs, out.to(out_ptr.dtype.element_ty), mask=mask)",
        "tl.store(out_ptr + offs, out.to(out_ptr.dtype.element_ty),\n"
        "             mask=mask & (offs_c < channels - 1)[:, None])",
        truth("batch_norm_act", "triton", "planes"),
    ),
    Fault(
        "batch_norm_act", "triton", "input", "kernels/batch_norm_act.py",
        "    p = plan(input, channels_last)\n\n    def image",
        "    p = plan(input, channels_last)\n    grad_out.clamp_(min=0.0)\n\n    def image",
        truth("batch_norm_act", "triton", "planes"),
    ),
)  # fmt: skip
