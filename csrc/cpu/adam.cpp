// Adam (Kingma and Ba 2015) and AdamW (Loshchilov and Hutter 2019), with AMSGrad (Reddi et al.
// 2018), over a whole list of parameters in one call. The update reads four streams and writes
// three, 28 bytes a parameter in fp32, and does little arithmetic: it is as fast as memory. What
// costs time elsewhere is everything around it, so the list is cut into chunks of at most
// kChunk elements that all threads draw from (a thousand small tensors and a single large one
// balance alike), and scaling, clipping and negating the gradient happen as it is read.
#include "adam.h"

#include <algorithm>
#include <cmath>

#include "vec.h"

namespace bigops {
namespace {

constexpr int64_t kChunk = 32768;    // long enough for the hardware prefetchers, short enough to share
constexpr int64_t kBlock = 512;      // elements gathered at a time from tensors that do not lie alike
constexpr int64_t kParallelAt = 16384;  // below this, waking a second thread costs more than it gives

#if defined(__AVX512F__)
inline VecF square_root(VecF x) { return _mm512_sqrt_ps(x); }
inline VecD square_root(VecD x) { return _mm512_sqrt_pd(x); }
#elif defined(__AVX2__)
inline VecF square_root(VecF x) { return _mm256_sqrt_ps(x); }
inline VecD square_root(VecD x) { return _mm256_sqrt_pd(x); }
#else
template <class V>
inline V square_root(V x) {
    for (int i = 0; i < static_cast<int>(sizeof(V) / sizeof(x[0])); ++i) x[i] = std::sqrt(x[i]);
    return x;
}
#endif

// What gradients are multiplied by as they are read: torch.nn.utils.clip_grad_norm_'s coefficient
// (compared such that a NaN comes through), the loss scale and the sign.
double grad_factor(const AdamOptions& o) {
    const double clip = o.max_grad_norm / (o.total_norm / o.grad_scale + 1e-6);
    return (o.maximize ? -1 : 1) * (clip > 1 ? 1 : clip) / o.grad_scale;
}

// The update of one vector of elements, in float for all types but double.
template <class T>
struct Rule {
    using V = Vec<T>;
    V factor, l2, keep, step_size, eps, inv_sqrt_correction;
    V weight1, beta2_high, beta2_low, weight2;
    bool mostly_old, coupled, amsgrad;

    Rule(const AdamOptions& o, double step)
        : factor(set(grad_factor(o))),
          l2(set(o.weight_decay)),
          keep(set(o.decoupled_weight_decay ? 1 - o.lr * o.weight_decay : 1)),
          step_size(set(o.lr / (1 - std::pow(o.beta1, step)))),
          eps(set(o.eps)),
          inv_sqrt_correction(set(1 / std::sqrt(1 - std::pow(o.beta2, step)))),
          weight1(set(o.beta1 >= 0.5 ? 1 - o.beta1 : o.beta1)),
          // 0.999 rounded to float is off by 1e-5 of 1 - 0.999, which an average over a thousand
          // steps collects; so beta2 is carried in two parts. Both are positive, since with a
          // part of zero an infinite average would become NaN, which torch's does not.
          beta2_high(set(std::nextafter(static_cast<T>(o.beta2), T(0)))),
          beta2_low(set(o.beta2 - static_cast<double>(beta2_high[0]))),
          weight2(set(1 - o.beta2)),
          mostly_old(o.beta1 >= 0.5),
          coupled(!o.decoupled_weight_decay && o.weight_decay != 0),
          amsgrad(o.amsgrad) {}

    static V set(double x) { return splat(static_cast<T>(x)); }

    inline void operator()(V grad, V& param, V& exp_avg, V& exp_avg_sq, V& max_exp_avg_sq) const {
        grad = grad * factor;
        if (coupled) grad = fma(l2, param, grad);
        // Interpolated from the end that weighs more, which keeps its digits.
        exp_avg = mostly_old ? fma(weight1, grad - exp_avg, exp_avg)
                             : fma(weight1, exp_avg - grad, grad);
        exp_avg_sq = fma(beta2_high, exp_avg_sq,
                         fma(beta2_low, exp_avg_sq, weight2 * (grad * grad)));
        V second = exp_avg_sq;
        if (amsgrad) second = max_exp_avg_sq = vmax(max_exp_avg_sq, exp_avg_sq);
        V denominator = fma(square_root(second), inv_sqrt_correction, eps);
        param = param * keep - step_size * (exp_avg / denominator);
    }
};

template <class T>
void update(T* const (&at)[kAdamRoles], int64_t count, const Rule<compute_t<T>>& rule) {
    using V = Vec<compute_t<T>>;
    constexpr int kStep = kLanes<compute_t<T>>;
    int64_t i = 0;
    for (; i + kStep <= count; i += kStep) {
        V param = load(at[kParam] + i), exp_avg = load(at[kExpAvg] + i);
        V exp_avg_sq = load(at[kExpAvgSq] + i);
        V max_exp_avg_sq = rule.amsgrad ? load(at[kMaxExpAvgSq] + i) : V{};
        rule(load(at[kGrad] + i), param, exp_avg, exp_avg_sq, max_exp_avg_sq);
        store(at[kParam] + i, param);
        store(at[kExpAvg] + i, exp_avg);
        store(at[kExpAvgSq] + i, exp_avg_sq);
        if (rule.amsgrad) store(at[kMaxExpAvgSq] + i, max_exp_avg_sq);
    }
    if (i == count) return;
    const int rest = static_cast<int>(count - i);
    V param = load(at[kParam] + i, rest), exp_avg = load(at[kExpAvg] + i, rest);
    V exp_avg_sq = load(at[kExpAvgSq] + i, rest);
    V max_exp_avg_sq = rule.amsgrad ? load(at[kMaxExpAvgSq] + i, rest) : V{};
    rule(load(at[kGrad] + i, rest), param, exp_avg, exp_avg_sq, max_exp_avg_sq);
    store(at[kParam] + i, param, rest);
    store(at[kExpAvg] + i, exp_avg, rest);
    store(at[kExpAvgSq] + i, exp_avg_sq, rest);
    if (rule.amsgrad) store(at[kMaxExpAvgSq] + i, max_exp_avg_sq, rest);
}

// Visits elements [begin, begin + count) in the layout's order: visit(element, position).
template <class Visit>
void walk(const AdamLayout& layout, AdamRole role, int64_t begin, int64_t count, Visit visit) {
    int64_t index[kMaxDims] = {};
    for (int d = layout.ndim - 1; d >= 0; --d) {
        index[d] = begin % layout.shape[d];
        begin /= layout.shape[d];
    }
    for (int64_t position = 0; position < count; ++position) {
        int64_t offset = 0;
        for (int d = 0; d < layout.ndim; ++d) offset += index[d] * layout.strides[role][d];
        visit(offset, position);
        for (int d = layout.ndim - 1; d >= 0 && ++index[d] == layout.shape[d]; --d) index[d] = 0;
    }
}

template <class T>
void gather(const AdamLayout& layout, const AdamTensor& tensor, AdamRole role, int64_t begin,
            int64_t count, T* block) {
    const T* data = static_cast<const T*>(tensor.data[role]);
    walk(layout, role, begin, count, [&](int64_t from, int64_t to) { block[to] = data[from]; });
}

template <class T>
void update_chunk(const AdamTensor& tensor, const AdamLayout* layout, int64_t begin, int64_t count,
                  const AdamOptions& options, double step) {
    const Rule<compute_t<T>> rule(options, step);
    T* at[kAdamRoles];
    if (!layout) {
        for (int role = 0; role < kAdamRoles; ++role)
            at[role] = tensor.data[role] ? static_cast<T*>(tensor.data[role]) + begin : nullptr;
        update<T>(at, count, rule);
        return;
    }
    T blocks[kAdamRoles][kBlock];
    for (int role = 0; role < kAdamRoles; ++role) at[role] = blocks[role];
    for (int64_t end = begin + count; begin < end; begin += kBlock) {
        const int64_t n = std::min(kBlock, end - begin);
        for (int role = 0; role < kAdamRoles; ++role)
            if (tensor.data[role])
                gather(*layout, tensor, static_cast<AdamRole>(role), begin, n, blocks[role]);
        update<T>(at, n, rule);
        for (int role = 0; role < kAdamRoles; ++role) {
            if (role == kGrad || !tensor.data[role]) continue;
            T* data = static_cast<T*>(tensor.data[role]);
            walk(*layout, static_cast<AdamRole>(role), begin, n,
                 [&](int64_t to, int64_t from) { data[to] = blocks[role][from]; });
        }
    }
}

template <class T>
double squares(const T* grad, int64_t count) {
    // Four sums hide the latency of the additions; double, since a float sum of squares overflows
    // from 2e19 on.
    constexpr int kStep = kLanes<compute_t<T>>;
    VecD sums[4] = {};
    auto add = [&](auto v, int k) {
        if constexpr (sizeof(v[0]) == sizeof(double)) {
            sums[k] = fma(v, v, sums[k]);
        } else {
            typedef float Half __attribute__((vector_size(kVectorBytes / 2)));
            Half halves[2];
            std::memcpy(halves, &v, sizeof v);
            for (int h = 0; h < 2; ++h) {
                VecD x = __builtin_convertvector(halves[h], VecD);
                sums[(2 * k + h) % 4] = fma(x, x, sums[(2 * k + h) % 4]);
            }
        }
    };
    int64_t i = 0;
    for (; i + 4 * kStep <= count; i += 4 * kStep)
        for (int k = 0; k < 4; ++k) add(load(grad + i + k * kStep), k);
    for (; i < count; i += kStep)
        add(load(grad + i, static_cast<int>(std::min<int64_t>(kStep, count - i))), 0);
    return sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

template <class T>
double squares_chunk(const AdamTensor& tensor, const AdamLayout* layout, int64_t begin,
                     int64_t count) {
    if (!layout) return squares(static_cast<const T*>(tensor.data[kGrad]) + begin, count);
    T block[kBlock];
    double total = 0;
    for (int64_t end = begin + count; begin < end; begin += kBlock) {
        const int64_t n = std::min(kBlock, end - begin);
        gather(*layout, tensor, kGrad, begin, n, block);
        total += squares(block, n);
    }
    return total;
}

struct Chunk {
    int tensor;
    int64_t begin, count;
};

std::vector<Chunk> cut(const AdamTensors& list) {
    std::vector<Chunk> chunks;
    for (size_t i = 0; i < list.tensors.size(); ++i)
        for (int64_t begin = 0; begin < list.tensors[i].numel; begin += kChunk)
            chunks.push_back({static_cast<int>(i), begin,
                              std::min(kChunk, list.tensors[i].numel - begin)});
    return chunks;
}

// run(tensor, layout, chunk's index, chunk, a null pointer of the element type) for every chunk.
template <class Run>
void for_each_chunk(const AdamTensors& list, const std::vector<Chunk>& chunks, Run run) {
    const bool parallel = chunks.size() > 1 &&
                          static_cast<int64_t>(chunks.size()) * chunks[0].count > kParallelAt;
    const auto total = static_cast<int64_t>(chunks.size());
#pragma omp parallel for schedule(dynamic) if (parallel)
    for (int64_t c = 0; c < total; ++c) {
        const Chunk& chunk = chunks[static_cast<size_t>(c)];
        const AdamTensor& tensor = list.tensors[static_cast<size_t>(chunk.tensor)];
        const AdamLayout* layout =
            tensor.layout < 0 ? nullptr : &list.layouts[static_cast<size_t>(tensor.layout)];
        switch (tensor.dtype) {
            case DType::f64: run(tensor, layout, c, chunk, static_cast<double*>(nullptr)); break;
            case DType::bf16: run(tensor, layout, c, chunk, static_cast<bf16*>(nullptr)); break;
            case DType::f16: run(tensor, layout, c, chunk, static_cast<f16*>(nullptr)); break;
            default: run(tensor, layout, c, chunk, static_cast<float*>(nullptr)); break;
        }
    }
}

double advance(const AdamTensor& tensor) {
    if (tensor.step_dtype == DType::f64) return *static_cast<double*>(tensor.step) += 1;
    return static_cast<double>(*static_cast<float*>(tensor.step) += 1);
}

}  // namespace

void adam(const AdamTensors& list, const AdamOptions& options) {
    std::vector<double> steps;
    for (const AdamTensor& tensor : list.tensors) steps.push_back(advance(tensor));
    for_each_chunk(list, cut(list),
                   [&](const AdamTensor& tensor, const AdamLayout* layout, int64_t,
                       const Chunk& chunk, auto* type) {
                       using T = std::remove_pointer_t<decltype(type)>;
                       update_chunk<T>(tensor, layout, chunk.begin, chunk.count, options,
                                       steps[static_cast<size_t>(chunk.tensor)]);
                   });
}

double squared_norm(const AdamTensors& list) {
    const std::vector<Chunk> chunks = cut(list);
    std::vector<double> sums(chunks.size());
    for_each_chunk(list, chunks,
                   [&](const AdamTensor& tensor, const AdamLayout* layout, int64_t c,
                       const Chunk& chunk, auto* type) {
                       using T = std::remove_pointer_t<decltype(type)>;
                       sums[static_cast<size_t>(c)] =
                           squares_chunk<T>(tensor, layout, chunk.begin, chunk.count);
                   });
    double total = 0;
    for (double s : sums) total += s;
    return total;
}

}  // namespace bigops
