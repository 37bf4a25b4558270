// The gradients of a convolution's weight and bias: products of the source pixels that a tap meets
// with the output's gradients, summed over all of these.
#include <vector>

#include "conv2d_windows.h"
#include "huge_pages.h"

namespace bigops {
namespace {

constexpr int64_t kGradPixels = 2 * kPointwiseChain;  // of a tile, about
// Where there are few pixels, one chain would be most of a sum, and its rounding error a sum's.
constexpr int64_t kFewPixels = 512, kShortChain = 32, kBiasChain = 16;
constexpr int64_t kSliceChannels = 16;  // worth reading all gradients for
constexpr int64_t kTileNumbers = 1 << 17;  // of a tile's sources

// What one thread sums: for channels [begin, end) of a group, over output rows [first, last) of all
// images, one after another's.
template <class A>
struct Share {
    int64_t group, begin, end, first, last;
    A* sums;  // [panel of filters][tap][channel][filter]
    std::vector<double> bias;

    int64_t channels() const { return end - begin; }
};

template <class T>
class Gradients {
    using A = compute_t<T>;
    static constexpr int64_t W = Panels<A>::kWidth;

   public:
    Gradients(const View& grad_out, const OptionalView& saved, const View& input,
              const OptionalView& grad_weight, const OptionalView& grad_bias,
              const Conv2dParams& conv, const Conv2dShape& s, Slope<A> slope)
        : conv_(conv), s_(s), rows_(Axis::forward(conv, 0, s.kernel_h)),
          columns_(Axis::forward(conv, 1, s.kernel_w)), across_(columns_.most(s.conv_w)),
          panels_(divide_up(s.group_filters, W)), pitch_(panel_pitch<A>(s.group_filters)),
          input_(input), grad_(grad_out), slope_(slope),
          weight_(grad_weight), bias_(grad_bias) {
        if (saved) saved_.emplace(*saved);
    }

    void run(int threads) {
        std::vector<Share<A>> shares = deal(threads);
        const auto count = static_cast<int64_t>(shares.size());
#pragma omp parallel for num_threads(threads) schedule(dynamic)
        for (int64_t i = 0; i < count; ++i) sum(shares[static_cast<size_t>(i)]);
        const int64_t parts = parts_;
#pragma omp parallel for num_threads(threads) schedule(dynamic)
        for (int64_t i = 0; i < count; i += parts) write(&shares[static_cast<size_t>(i)]);
    }

   private:
    // By channels, if each thread gets enough of them, else by rows: then sums are added up.
    std::vector<Share<A>> deal(int threads) {
        const int64_t groups = conv_.groups, rows = s_.batch * s_.conv_h;
        const int64_t wanted = divide_up(threads, groups);
        const bool apart = s_.group_channels >= kSliceChannels * wanted;
        const int64_t slices = apart ? wanted : 1;
        parts_ = apart ? 1 : std::clamp<int64_t>(rows, 1, wanted);
        std::vector<Share<A>> shares;
        for (int64_t group = 0; group < groups; ++group)
            for (int64_t slice = 0; slice < slices; ++slice)
                for (int64_t part = 0; part < parts_; ++part)
                    shares.push_back({group, s_.group_channels * slice / slices,
                                      s_.group_channels * (slice + 1) / slices,
                                      rows * part / parts_, rows * (part + 1) / parts_, nullptr, {}});
        if (!weight_) return shares;
        int64_t size = 0;
        for (const Share<A>& share : shares) size += panels_ * sums_of_panel(share);
        sums_ = allocate<A>(size);
        A* at = sums_.get();
        for (Share<A>& share : shares) {
            share.sums = at;
            at += panels_ * sums_of_panel(share);
        }
        return shares;
    }

    int64_t sums_of_panel(const Share<A>& share) const {
        return s_.kernel_h * s_.kernel_w * share.channels() * W;
    }

    void sum(Share<A>& share) const {
        const int64_t pitch = band_pitch<A>(share.channels());
        const int64_t row_numbers = across_ * pitch;
        const int64_t most = std::max<int64_t>(1, kTileNumbers / (row_numbers * conv_.stride[0]));
        const int64_t high = std::clamp<int64_t>(
            std::min(kGradPixels / s_.conv_w, most), 1, std::max<int64_t>(1, share.last - share.first));
        const int64_t pixels = high * s_.conv_w, panel = pixels * pitch_;
        // A piece of each image has its own rows around.
        const int64_t pieces = high / s_.conv_h + 2;
        const int64_t band_rows = high * conv_.stride[0] + pieces * rows_.most(1);
        const Aligned<A> band = allocate<A>(weight_ ? band_rows * row_numbers + kLanes<A> : 1);
        const Aligned<A> grads = allocate<A>(panels_ * panel);
        const Aligned<A> kept = allocate<A>(saved_ ? panels_ * panel : 1);
        // Lanes beyond the last filter stay zero.
        std::fill_n(grads.get(), panels_ * panel, A{});
        if (saved_) std::fill_n(kept.get(), panels_ * panel, A{});
        if (weight_ && share.first == share.last)
            std::fill_n(share.sums, panels_ * sums_of_panel(share), A{});
        share.bias.assign(static_cast<size_t>(panels_ * W), 0.0);
        std::vector<int64_t> offsets(static_cast<size_t>(pixels));
        for (int64_t row = share.first; row < share.last; row += high) {
            const int64_t end = std::min(share.last, row + high);
            int64_t at = 0, band_row = 0;
            for (int64_t r = row; r < end;) {
                const int64_t n = r / s_.conv_h, y = r % s_.conv_h;
                const int64_t count = std::min(end - r, s_.conv_h - y);
                copy_gradients(share, n, y, count, grads.get() + at * pitch_, panel, grad_);
                if (saved_) copy_gradients(share, n, y, count, kept.get() + at * pitch_, panel, *saved_);
                if (weight_) {
                    const int64_t sources = rows_.most(count);
                    Image<const T> from(input_);
                    from.data += (share.group * s_.group_channels + share.begin) * from.stride_c;
                    copy_band(from, n, s_.height, s_.width, share.channels(), rows_.least(y),
                              sources, columns_.least(0), across_,
                              band.get() + band_row * row_numbers, pitch);
                    for (int64_t i = 0; i < count * s_.conv_w; ++i)
                        offsets[static_cast<size_t>(at + i)] =
                            (band_row + i / s_.conv_w * conv_.stride[0]) * row_numbers +
                            i % s_.conv_w * conv_.stride[1] * pitch;
                    band_row += sources;
                }
                at += count * s_.conv_w;
                r += count;
            }
            for (int64_t p = 0; p < panels_; ++p) {
                A* grad = grads.get() + p * panel;
                if (saved_) slope_(at * pitch_, kept.get() + p * panel, grad);
                if (share.begin == 0 && bias_) add_bias(grad, at, share.bias.data() + p * W);
                if (weight_)
                    add_products(share, band.get(), offsets.data(), row_numbers, pitch, grad, at,
                                 share.sums + p * sums_of_panel(share), p, row > share.first);
            }
        }
    }

    // grads[panel][pixel][filter] of rows [y, y + count) of an image.
    void copy_gradients(const Share<A>& share, int64_t n, int64_t y, int64_t count, A* to,
                        int64_t panel, const Image<const T>& image) const {
        for (int64_t p = 0; p < panels_; ++p, to += panel)
            for_rows(image, n, share.group * s_.group_filters + p * W, y, s_.conv_w,
                     count * s_.conv_w, [&](auto&, const T* from, int64_t first, int64_t run) {
                         copy_2d(from, image.stride_w, image.stride_c, to + first * pitch_,
                                 pitch_, int64_t{1}, run, std::min(W, s_.group_filters - p * W));
                     });
    }

    void add_bias(const A* grad, int64_t pixels, double* bias) const {
        for (int64_t k = 0; k < pitch_; k += kLanes<A>) {
            for_chains(pixels, kBiasChain, [&](int64_t first, int64_t count) {
                Vec<A> total = {};
                for (int64_t i = first; i < first + count; ++i)
                    total += load(grad + i * pitch_ + k);
                for (int i = 0; i < kLanes<A>; ++i) bias[k + i] += total[i];
            });
        }
    }

    void add_products(const Share<A>& share, const A* band, const int64_t* offsets,
                      int64_t row_numbers, int64_t pitch, const A* grad, int64_t pixels, A* sums,
                      int64_t p, bool begun) const {
        const int64_t channels = share.channels();
        const int64_t vectors =
            divide_up(std::min(W, s_.group_filters - p * W), static_cast<int64_t>(kLanes<A>));
        const bool joined = pitch == channels && conv_.dilation[1] == 1;
        const int64_t chain =
            s_.batch * s_.conv_h * s_.conv_w > kFewPixels ? kPointwiseChain : kShortChain;
        const int64_t columns = joined ? 1 : s_.kernel_w;
        const int64_t numbers = joined ? s_.kernel_w * channels : channels;
        for_chains(pixels, kPointwiseChain, [&](int64_t i, int64_t terms) {
            const int64_t each = divide_up(terms, divide_up(terms, chain));
            for (int64_t tap = 0; tap < s_.kernel_h * columns; ++tap)
                tile_matmul<A>(numbers, vectors, terms,
                               band + tap / columns * conv_.dilation[0] * row_numbers +
                                   tap % columns * conv_.dilation[1] * pitch,
                               1, offsets + i, grad + i * pitch_, pitch_, sums + tap * numbers * W,
                               W, begun || i > 0, each);
        });
    }

    // Adds up the parts of a slice.
    void write(Share<A>* shares) const {
        Share<A>& share = shares[0];
        const int64_t k0 = share.group * s_.group_filters, channels = share.channels();
        for (int64_t part = 1; part < parts_; ++part) {
            for (size_t k = 0; k < share.bias.size(); ++k) share.bias[k] += shares[part].bias[k];
            const int64_t count = weight_ ? panels_ * sums_of_panel(share) : 0;
            for (int64_t i = 0; i < count; i += kLanes<A>)
                store(share.sums + i,
                      load(share.sums + i) + load(shares[part].sums + i));
        }
        for (int64_t k = 0; bias_ && share.begin == 0 && k < s_.group_filters; ++k)
            bias_->template ptr<T>()[(k0 + k) * bias_->strides[0]] =
                from_float<T>(static_cast<A>(share.bias[static_cast<size_t>(k)]));
        if (!weight_) return;
        const Taps<T> taps = Taps<T>(*weight_, k0, false).from(share.begin);
        for (int64_t p = 0; p < panels_; ++p) {
            const A* sums = share.sums + p * sums_of_panel(share);
            taps.for_matrices(channels, p * W, std::min(W, s_.group_filters - p * W),
                              channels * W, W,
                              [&](T* to, int64_t to_i, int64_t to_j, int64_t at, int64_t i,
                                  int64_t j, int64_t rows, int64_t columns) {
                                  copy_2d(sums + at, i, j, to, to_i, to_j, rows, columns);
                              });
        }
    }

    Conv2dParams conv_;
    Conv2dShape s_;
    Axis rows_, columns_;
    int64_t across_, panels_, pitch_, parts_ = 1;
    Image<const T> input_, grad_;
    std::optional<Image<const T>> saved_;
    Slope<A> slope_;
    OptionalView weight_, bias_;
    Aligned<A> sums_;  // of all shares
};

void windows_grad_weight(const View& grad_out, const OptionalView& saved, const View& input,
                         const View& like, const OptionalView& grad_weight,
                         const OptionalView& grad_bias, const Conv2dParams& conv,
                         Activation activation) {
    const Conv2dShape s = conv2d_shape(input, like, grad_out, conv, kNoPool);
    with_slope(input.dtype, activation, [&](auto zero, auto slope) {
        Gradients<decltype(zero)>(grad_out, saved, input, grad_weight, grad_bias, conv, s, slope)
            .run(threads_for(s.operations()));
    });
}

}  // namespace

void conv2d_windows_backward(const View& grad_out, const View& input, const View& weight,
                             const OptionalView& saved, const OptionalView& grad_input,
                             const OptionalView& grad_weight, const OptionalView& grad_bias,
                             const OptionalView& grad_residual, const Conv2dParams& conv,
                             Activation activation) {
    require(saved || activation == Activation::none,
            "the activation's gradient needs what was saved");
    bias_fits(grad_bias, weight);
    require(!saved || (same_shape(*saved, grad_out) && saved->dtype == grad_out.dtype),
            "saved does not fit grad_out");
    require(!grad_input || (same_shape(*grad_input, input) && grad_input->dtype == input.dtype),
            "grad_input does not fit input");
    require(!grad_weight || (same_shape(*grad_weight, weight) && grad_weight->dtype == input.dtype),
            "grad_weight does not fit weight");
    if (grad_residual) {  // which is that before the activation
        activation_backward(grad_out, saved, *grad_residual, grad_bias, activation);
        conv2d_windows_backward(*grad_residual, input, weight, {}, grad_input, grad_weight, {}, {},
                                conv, Activation::none);
        return;
    }
    expect_writes(grad_weight);
    const OptionalView kept = activation == Activation::none ? std::nullopt : saved;
    if (grad_input) windows_grad_input(grad_out, kept, weight, *grad_input, conv, activation);
    if (grad_weight || grad_bias)
        windows_grad_weight(grad_out, kept, input, weight, grad_weight, grad_bias, conv, activation);
}

}  // namespace bigops
