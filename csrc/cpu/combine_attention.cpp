// combine_attention: out = sum_s w_s out_s with w_s = exp(lse_s - lse), lse = log sum_s exp(lse_s),
// and its gradients: with a_s = grad_out . out_s,
//   d out_s = w_s grad_out,  d lse_s = w_s (a_s - sum_t w_t a_t + grad_lse).
// Weights are taken from lse_s anew in the backward pass, so that nothing has to be saved but inputs.
#include "combine_attention.h"

#include "layout.h"
#include "microkernel.h"
#include "threads.h"
#include "vec.h"

namespace bigops {
namespace {

// A row of out, or of one part of outs: where it begins and how far apart its elements are.
struct Place {
    int64_t offset, stride;
};

// `at` counts batch, head and row; the size, if there is one, comes last.
Place place(const View& view, const int64_t (&at)[3], int64_t part = -1) {
    const int lead = part < 0 ? 0 : 1;
    int64_t offset = part < 0 ? 0 : part * view.strides[0];
    for (int d = 0; d < 3; ++d) offset += at[d] * view.strides[d + lead];
    return {offset, view.ndim > lead + 3 ? view.strides[lead + 3] : 0};
}

struct Sizes {
    int64_t parts, batch, heads, rows, size;
    int64_t all_rows() const { return batch * heads * rows; }
    void split(int64_t row, int64_t (&at)[3]) const {
        at[0] = row / (heads * rows);
        at[1] = row / rows % heads;
        at[2] = row % rows;
    }
};

bool shaped(const View& view, const Sizes& s, bool parted, bool sized) {
    const int64_t whole[] = {s.parts, s.batch, s.heads, s.rows, s.size};
    const int64_t* wanted = whole + (parted ? 0 : 1);
    const int ndim = 3 + parted + sized;
    return view.ndim == ndim && std::equal(wanted, wanted + ndim, view.shape);
}

Sizes sizes_of(const View& outs, const View& lses) {
    require(outs.ndim == 5, "outs must have 5 dimensions");
    const Sizes s = {outs.shape[0], outs.shape[1], outs.shape[2], outs.shape[3], outs.shape[4]};
    require(shaped(lses, s, true, false), "lses must have outs' shape without the last dimension");
    require(lses.dtype == (outs.dtype == DType::f64 ? DType::f64 : DType::f32),
            "lses must be float32 (float64 for float64)");
    return s;
}

int threads_of(const Sizes& s) {
    return threads_for(static_cast<double>(s.all_rows() * s.parts * (2 * s.size + 64)));
}

template <class C>
void read_weights(const Sizes& s, const View& lses, const int64_t (&at)[3], double* weights) {
    for (int64_t part = 0; part < s.parts; ++part)
        weights[part] = static_cast<double>(lses.ptr<C>()[place(lses, at, part).offset]);
}

template <class T>
void forward(const Sizes& s, const View& outs, const View& lses, const View& out, const View& lse) {
    using C = compute_t<T>;
    constexpr int L = kLanes<C>;
    const int threads = threads_of(s);
    const Arena memory(threads * (s.parts + 1) * static_cast<int64_t>(sizeof(double)));
#pragma omp parallel num_threads(threads)
    {
        auto* weights = reinterpret_cast<double*>(memory.at(0)) + omp_get_thread_num() * s.parts;
#pragma omp for
        for (int64_t row = 0; row < s.all_rows(); ++row) {
            int64_t at[3];
            s.split(row, at);
            read_weights<C>(s, lses, at, weights);
            lse.ptr<C>()[place(lse, at).offset] =
                static_cast<C>(combine_weights(weights, s.parts));
            const Place to = place(out, at);
            for (int64_t d = 0; d < s.size; d += L) {
                const int count = static_cast<int>(std::min<int64_t>(L, s.size - d));
                Vec<C> sum = {};
                for (int64_t part = 0; part < s.parts; ++part) {
                    // Not 0 times what a part that saw nothing left there.
                    if (weights[part] == 0) continue;
                    const Place from = place(outs, at, part);
                    const T* p = outs.ptr<T>() + from.offset + d * from.stride;
                    sum = fma(detail::load_strided(p, from.stride, count),
                              splat(static_cast<C>(weights[part])), sum);
                }
                detail::store_strided(out.ptr<T>() + to.offset + d * to.stride, to.stride, sum,
                                      count);
            }
        }
    }
}

template <class T>
void backward(const Sizes& s, const View& grad_out, const View& grad_lse, const View& outs,
              const View& lses, const View* grad_outs, const View* grad_lses) {
    using C = compute_t<T>;
    constexpr int L = kLanes<C>;
    const int threads = threads_of(s);
    const Arena memory(threads * 2 * (s.parts + 1) * static_cast<int64_t>(sizeof(double)));
#pragma omp parallel num_threads(threads)
    {
        auto* weights = reinterpret_cast<double*>(memory.at(0)) + 2 * omp_get_thread_num() * s.parts;
        double* dots = weights + s.parts;
#pragma omp for
        for (int64_t row = 0; row < s.all_rows(); ++row) {
            int64_t at[3];
            s.split(row, at);
            read_weights<C>(s, lses, at, weights);
            combine_weights(weights, s.parts);
            const Place whole = place(grad_out, at);
            double mean = 0;
            for (int64_t part = 0; part < s.parts; ++part) {
                const Place from = place(outs, at, part);
                const Place to = grad_outs ? place(*grad_outs, at, part) : Place{};
                Vec<C> dot = {};
                for (int64_t d = 0; d < s.size; d += L) {
                    const int count = static_cast<int>(std::min<int64_t>(L, s.size - d));
                    const Vec<C> grad = detail::load_strided(
                        grad_out.ptr<T>() + whole.offset + d * whole.stride, whole.stride, count);
                    if (grad_outs)
                        detail::store_strided(grad_outs->ptr<T>() + to.offset + d * to.stride,
                                              to.stride,
                                              grad * static_cast<C>(weights[part]), count);
                    if (grad_lses && weights[part] != 0)
                        dot = fma(grad,
                                  detail::load_strided(
                                      outs.ptr<T>() + from.offset + d * from.stride, from.stride,
                                      count),
                                  dot);
                }
                dots[part] = static_cast<double>(sum(dot));
                mean += weights[part] * dots[part];
            }
            if (!grad_lses) continue;
            const auto own = static_cast<double>(grad_lse.ptr<C>()[place(grad_lse, at).offset]);
            for (int64_t part = 0; part < s.parts; ++part)
                grad_lses->ptr<C>()[place(*grad_lses, at, part).offset] =
                    static_cast<C>(weights[part] == 0 ? 0 : weights[part] * (dots[part] - mean + own));
        }
    }
}

template <class Run>
void dispatch(DType dtype, const Run& run) {
    switch (dtype) {
        case DType::f64: return run(double{});
        case DType::f32: return run(float{});
        case DType::bf16: return run(bf16{});
        case DType::f16: return run(f16{});
        default: require(false, "outs must be floating point");
    }
}

}  // namespace

void combine_attention(const View& outs, const View& lses, const View& out, const View& lse) {
    const Sizes s = sizes_of(outs, lses);
    require(shaped(out, s, false, true) && out.dtype == outs.dtype, "out must be one part of outs");
    require(shaped(lse, s, false, false) && lse.dtype == lses.dtype, "lse must be one part of lses");
    dispatch(outs.dtype, [&]<class T>(T) { forward<T>(s, outs, lses, out, lse); });
}

void combine_attention_backward(const View& grad_out, const View& grad_lse, const View& outs,
                                const View& lses, const View* grad_outs, const View* grad_lses) {
    const Sizes s = sizes_of(outs, lses);
    require(shaped(grad_out, s, false, true) && grad_out.dtype == outs.dtype,
            "grad_out must be one part of outs");
    require(shaped(grad_lse, s, false, false) && grad_lse.dtype == lses.dtype,
            "grad_lse must be one part of lses");
    require(!grad_outs || (shaped(*grad_outs, s, true, true) && grad_outs->dtype == outs.dtype),
            "grad_outs must be as outs");
    require(!grad_lses || (shaped(*grad_lses, s, true, false) && grad_lses->dtype == lses.dtype),
            "grad_lses must be as lses");
    dispatch(outs.dtype, [&]<class T>(T) {
        backward<T>(s, grad_out, grad_lse, outs, lses, grad_outs, grad_lses);
    });
}

}  // namespace bigops
