// The sum of squares over a list of gradients, which clips them (see step.h for the walk).
#include "step.h"

namespace bigops {
namespace {

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
double squares_chunk(const StepTensor& tensor, const StepLayout* layout, int64_t begin,
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

}  // namespace

double squared_norm(const StepTensors& list) {
    const Parts parts(list);
    std::vector<double> sums(parts.chunks.size());
    for_each_chunk(list, parts,
                   [&](const StepTensor& tensor, const StepLayout* layout, size_t c,
                       const Chunk& chunk, const StepTensor*) {
                       with_type(tensor.grad_dtype, [&](auto* type) {
                           using T = std::remove_pointer_t<decltype(type)>;
                           sums[c] = squares_chunk<T>(tensor, layout, chunk.begin, chunk.count);
                       });
                   });
    double total = 0;
    for (double s : sums) total += s;
    return total;
}

}  // namespace bigops
