from __future__ import annotations

from .fault import ROUNDED, Fault, ieee, truth

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
        "const bool own = oh >= begin;",
        "const bool own = true;",
        "test_conv2d_act.py::test_bands_of_a_depthwise_gradient[3-1-1-torch.channels_last]",
    ),
    Fault(
        "conv2d_act", "native", "mask", "csrc/cpu/conv2d_band.h",
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
        "test_conv2d_act.py::test_filters_of_one_pixel"
        "[image0-140-stride0-torch.channels_last-torch.float32]",
    ),
    Fault(
        "conv2d_act", "native", "mask", "csrc/cpu/conv2d_windows.h",
        "return at > 0 ? divide_up(at, div) : at / div;",
        "return at / div;",
        "test_conv2d_windows.py::test_kernels_in_float64[strided-none]",
    ),
    Fault(
        "conv2d_act", "native", "block", "csrc/cpu/conv2d_windows_weight.cpp",
        "band_row += sources;",
        "band_row += sources - 1;",
        "test_conv2d_windows.py::test_kernels_in_float64[uneven-none]",
    ),
    Fault(
        "conv2d_act", "native", "precision", "csrc/cpu/conv2d_windows_weight.cpp",
        "kShortChain = 32",
        "kShortChain = 128",
        "test_conv2d_few_pixels.py::test_it_is_as_true_as_torchs[1x1-torch.float32]",
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
        "conv2d_act", "triton", "precision", "kernels/conv2d_tiles.py",
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
    Fault(
        "conv2d_act", "triton", "mask", "kernels/conv2d_boxes.py",
        "count = tl.minimum(tl.cdiv(size - first, stride), out_size + moved)",
        "count = tl.cdiv(size - first, stride)",
        "test_conv2d_boxes.py::test_what_no_tap_meets_may_be_infinite[7-0]",
    ),
    Fault(
        "conv2d_act", "triton", "block", "kernels/conv2d_boxes.py",
        "described.load([image, row, column, channel])",
        "described.load([image, row, column, 0])",
        "test_conv2d_boxes.py::test_boxes_meet_every_border[1x1]",
    ),
    Fault(
        "conv2d_relu_max_pool2d", "triton", "epilogue", "kernels/conv2d_boxes.py",
        "tl.permute(tile, (0, 2, 1, 3, 4))",
        "tl.permute(tile, (0, 1, 2, 3, 4))",
        "test_conv2d_boxes.py::test_boxes_meet_every_border[1x1, pooled]",
    ),
)  # fmt: skip
