// Adam (Kingma and Ba 2015) and AdamW (Loshchilov and Hutter 2019), with AMSGrad (Reddi et al.
// 2018), over a whole list of parameters in one call. The update reads four streams and writes
// three, 28 bytes a parameter in fp32, and does little arithmetic: it is as fast as memory. What
// costs time elsewhere is everything around it, so the list is cut into parts of about kChunk
// elements that all threads draw from (a thousand small tensors and a single large one balance
// alike), and scaling, clipping and negating the gradient happen as it is read.
#include "adam.h"

#include <algorithm>
#include <cmath>

#include "vec.h"

namespace bigops {
namespace {

constexpr int64_t kChunk = 32768;    // long enough for the hardware prefetchers, short enough to share
constexpr int64_t kAhead = 2048;     // bytes; measured: 5 to 10%, 2.3x across tensors of 4000 bytes
constexpr int64_t kBlock = 512;      // elements gathered at a time from tensors that do not lie alike

template <class T>
struct Math {
    using Scalar = T;
    using Lanes = Vec<T>;

    static Lanes fma(T a, Lanes b, Lanes c) { return bigops::fma(splat(a), b, c); }

    static Lanes sqrt(Lanes x) {
#if defined(__AVX512F__)
        if constexpr (sizeof(T) == 4) return _mm512_sqrt_ps(x);
        else return _mm512_sqrt_pd(x);
#elif defined(__AVX2__)
        if constexpr (sizeof(T) == 4) return _mm256_sqrt_ps(x);
        else return _mm256_sqrt_pd(x);
#else
        for (int i = 0; i < kLanes<T>; ++i) x[i] = std::sqrt(x[i]);
        return x;
#endif
    }
};

// The hardware's prefetchers stop at a page's end, which four streams reach all the time, and know
// nothing of the tensor after this one: `next`, if it is known, is fetched while the end is at work.
// (Stores that bypass the caches are 1.7x slower.)
template <class T, bool kAmsgrad>
void update(T* const (&at)[kAdamRoles], int64_t count, const AdamTensor* next,
            const AdamNumbers<compute_t<T>>& numbers) {
    using V = Vec<compute_t<T>>;
    constexpr int kStep = kLanes<compute_t<T>>, kRoles = kAmsgrad ? kAdamRoles : kMaxExpAvgSq;
    constexpr auto kAheadCount = kAhead / static_cast<int64_t>(sizeof(T));
    const int64_t tail = std::max<int64_t>(0, count - kAheadCount);
    // `some` is empty for whole vectors and the number of lanes for the last one.
    auto lanes = [&](int64_t i, auto... some) {
        V param = load(at[kParam] + i, some...), exp_avg = load(at[kExpAvg] + i, some...);
        V exp_avg_sq = load(at[kExpAvgSq] + i, some...), max_exp_avg_sq = {};
        if constexpr (kAmsgrad) max_exp_avg_sq = load(at[kMaxExpAvgSq] + i, some...);
        adam_rule<kAmsgrad, Math<compute_t<T>>>(numbers, load(at[kGrad] + i, some...), param,
                                                exp_avg, exp_avg_sq, max_exp_avg_sq);
        if (i < tail)
            for (int role = 0; role < kRoles; ++role) __builtin_prefetch(at[role] + i + kAheadCount);
        else if (next)
            for (int role = 0; role < kRoles; ++role)
                __builtin_prefetch(static_cast<const T*>(next->data[role]) + (i - tail));
        store(at[kParam] + i, param, some...);
        store(at[kExpAvg] + i, exp_avg, some...);
        store(at[kExpAvgSq] + i, exp_avg_sq, some...);
        if constexpr (kAmsgrad) store(at[kMaxExpAvgSq] + i, max_exp_avg_sq, some...);
    };
    int64_t i = 0;
    for (; i + kStep <= count; i += kStep) lanes(i);
    if (i < count) lanes(i, static_cast<int>(count - i));
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
                  const AdamTensor* next, bool amsgrad, const AdamNumbers<compute_t<T>>& numbers) {
    const auto run = [&](T* const(&at)[kAdamRoles], int64_t n, const AdamTensor* then) {
        amsgrad ? update<T, true>(at, n, then, numbers) : update<T, false>(at, n, then, numbers);
    };
    T* at[kAdamRoles];
    if (!layout) {
        for (int role = 0; role < kAdamRoles; ++role)
            at[role] = tensor.data[role] ? static_cast<T*>(tensor.data[role]) + begin : nullptr;
        run(at, count, next);
        return;
    }
    T blocks[kAdamRoles][kBlock];
    for (int role = 0; role < kAdamRoles; ++role) at[role] = blocks[role];
    for (int64_t end = begin + count; begin < end; begin += kBlock) {
        const int64_t n = std::min(kBlock, end - begin);
        for (int role = 0; role < kAdamRoles; ++role)
            if (tensor.data[role])
                gather(*layout, tensor, static_cast<AdamRole>(role), begin, n, blocks[role]);
        run(at, n, nullptr);
        for (int role = 0; role < kAdamRoles; ++role) {
            if (role == kGrad || !tensor.data[role]) continue;
            T* data = static_cast<T*>(tensor.data[role]);
            walk(*layout, static_cast<AdamRole>(role), begin, n,
                 [&](int64_t to, int64_t from) { data[to] = blocks[role][from]; });
        }
    }
}

// A vector's worth of elements in vectors of doubles.
template <class T>
inline void load_wide(const T* p, VecD (&wide)[kLanes<compute_t<T>> / kLanes<double>]) {
    if constexpr (sizeof(T) == sizeof(double)) {
        wide[0] = load(p);
    } else {
        typedef float Half __attribute__((vector_size(kVectorBytes / 2)));
        Half halves[2];
        if constexpr (sizeof(T) == sizeof(float)) {
            std::memcpy(halves, p, sizeof halves);
        } else {
            const VecF v = load(p);
            std::memcpy(halves, &v, sizeof v);
        }
        wide[0] = __builtin_convertvector(halves[0], VecD);
        wide[1] = __builtin_convertvector(halves[1], VecD);
    }
}

template <class T>
double squares(const T* grad, int64_t count) {
    // In double, since a float sum of squares overflows from 2e19 on. Four places are read in turn,
    // because one stream alone does not fill a core's share of the memory's bandwidth (1.4x).
    constexpr int kStep = kLanes<compute_t<T>>, kParts = kStep / kLanes<double>, kPlaces = 4;
    VecD sums[kPlaces][kParts] = {}, x[kParts];
    const int64_t stretch = count / kPlaces / kStep * kStep;
    for (int64_t i = 0; i < stretch; i += kStep)
        for (int place = 0; place < kPlaces; ++place) {
            load_wide(grad + place * stretch + i, x);
            for (int k = 0; k < kParts; ++k) sums[place][k] = fma(x[k], x[k], sums[place][k]);
        }
    for (int64_t i = kPlaces * stretch; i < count; i += kStep) {
        T rest[kStep] = {};
        std::memcpy(rest, grad + i,
                    sizeof(T) * static_cast<size_t>(std::min<int64_t>(kStep, count - i)));
        load_wide(rest, x);
        for (int k = 0; k < kParts; ++k) sums[0][k] = fma(x[k], x[k], sums[0][k]);
    }
    VecD total = {};
    for (const auto& place : sums)
        for (const VecD& part : place) total += part;
    return sum(total);
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

// Chunks, and where each part of them begins: a long one, or short ones of kChunk elements together.
struct Parts {
    std::vector<Chunk> chunks;
    std::vector<size_t> begins = {0};

    explicit Parts(const AdamTensors& list) {
        int64_t in_part = 0;
        for (size_t i = 0; i < list.tensors.size(); ++i)
            for (int64_t begin = 0; begin < list.tensors[i].numel; begin += kChunk) {
                const int64_t count = std::min(kChunk, list.tensors[i].numel - begin);
                chunks.push_back({static_cast<int>(i), begin, count});
                if ((in_part += count) < kChunk) continue;
                begins.push_back(chunks.size());
                in_part = 0;
            }
        if (in_part > 0) begins.push_back(chunks.size());
    }
};

// run(tensor, layout, chunk's index, chunk, tensor after it, a null pointer of the element type) for
// every chunk; one part is not worth a second thread. The tensor after it is the next chunk's in its
// part, where that begins at 0, or null.
template <class Run>
void for_each_chunk(const AdamTensors& list, const Parts& parts, Run run) {
    const auto count = static_cast<int64_t>(parts.begins.size()) - 1;
    const auto one = [&](size_t c, const AdamTensor* next) {
        const Chunk& chunk = parts.chunks[c];
        const AdamTensor& tensor = list.tensors[static_cast<size_t>(chunk.tensor)];
        const AdamLayout* layout =
            tensor.layout < 0 ? nullptr : &list.layouts[static_cast<size_t>(tensor.layout)];
        switch (tensor.dtype) {
            case DType::f64: run(tensor, layout, c, chunk, next, static_cast<double*>(nullptr)); break;
            case DType::bf16: run(tensor, layout, c, chunk, next, static_cast<bf16*>(nullptr)); break;
            case DType::f16: run(tensor, layout, c, chunk, next, static_cast<f16*>(nullptr)); break;
            default: run(tensor, layout, c, chunk, next, static_cast<float*>(nullptr)); break;
        }
    };
#pragma omp parallel for schedule(dynamic) if (count > 1)
    for (int64_t part = 0; part < count; ++part) {
        const size_t end = parts.begins[static_cast<size_t>(part) + 1];
        for (size_t c = parts.begins[static_cast<size_t>(part)]; c < end; ++c)
            one(c, c + 1 < end ? &list.tensors[static_cast<size_t>(parts.chunks[c + 1].tensor)]
                               : nullptr);
    }
}

double advance(const AdamTensor& tensor) {
    if (tensor.step_dtype == DType::f64) return *static_cast<double*>(tensor.step) += 1;
    return static_cast<double>(*static_cast<float*>(tensor.step) += 1);
}

}  // namespace

void adam(const AdamTensors& list, const AdamOptions& options, double factor) {
    std::vector<double> steps;
    for (const AdamTensor& tensor : list.tensors) steps.push_back(advance(tensor));
    for_each_chunk(list, Parts(list),
                   [&](const AdamTensor& tensor, const AdamLayout* layout, size_t,
                       const Chunk& chunk, const AdamTensor* next, auto* type) {
                       using T = std::remove_pointer_t<decltype(type)>;
                       AdamNumbers<compute_t<T>> numbers(
                           options, steps[static_cast<size_t>(chunk.tensor)]);
                       numbers.factor = static_cast<compute_t<T>>(factor);
                       update_chunk<T>(tensor, layout, chunk.begin, chunk.count, next,
                                       options.amsgrad, numbers);
                   });
}

double squared_norm(const AdamTensors& list) {
    const Parts parts(list);
    std::vector<double> sums(parts.chunks.size());
    for_each_chunk(list, parts,
                   [&](const AdamTensor& tensor, const AdamLayout* layout, size_t c,
                       const Chunk& chunk, const AdamTensor*, auto* type) {
                       using T = std::remove_pointer_t<decltype(type)>;
                       sums[c] = squares_chunk<T>(tensor, layout, chunk.begin, chunk.count);
                   });
    double total = 0;
    for (double s : sums) total += s;
    return total;
}

}  // namespace bigops
