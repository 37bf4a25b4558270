from __future__ import annotations

from .fault import ROUNDED, Fault, ieee, truth

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
        "splat(numbers[i / V * a_row])",
        f"splat({ROUNDED.format('C', 'numbers[i / V * a_row]')})",
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
