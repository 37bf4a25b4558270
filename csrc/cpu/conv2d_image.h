// The image as convolution's backward reads and writes it: padded, pixel by pixel, or unfolded; and
// the passes over it.
#pragma once

#include <vector>

#include "conv2d_runs.h"

namespace bigops {

// One group's image as the passes see it: padded, pixel by pixel, or unfolded.
struct PatchLayout {
    bool unfold;
    int64_t height, width;             // of the padded image
    int64_t padded, size;              // numbers in it; numbers in what the passes read
    int64_t pixel_row, pixel;          // from one output row, column to the next
    int64_t filter;                    // from one filter to the next
    int32_t place, place_row, place_reciprocal;  // place p: p * place + p / pool_w * place_row
    std::vector<Pass> weight_passes, input_passes;
    int64_t run;                                      // contiguous numbers of a patch in the image
    std::vector<std::pair<int64_t, int64_t>> runs;    // where each lies in the patch, in the image
};

inline void add_passes(std::vector<Pass>& passes, int lanes, int max_rows, int64_t runs,
                       int64_t length, int64_t image, int64_t image_run, int64_t weight,
                       int64_t weight_run) {
    const int64_t vectors = (length + lanes - 1) / lanes;
    const int64_t pieces = (vectors + kMaxWidth - 1) / kMaxWidth;
    for (int64_t i = 0; i < pieces; ++i) {
        const int64_t from = i * vectors / pieces, to = (i + 1) * vectors / pieces;
        const int64_t valid = std::min(length, to * lanes) - (to - 1) * lanes;
        for (int64_t r = 0; r < runs; r += max_rows)
            passes.push_back({static_cast<int>(std::min<int64_t>(max_rows, runs - r)),
                              static_cast<int>(to - from), static_cast<int>(valid),
                              image + r * image_run + from * lanes, image_run,
                              weight + r * weight_run + from * lanes, weight_run});
    }
}

inline PatchLayout patch_layout(const Conv2dShape& s, const Conv2dParams& conv,
                                const Pool2dParams& pool, int lanes) {
    PatchLayout l;
    const auto vectors = [&](int64_t n) { return (n + lanes - 1) / lanes; };
    const int64_t c = s.group_channels;
    const auto reach = [&](int i, int64_t outputs, int64_t kernel, int64_t size) {
        return std::max((outputs - 1) * conv.stride[i] + (kernel - 1) * conv.dilation[i] + 1,
                        size + conv.padding[i]);
    };
    l.height = reach(0, s.conv_h, s.kernel_h, s.height);
    l.width = reach(1, s.conv_w, s.kernel_w, s.width);
    l.padded = l.height * l.width * c;
    l.filter = vectors(s.taps) * lanes;
    const bool dense = conv.dilation[1] == 1 || s.kernel_w == 1;  // a kernel row is one run
    const int64_t run = l.run = dense ? s.kernel_w * c : c;
    for (int64_t kh = 0; kh < s.kernel_h; ++kh)
        for (int64_t kw = 0; kw < s.kernel_w * c; kw += run)
            l.runs.emplace_back(kh * s.kernel_w * c + kw, kh * conv.dilation[0] * l.width * c +
                                                              kw * conv.dilation[1]);
    l.unfold = s.taps / run > 1 && 4 * vectors(s.taps) < 3 * (s.taps / run) * vectors(run);
    // Three kernel rows at once for grad_weight, whose image stays in L1; one for grad_input, whose
    // filters would not.
    if (l.unfold) {
        l.pixel = l.filter;
        l.pixel_row = l.pixel * s.conv_w;
        l.size = l.pixel_row * s.conv_h;
        add_passes(l.weight_passes, lanes, 1, 1, s.taps, 0, 0, 0, 0);
        add_passes(l.input_passes, lanes, 1, 1, s.taps, 0, 0, 0, 0);
    } else {
        l.pixel = conv.stride[1] * c;
        l.pixel_row = conv.stride[0] * l.width * c;
        l.size = l.padded;
        const int64_t image_row = conv.dilation[0] * l.width * c;
        if (dense) {
            add_passes(l.weight_passes, lanes, kMaxRows, s.kernel_h, run, 0, image_row, 0, run);
            add_passes(l.input_passes, lanes, 1, s.kernel_h, run, 0, image_row, 0, run);
        } else {
            for (int64_t kh = 0; kh < s.kernel_h; ++kh)
                for (auto* passes : {&l.weight_passes, &l.input_passes})
                    add_passes(*passes, lanes, passes == &l.weight_passes ? kMaxRows : 1,
                               s.kernel_w, c, kh * image_row, conv.dilation[1] * c,
                               kh * s.kernel_w * c, c);
        }
    }
    require(l.size + l.filter < (int64_t{1} << 31) && l.filter * s.group_filters < int64_t{1} << 31,
            "input too large for this kernel");
    l.place = static_cast<int32_t>(l.pixel);
    l.place_row = static_cast<int32_t>(l.pixel_row - pool.kernel[1] * l.pixel);
    l.place_reciprocal = static_cast<int32_t>(65535 / pool.kernel[1] + 1);  // exact below 256
    return l;
}

// Every output pixel's patch of the padded image, side by side.
template <class A>
void unfold(const Conv2dShape& s, const Conv2dParams& conv, const PatchLayout& l, const A* image,
            A* to) {
    const int64_t step = conv.stride[1] * s.group_channels;
    for (int64_t oh = 0; oh < s.conv_h; ++oh) {
        const A* from = image + oh * conv.stride[0] * l.width * s.group_channels;
        for (int64_t ow = 0; ow < s.conv_w; ++ow, from += step, to += l.pixel)
            for (const auto& [patch_at, image_at] : l.runs)
                // Whole vectors: what is too much, the next run overwrites.
                for (int64_t i = 0; i < l.run; i += kLanes<A>)
                    store(to + patch_at + i, load(from + image_at + i));
    }
}

template <class A>
void fold(const Conv2dShape& s, const Conv2dParams& conv, const PatchLayout& l, const A* from,
          A* image) {
    const int64_t step = conv.stride[1] * s.group_channels;
    for (int64_t oh = 0; oh < s.conv_h; ++oh) {
        A* to = image + oh * conv.stride[0] * l.width * s.group_channels;
        for (int64_t ow = 0; ow < s.conv_w; ++ow, to += step, from += l.pixel)
            for (const auto& [patch_at, image_at] : l.runs)
                for (int64_t i = 0; i < l.run; ++i) to[image_at + i] += from[patch_at + i];
    }
}

}  // namespace bigops
