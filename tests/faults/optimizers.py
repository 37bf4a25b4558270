from __future__ import annotations

from .fault import Fault, truth

ADAM = (
    Fault(
        "adam", "native", "mask", "csrc/cpu/step.h",
        "if (i < count) lanes(i, static_cast<int>(count - i));",
        "if (i < count) lanes(i, static_cast<int>(count - i - 1));",
        truth("adam", "native", "one element"),
    ),
    Fault(
        "adam", "native", "scale", "csrc/adam_rule.h",
        "n.correction * Math::sqrt(second)",
        "Math::sqrt(second)",
        truth("adam", "native", "plain"),
    ),
    Fault(
        "adam", "native", "scale", "csrc/step_rule.h",
        "(clip > T(1) ? T(1) : clip) / grad_scale",
        "(clip > T(1) ? T(1) : clip)",
        "test_optim.py::test_gradscaler_clips_the_unscaled_norm",
    ),
    Fault(
        "adam", "native", "block", "csrc/cpu/step.h",
        "begin < list.tensors[i].numel; begin += kChunk",
        "begin == 0 || begin + kChunk <= list.tensors[i].numel; begin += kChunk",
        truth("adam", "native", "long and short"),
    ),
    Fault(
        "adam", "native", "epilogue", "csrc/adam_rule.h",
        "n.decay == T(0) ? param - change",
        "true ? param - change",
        truth("adam", "native", "adamw"),
    ),
    Fault(
        "adam", "native", "precision", "csrc/adam_rule.h",
        "beta2_low(static_cast<T>(o.beta2 - static_cast<double>(beta2_high)))",
        "beta2_low(0)",
        "test_adam.py::test_beta2_is_not_rounded",
    ),
    Fault(
        "adam", "native", "unwritten", "csrc/cpu/step.h",
        "if (role == kGrad) return;",
        "if (role == kGrad || role == kFirstState + 1) return;",
        truth("adam", "native", "strides differ"),
    ),
    Fault(
        "adam", "native", "input", "csrc/cpu/step.h",
        "        write(param_at + i, i, param, some...);\n        for",
        "        write(param_at + i, i, param, some...);\n"
        "        store(places.in<P>(kGrad) + i,\n"
        "              rule.numbers.factor * load(grad_at + i, some...), some...);\n        for",
        truth("adam", "native", "clipped"),
    ),
    Fault(
        "adam", "triton", "mask", "kernels/adam.py",
        "            mask = offsets(block, m_scales, BLOCK) < rest\n",
        "            mask = offsets(block, m_scales, BLOCK) < rest - 1\n",
        truth("adam", "triton", "one element"),
    ),
    Fault(
        "adam", "triton", "scale", "kernels/adam.py",
        "tl.sqrt_rn(top) * correction + eps",
        "tl.sqrt_rn(top) + eps",
        truth("adam", "triton", "plain"),
    ),
    Fault(
        "adam", "triton", "block", "kernels/step_table.py",
        "counts = np.array([-(-size // CHUNK.value) for size in sizes]",
        "counts = np.array([min(1, size) * max(1, size // CHUNK.value) for size in sizes]",
        truth("adam", "triton", "plain"),
    ),
    Fault(
        "adam", "triton", "epilogue", "kernels/adam.py",
        "        p = tl.fma(p, keep, tl.fma(p, (1.0 - keep) - decay, -change))\n",
        "        p = p - change\n",
        truth("adam", "triton", "adamw"),
    ),
    Fault(
        "adam", "triton", "precision", "kernels/adam.py",
        "            rule.beta2 - high,\n",
        "            0.0,\n",
        "test_adam.py::test_beta2_is_not_rounded",
    ),
    Fault(
        "adam", "triton", "unwritten", "kernels/adam.py",
        "    store_state(v_ptr, v_scales, v, offs, mask, block, rest, False)\n",
        "    store_state(v_ptr, v_scales, v, offs, offs < rest - 1, block, rest, False)\n",
        truth("adam", "triton", "one element"),
    ),
    Fault(
        "adam", "triton", "input", "kernels/adam.py",
        "    g = load(g_ptr + offs, mask) * factor\n",
        "    g = load(g_ptr + offs, mask) * factor\n"
        "    tl.store(g_ptr + offs, g.to(g_ptr.dtype.element_ty), mask=mask)\n",
        truth("adam", "triton", "clipped"),
    ),
)  # fmt: skip

# Of the rule alone: the walks are Adam's.
SGD = (
    Fault(
        "sgd", "native", "scale", "csrc/sgd_rule.h",
        "weight(static_cast<T>(1 - o.dampening))",
        "weight(1)",
        truth("sgd", "native", "dampening, maximize"),
    ),
    Fault(
        "sgd", "native", "epilogue", "csrc/sgd_rule.h",
        "n.nesterov ? Math::fma(n.momentum, momentum_buffer, grad) : momentum_buffer",
        "momentum_buffer",
        truth("sgd", "native", "nesterov"),
    ),
    Fault(
        "sgd", "native", "input", "csrc/sgd_rule.h",
        "n.is_first_step ? grad : Math::fma",
        "false ? grad : Math::fma",
        truth("sgd", "native", "first step"),
    ),
    Fault(
        "sgd", "triton", "scale", "kernels/sgd.py",
        "            1.0 - options.dampening,\n",
        "            1.0,\n",
        truth("sgd", "triton", "dampening, maximize"),
    ),
    Fault(
        "sgd", "triton", "epilogue", "kernels/sgd.py",
        "g = g + momentum * b if NESTEROV else b",
        "g = b",
        truth("sgd", "triton", "nesterov"),
    ),
    Fault(
        "sgd", "triton", "unwritten", "kernels/sgd.py",
        "        store_state(b_ptr, scales, b, offs, mask, block, rest, True)\n",
        "        store_state(b_ptr, scales, b, offs, offs < rest - 1, block, rest, True)\n",
        truth("sgd", "triton", "one element"),
    ),
)  # fmt: skip
