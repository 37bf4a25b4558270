"""The tests of the tests: for each flagship and backend, faults as they happen, and the test that
catches each.

`tests/test_faults.py` plants every fault in a copy of the package, where its test must fail. Kinds:

    mask         an off-by-one in a mask
    scale        a dropped scale (convolution has none: the bias that adds to its sums)
    block        a missing block of keys, of taps and channels, or of a tensor's chunks
    epilogue     what is done to the result last, or saved for the backward pass, is wrong
    precision    TF32 where IEEE is due; in C++ bfloat16; half of a number that is kept in two
    unwritten    a row that is not written
    input        an input that is changed in place
"""

from __future__ import annotations

from typing import NamedTuple

KINDS = ("mask", "scale", "block", "epilogue", "precision", "unwritten", "input")


class Fault(NamedTuple):
    """`old`, which is in `file` just once, becomes `new`: then `test` must fail."""

    op: str
    backend: str
    kind: str
    file: str
    old: str
    new: str
    test: str


def truth(op: str, backend: str, sample: str, dtype: str = "float32") -> str:
    return f"test_ops.py::test_truth[{op}-{backend}-{dtype}-{sample}]"


def ieee(kernel: str) -> str:
    return f"test_ieee.py::test_no_tf32_unless_asked_for[{kernel}]"


ROUNDED = "static_cast<{0}>(to_float(from_float<bf16>(static_cast<float>({1}))))"

ATTENTION = (
    Fault(
        "attention", "native", "mask", "csrc/cpu/attention_forward.cpp",
        "s.end_key(i) - j, 0, keys)",
        "s.end_key(i) - j + 1, 0, keys)",
        truth("attention", "native", "causal"),
    ),
    Fault(
        "attention", "native", "mask", "csrc/cpu/attention_gradient.h",
        "end = s.end_key(i + r) - j;",
        "end = s.end_key(i + r) - j + 1;",
        truth("attention", "native", "causal"),
    ),
    Fault(
        "attention", "native", "scale", "csrc/cpu/attention_gradient.h",
        "store(ds_row + lane, ds * slope);",
        "store(ds_row + lane, ds);",
        truth("attention", "native", "scale"),
    ),
    Fault(
        "attention", "native", "scale", "csrc/cpu/attention_forward.cpp",
        "{ return maps ? C(1) : scale; }",
        "{ return C(1); }",
        truth("attention", "native", "scale"),
    ),
    Fault(
        "attention", "native", "block", "csrc/cpu/attention_forward.cpp",
        "j < end; j += kKeyBlock",
        "j < end - 1; j += kKeyBlock",  # only a block of a single key is missed
        truth("attention", "native", "causal, more keys"),
    ),
    Fault(
        "attention", "native", "epilogue", "csrc/cpu/attention_forward.cpp",
        "top = panel.max[r] * unit(),",
        "top = panel.max[r],",
        truth("attention", "native", "lse"),
    ),
    Fault(
        "attention", "native", "epilogue", "csrc/cpu/attention_forward.cpp",
        "sum == 0 ? C(0) : C(1) / panel.sum[r]",
        "C(1) / panel.sum[r]",
        "test_attention.py::test_rows_that_see_nothing[40-10-dtype0]",
    ),
    Fault(
        "attention", "native", "precision", "csrc/cpu/microkernel.h",
        "splat(a[i / V * a_row])",
        f"splat({ROUNDED.format('C', 'a[i / V * a_row]')})",
        truth("attention", "native", "odd sizes"),
    ),
    Fault(
        "attention", "native", "unwritten", "csrc/cpu/attention_forward.cpp",
        "unpack_transposed<T>(panel.out, W, panel.count,",
        "unpack_transposed<T>(panel.out, W, panel.count - 1,",
        truth("attention", "native", "odd sizes"),
    ),
    Fault(
        "attention", "native", "unwritten", "csrc/cpu/attention_backward.cpp",
        "s.first_key(i) >= s.end_key(i) && h < p.heads",
        "s.key_len == 0 && h < p.heads",
        "test_attention.py::test_rows_that_see_nothing[150-9-dtype0]",
    ),
    Fault(
        "attention", "native", "input", "csrc/cpu/attention_forward.cpp",
        "        const int64_t head = kv_head * p.group;\n",
        "        const int64_t head = kv_head * p.group;\n"
        "        *s.key_row<T>(key, kv_head, 0) = from_float<T>(C(0));\n",
        truth("attention", "native", "gqa 4:2"),
    ),
    Fault(
        "attention", "native", "input", "csrc/cpu/attention_gradient.h",
        "        transpose(saved.out, to.outs);\n",
        "        transpose(saved.out, to.outs);\n"
        "        *s.query_row<T>(saved.grad_out, h, i) = from_float<T>(to.outs[0]);\n",
        truth("attention", "native", "one element"),
    ),
    Fault(
        "attention", "native", "mask", "csrc/cpu/attention.h",
        "diagonal - std::min(options.left, far);",
        "diagonal - std::min(options.left, far) - 1;",
        truth("attention", "native", "window"),
    ),
    Fault(
        "attention", "native", "mask", "csrc/cpu/philox.h",
        "round < 10; ++round",
        "round < 9; ++round",
        "test_attention.py::test_dropout_has_the_same_bits_on_every_instruction_set",
    ),
    Fault(
        "attention", "native", "scale", "csrc/cpu/attention_scores.h",
        "return fma(-t, t, splat(C(1)));",
        "return splat(C(1)) + C(0) * t;",
        truth("attention", "native", "softcap"),
    ),
    Fault(
        "attention", "native", "block", "csrc/cpu/attention_grad_bias.cpp",
        "std::min(W, key_end - key), to);",
        "std::min(W, key_end - key) - (key > j), to);",
        truth("attention", "native", "bias of one number a head"),
    ),
    Fault(
        "attention", "native", "epilogue", "csrc/cpu/attention_backward.cpp",
        "std::exp(p.sink<C>(h) - terms.lse[row])",
        "std::exp(p.sink<C>(h))",
        truth("attention", "native", "sinks"),
    ),
    Fault(
        "attention", "native", "precision", "csrc/cpu/vec.h",
        "fma(scale, fma(p * r, r, r), scale - C(1))",
        "scale * (fma(p * r, r, r) + C(1)) - C(1)",
        "test_attention.py::test_tanh_is_exact_to_four_ulp[dtype0]",
    ),
    Fault(
        "attention", "triton", "mask", "kernels/attention_tiles.py",
        "    else:\n        seen = keys <= rows + rightmost",
        "    else:\n        seen = keys < rows + rightmost",
        truth("attention", "triton", "causal, more keys"),
    ),
    Fault(
        "attention", "triton", "mask", "kernels/attention_tiles.py",
        "begin = tl.maximum(0, start_n - rightmost) // BLOCK_M * BLOCK_M",
        "begin = tl.maximum(0, start_n - rightmost + BLOCK_M) // BLOCK_M * BLOCK_M",
        truth("attention", "triton", "causal"),
    ),
    Fault(
        "attention", "triton", "mask", "kernels/attention_tiles.py",
        "seen = (keys >= rows + leftmost) & (keys <= rows + rightmost)",
        "seen = (keys > rows + leftmost) & (keys <= rows + rightmost)",
        truth("attention", "triton", "window"),
    ),
    Fault(
        "attention", "triton", "mask", "kernels/philox.py",
        "return (words >> 16).to(tl.int32) >= threshold",
        "return (words >> 16).to(tl.int32) > threshold + 1000",
        "test_attention_triton.py::test_dropout_draws_the_references_bits[0-0.1]",
    ),
    Fault(
        "attention", "triton", "scale", "kernels/attention_backward.py",
        "stride_dk, dk * scale, HEAD, DIM)",
        "stride_dk, dk, HEAD, DIM)",
        truth("attention", "triton", "gqa 4:2"),
    ),
    Fault(
        "attention", "triton", "scale", "kernels/attention_backward.py",
        "        ds = ds * slant\n",
        "        ds = ds * 1.0\n",
        truth("attention", "triton", "softcap"),
    ),
    Fault(
        "attention", "triton", "scale", "kernels/attention_scores.py",
        "distance = tl.abs(start_m + seq_k - seq_q - start_n + offs_m - offs_n)",
        "distance = tl.abs(start_m - start_n + offs_m - offs_n)",
        truth("attention", "triton", "alibi"),
    ),
    Fault(
        "attention", "triton", "block", "kernels/attention_tiles.py",
        "return begin, whole, rest, end",
        "return begin, whole, rest, end - 1",  # only a block of a single key is missed
        truth("attention", "triton", "causal, more keys"),
    ),
    Fault(
        "attention", "triton", "block", "kernels/attention_tiles.py",
        "tiles.load([batch, head, start, 0])",
        "tiles.load([batch, 0, start, 0])",  # of a group's heads only the first one
        truth("attention", "triton", "gqa 4:2", "bfloat16"),
    ),
    Fault(
        "attention", "triton", "block", "kernels/attention_tiles.py",
        "lines.load([line, start])",
        "lines.load([0, start])",
        truth("attention", "triton", "causal", "bfloat16"),
    ),
    Fault(
        "attention", "triton", "mask", "kernels/attention_tiles.py",
        "first = tl.maximum(0, start_n + BLOCK_N - 1 - rightmost)",
        "first = tl.maximum(0, start_n - rightmost)",  # where no mask is thought to be needed
        truth("attention", "triton", "causal", "bfloat16"),
    ),
    Fault(
        "attention", "triton", "block", "kernels/attention_extras.py",
        "range(own_batch, own_batch + 1 if BIAS_BATCHES else batches)",
        "range(own_batch, own_batch + 1)",
        truth("attention", "triton", "bias per head"),
    ),
    Fault(
        "attention", "triton", "epilogue", "kernels/attention_forward.py",
        "(row_max * LN_2 if FOLD else row_max) + (tl.log2",
        "(row_max if FOLD else row_max) + (tl.log2",
        truth("attention", "triton", "lse", "bfloat16"),
    ),
    Fault(
        "attention", "triton", "epilogue", "kernels/attention_forward.py",
        "row_sum = tl.full([BLOCK_M], 256.0 if FP8 else 1.0, tl.float32)",
        "row_sum = tl.full([BLOCK_M], 0.0, tl.float32)",
        truth("attention", "triton", "sinks"),
    ),
    Fault(
        "attention", "triton", "precision", "kernels/attention.py",
        '"PRECISION": "tf32" if tf32(query) else "ieee"',
        '"PRECISION": "tf32"',
        ieee("grad_query_kernel"),
    ),
    Fault(
        "attention", "triton", "precision", "kernels/attention_backward.py",
        "add_product(ds.to(q.dtype), q, dk, PRECISION)",
        "tl.dot(ds.to(q.dtype), q, dk)",  # TF32 is Triton's default
        ieee("grad_key_value_kernel"),
    ),
    Fault(
        "attention", "triton", "unwritten", "kernels/attention_tiles.py",
        "mask = (rows[:, None] < size - start) & (cols[None, :] < WIDTH)\n    tl.store",
        "mask = (rows[:, None] < size - start - 1) & (cols[None, :] < WIDTH)\n    tl.store",
        truth("attention", "triton", "odd sizes"),
    ),
    Fault(
        "attention", "triton", "input", "kernels/attention.py",
        "    lines = made(lse.new_empty(",
        "    grad_out *= 2.0\n    out *= 0.5\n    lines = made(lse.new_empty(",
        truth("attention", "triton", "odd sizes"),
    ),
)  # fmt: skip

CONVOLUTION = (
    Fault(
        "conv2d_act", "native", "mask", "csrc/cpu/conv2d_direct.cpp",
        "if (h < 0 || h >= s.height) continue;",
        "if (h <= 0 || h >= s.height) continue;",
        truth("conv2d_act", "native", "one channel"),
    ),
    Fault(
        "conv2d_relu_max_pool2d", "native", "mask", "csrc/cpu/conv2d_pool.h",
        "std::min(pool.kernel[1], conv_w - left)",
        "std::min(pool.kernel[1], conv_w - left - 1)",
        truth("conv2d_relu_max_pool2d", "native", "stem"),
    ),
    Fault(
        "conv2d_act", "native", "scale", "csrc/cpu/conv2d_direct.cpp",
        "bias && k < valid\n",
        "false && bias && k < valid\n",
        truth("conv2d_act", "native", "one channel"),
    ),
    Fault(
        "conv2d_relu_max_pool2d", "native", "block", "csrc/cpu/conv2d_direct.cpp",
        "t < s.taps; t += kTapChunk<A>",
        "t == 0 || t + kTapChunk<A> <= s.taps; t += kTapChunk<A>",
        truth("conv2d_relu_max_pool2d", "native", "11x11 stride 4"),
    ),
    Fault(
        "conv2d_relu_max_pool2d", "native", "block", "csrc/cpu/conv2d_backward.cpp",
        "part = 1; part < parts; ++part",
        "part = 2; part < parts; ++part",  # the second thread's images
        truth("conv2d_relu_max_pool2d", "native", "4096 elements"),
    ),
    Fault(
        "conv2d_act", "native", "epilogue", "csrc/cpu/conv2d_pool.h",
        "store(to + k, select((value < 0) & relu, Vec<A>{}, value));",
        "store(to + k, select((value < 0) & relu, value * A(0.01), value));",
        truth("conv2d_act", "native", "one channel"),
    ),
    Fault(
        "conv2d_relu_max_pool2d", "native", "epilogue", "csrc/cpu/conv2d_pool.h",
        "value <= 0 ? lanes(kBlocked) : place",
        "value < 0 ? lanes(kBlocked) : place",
        "test_conv2d_relu_max_pool2d.py::test_winners_are_torchs[pool0]",
    ),
    Fault(
        "conv2d_act", "native", "epilogue", "csrc/cpu/activation.h",
        "return select(saved <= 0, Vec<A>{}, in_register(grad));",
        "return grad;",
        truth("conv2d_act", "native", "4096 elements"),
    ),
    Fault(
        "conv2d_act", "native", "precision", "csrc/cpu/conv2d_direct.cpp",
        "splat(pixel[p])",
        f"splat({ROUNDED.format('A', 'pixel[p]')})",
        truth("conv2d_act", "native", "one channel"),
    ),
    Fault(
        "conv2d_relu_max_pool2d", "native", "unwritten", "csrc/cpu/conv2d_direct.cpp",
        "(row + 1) * s.pool_w, filters)",
        "(row + 1) * s.pool_w - 1, filters)",
        truth("conv2d_relu_max_pool2d", "native", "windows apart"),
    ),
    Fault(
        "conv2d_act", "native", "input", "csrc/cpu/conv2d_act.cpp",
        "        return g;",
        "        const_cast<T&>(from[i]) = T{};\n"
        "        return g;",
        truth("conv2d_act", "native", "4096 elements"),
    ),
    Fault(
        "conv2d_act", "native", "mask", "csrc/cpu/conv2d_depthwise_planes.cpp",
        "front = (*std::max_element(shift.begin(), shift.end()) + lanes - 1) / lanes * lanes;",
        "front = 0;",
        truth("conv2d_act", "native", "depthwise, planes"),
    ),
    Fault(
        "conv2d_act", "native", "block", "csrc/cpu/conv2d_depthwise_pixels.cpp",
        "const int64_t top = grad_input ? std::max<int64_t>(0, begin - above) : begin;",
        "const int64_t top = begin;",
        "test_conv2d_act.py::test_bands_of_a_depthwise_gradient",
    ),
    Fault(
        "conv2d_act", "native", "mask", "csrc/cpu/conv2d_winograd_tiles.h",
        "if (y < 0 || y >= height) {",
        "if (y <= 0 || y >= height) {",
        truth("conv2d_act", "native", "4096 elements"),
    ),
    Fault(
        "conv2d_act", "native", "block", "csrc/cpu/conv2d_winograd.cpp",
        "c < filters.channels; c += kTerms",
        "c == 0 || c + kTerms <= filters.channels; c += kTerms",
        "test_conv2d_winograd.py::test_kernels_in_float64[image5-9-padding5-planes]",
    ),
    Fault(
        "conv2d_relu_max_pool2d", "native", "epilogue", "csrc/cpu/conv2d_winograd_outputs.h",
        "place = value > most ?",
        "place = value >= most ?",
        "test_conv2d_winograd.py::test_the_first_of_equals_wins[32-pixels]",
    ),
    Fault(
        "conv2d_act", "native", "block", "csrc/cpu/conv2d_panels.h",
        "begun || k > 0, kPointwiseChain)",
        "begun, kPointwiseChain)",
        "test_conv2d_act.py::test_filters_of_one_pixel",
    ),
    Fault(
        "conv2d_act", "triton", "mask", "kernels/conv2d.py",
        "mask_x = (h >= 0) & (h < height) &",
        "mask_x = (h > 0) & (h < height) &",
        truth("conv2d_act", "triton", "padded"),
    ),
    Fault(
        "conv2d_relu_max_pool2d", "triton", "mask", "kernels/conv2d_relu_max_pool2d.py",
        "mask = mask_o & (h >= 0) & (h < height) &",
        "mask = mask_o & (h >= 0) & (h < height - 1) &",
        truth("conv2d_relu_max_pool2d", "triton", "stride 1 windows"),
    ),
    Fault(
        "conv2d_act", "triton", "scale", "kernels/conv2d.py",
        "acc += bias.to(tl.float32)[None, :]",
        "acc += 0.0 * bias.to(tl.float32)[None, :]",
        truth("conv2d_act", "triton", "1x1"),
    ),
    Fault(
        "conv2d_act", "triton", "block", "kernels/conv2d.py",
        "else tl.cdiv(channels, BLOCK_K) * taps",
        "else tl.cdiv(channels, BLOCK_K) * taps - 1",
        truth("conv2d_act", "triton", "channels_last"),
    ),
    Fault(
        "conv2d_act", "triton", "block", "kernels/conv2d_weight.py",
        "(offs_s < splits)[:, None]",
        "(offs_s < splits - 1)[:, None]",
        truth("conv2d_act", "triton", "channels_last"),
    ),
    Fault(
        "conv2d_relu_max_pool2d", "triton", "epilogue", "kernels/conv2d.py",
        "index = tl.where(acc <= 0, BLOCKED, index)",
        "index = tl.where(acc < 0, BLOCKED, index)",
        truth("conv2d_relu_max_pool2d", "triton", "no bias"),
    ),
    Fault(
        "conv2d_act", "triton", "precision", "kernels/conv2d.py",
        'return "tf32" if self.product == "tf32" else "ieee"',
        'return "ieee" if self.product == "half" else "tf32"',
        ieee("weight_grad_kernel"),
    ),
    Fault(
        "conv2d_act", "triton", "unwritten", "kernels/conv2d.py",
        "mask_o = along(mask_p, PIXEL_DIM) & along(mask_f, 1 - PIXEL_DIM)",
        "mask_o = along(mask_p, PIXEL_DIM) & along(offs_f < filters - 1, 1 - PIXEL_DIM)",
        truth("conv2d_act", "triton", "no bias"),
    ),
    Fault(
        "conv2d_act", "triton", "input", "kernels/conv2d_act.py",
        "    layout = memory_format(input, weight)\n    grad_input",
        "    layout = memory_format(input, weight)\n"
        "    grad_out.masked_fill_(out <= 0, 0.0) if out is not None else None\n    grad_input",
        truth("conv2d_act", "triton", "no bias"),
    ),
)  # fmt: skip

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

FAULTS = (*ATTENTION, *CONVOLUTION, *ADAM, *SGD)
