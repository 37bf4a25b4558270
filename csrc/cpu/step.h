// The walk of an optimizer's step over a list of tensors. A step reads a few streams and writes most
// of them back and does little arithmetic: it is as fast as memory. What costs time elsewhere is
// everything around it, so the list is cut into parts of about kChunk elements that all threads draw
// from (a thousand small tensors and a single large one balance alike), and the rule of the
// optimizer is applied to vectors as they pass.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <type_traits>
#include <utility>

#include "codes.h"
#include "step_lists.h"
#include "vec.h"

namespace bigops {

constexpr int64_t kChunk = 32768;  // long enough for the hardware prefetchers, short enough to share
constexpr int64_t kAhead = 2048;   // bytes; measured: 5 to 10%, 2.3x across tensors of 4000 bytes
constexpr int64_t kBlock = 512;    // elements gathered at a time from tensors that do not lie alike
static_assert(kChunk % kCodeBlock == 0 && kBlock % kCodeBlock == 0);

// What rules want of vectors.
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

// The types in memory of one tensor's parameter, gradient, states and copy (void: none).
template <class Param, class Grad, class State, class Copy>
struct Streams {
    using P = Param;
    using G = Grad;
    using S = State;
    using C = Copy;
};

// Where a run of elements begins in each role, and the scales of its states.
struct Places {
    void* at[kRoles] = {};
    float* scales[kMostStates] = {};

    template <class T>
    T* in(int role) const {
        return static_cast<T*>(at[role]);
    }
};

// The hardware's prefetchers stop at a page's end, which several streams reach all the time, and know
// nothing of the tensor after this one: `next`, if it is known, is fetched while the end is at work.
// (Stores that bypass the caches are 1.7x slower.)
template <class Types, class Rule>
void update(const Places& places, int64_t count, const StepTensor* next, const Rule& rule) {
    using P = typename Types::P;
    using G = typename Types::G;
    using S = typename Types::S;
    using C = typename Types::C;
    using V = Vec<compute_t<P>>;
    constexpr int kStep = kLanes<compute_t<P>>, kStates = Rule::kStates;
    constexpr auto kAheadCount = kAhead / static_cast<int64_t>(sizeof(P));
    const int64_t tail = std::max<int64_t>(0, count - kAheadCount);
    P* const param_at = places.in<P>(kParam);
    const G* const grad_at = places.in<G>(kGrad);
    S* state_at[kMostStates];
    for (int s = 0; s < kStates; ++s) state_at[s] = places.in<S>(kFirstState + s);
    // `some` is empty for whole vectors and the number of lanes for the last one.
    auto lanes = [&](int64_t i, auto... some) {
        V param = load(param_at + i, some...), states[kMostStates] = {};
        for (int s = 0; s < kStates; ++s) states[s] = load(state_at[s] + i, some...);
        rule(load(grad_at + i, some...), param, states);
        if (i < tail) {
            __builtin_prefetch(param_at + i + kAheadCount);
            __builtin_prefetch(grad_at + i + kAheadCount);
            for (int s = 0; s < kStates; ++s) __builtin_prefetch(state_at[s] + i + kAheadCount);
        } else if (next) {
            __builtin_prefetch(static_cast<const P*>(next->data[kParam]) + (i - tail));
            __builtin_prefetch(static_cast<const G*>(next->data[kGrad]) + (i - tail));
            for (int s = 0; s < kStates; ++s)
                __builtin_prefetch(static_cast<const S*>(next->data[kFirstState + s]) + (i - tail));
        }
        store(param_at + i, param, some...);
        for (int s = 0; s < kStates; ++s) store(state_at[s] + i, states[s], some...);
        if constexpr (!std::is_void_v<C>) store(places.in<C>(kCopy) + i, param, some...);
    };
    int64_t i = 0;
    for (; i + kStep <= count; i += kStep) lanes(i);
    if (i < count) lanes(i, static_cast<int>(count - i));
}

// call(std::integral_constant) for each state.
template <int kStates, class Call>
void for_states(Call call) {
    [&]<int... s>(std::integer_sequence<int, s...>) {
        (call(std::integral_constant<int, s>()), ...);
    }(std::make_integer_sequence<int, kStates>());
}

// The same for states that are codes, a block of them after the other: states wait in a buffer for
// their new scale, which the whole block has to be known for.
template <class Types, class Rule>
void update_codes(const Places& places, int64_t count, const Rule& rule) {
    using P = typename Types::P;
    using G = typename Types::G;
    using C = typename Types::C;
    constexpr int kStep = kLanes<float>, kStates = Rule::kStates;
    constexpr int64_t kAheadCount = kAhead / static_cast<int64_t>(sizeof(P));
    alignas(64) float kept[kMostStates][kCodeBlock];
    for (int64_t begin = 0; begin < count; begin += kCodeBlock) {
        const int64_t n = std::min(kCodeBlock, count - begin);
        P* const param_at = places.in<P>(kParam) + begin;
        const G* const grad_at = places.in<G>(kGrad) + begin;
        uint8_t* code_at[kMostStates];
        float scales[kMostStates] = {};
        VecF largest[kMostStates] = {};
        for (int s = 0; s < kStates; ++s) {
            code_at[s] = places.in<uint8_t>(kFirstState + s) + begin;
            scales[s] = places.scales[s][begin / kCodeBlock];
        }
        auto lanes = [&](int64_t i, auto... some) {
            VecF param = load(param_at + i, some...), states[kMostStates] = {};
            for_states<kStates>([&](auto s) {
                states[s] = codes::decode<Rule::kSigned[s]>(
                    codes::load_codes(code_at[s] + i, some...), scales[s]);
            });
            rule(load(grad_at + i, some...), param, states);
            __builtin_prefetch(param_at + i + kAheadCount);
            __builtin_prefetch(grad_at + i + kAheadCount);
            store(param_at + i, param, some...);
            if constexpr (!std::is_void_v<C>)
                store(places.in<C>(kCopy) + begin + i, param, some...);
            for_states<kStates>([&](auto s) {
                store(kept[s] + i, states[s]);
                largest[s] = vmax(largest[s], codes::size_of<Rule::kSigned[s]>(states[s]));
            });
        };
        int64_t i = 0;
        for (; i + kStep <= n; i += kStep) lanes(i);
        if (i < n) lanes(i, static_cast<int>(n - i));
        for_states<kStates>([&](auto s) {
            const codes::Scale scale(max(largest[s]));
            places.scales[s][begin / kCodeBlock] = scale.scale;
            const auto encode = [&](int64_t j, auto... some) {
                codes::store_codes(code_at[s] + j,
                                   codes::encode<Rule::kSigned[s]>(load(kept[s] + j), scale.inverse),
                                   some...);
            };
            int64_t j = 0;
            for (; j + kStep <= n; j += kStep) encode(j);
            if (j < n) encode(j, static_cast<int>(n - j));
        });
    }
}

// Visits elements [begin, begin + count) in the layout's order: visit(element, position).
template <class Visit>
void walk(const StepLayout& layout, int role, int64_t begin, int64_t count, Visit visit) {
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
void gather(const StepLayout& layout, const StepTensor& tensor, int role, int64_t begin,
            int64_t count, T* block) {
    const T* data = static_cast<const T*>(tensor.data[role]);
    walk(layout, role, begin, count, [&](int64_t from, int64_t to) { block[to] = data[from]; });
}

template <class T>
void scatter(const StepLayout& layout, const StepTensor& tensor, int role, int64_t begin,
             int64_t count, const T* block) {
    T* data = static_cast<T*>(tensor.data[role]);
    walk(layout, role, begin, count, [&](int64_t to, int64_t from) { data[to] = block[from]; });
}

// Elements [begin, begin + count) of a tensor, in the order of its parameter's memory.
template <class Types, class Rule>
void update_chunk(const StepTensor& tensor, const StepLayout* layout, int64_t begin, int64_t count,
                  const StepTensor* next, const Rule& rule) {
    // visit(role, a null pointer of its type) for each role that is there.
    const auto each = [](auto visit) {
        using S = typename Types::S;
        using C = typename Types::C;
        visit(kParam, static_cast<typename Types::P*>(nullptr));
        visit(kGrad, static_cast<typename Types::G*>(nullptr));
        for (int s = 0; s < Rule::kStates; ++s) visit(kFirstState + s, static_cast<S*>(nullptr));
        if constexpr (!std::is_void_v<C>) visit(kCopy, static_cast<C*>(nullptr));
    };
    const auto run = [&](const Places& places, int64_t n, [[maybe_unused]] const StepTensor* then) {
        if constexpr (std::is_same_v<typename Types::S, uint8_t>)
            update_codes<Types>(places, n, rule);
        else
            update<Types>(places, n, then, rule);
    };
    Places places;
    const auto scales_from = [&](int64_t element) {
        for (int s = 0; s < kMostStates; ++s)
            if (tensor.scales[s]) places.scales[s] = tensor.scales[s] + element / kCodeBlock;
    };
    scales_from(begin);
    if (!layout) {
        each([&](int role, auto* type) {
            using T = std::remove_pointer_t<decltype(type)>;
            places.at[role] = static_cast<T*>(tensor.data[role]) + begin;
        });
        run(places, count, next);
        return;
    }
    alignas(64) std::byte blocks[kRoles][kBlock * sizeof(double)];
    for (int role = 0; role < kRoles; ++role) places.at[role] = blocks[role];
    for (int64_t end = begin + count; begin < end; begin += kBlock) {
        const int64_t n = std::min(kBlock, end - begin);
        each([&](int role, auto* type) {
            if (role == kCopy) return;
            using T = std::remove_pointer_t<decltype(type)>;
            gather(*layout, tensor, role, begin, n, places.in<T>(role));
        });
        scales_from(begin);
        run(places, n, nullptr);
        each([&](int role, auto* type) {
            if (role == kGrad) return;
            using T = std::remove_pointer_t<decltype(type)>;
            scatter(*layout, tensor, role, begin, n, places.in<const T>(role));
        });
    }
}

struct Chunk {
    int tensor;
    int64_t begin, count;
};

// Chunks, and where each part of them begins: a long one, or short ones of kChunk elements together.
struct Parts {
    std::vector<Chunk> chunks;
    std::vector<size_t> begins = {0};

    explicit Parts(const StepTensors& list) {
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

// run(tensor, layout, chunk's index, chunk, tensor after it) for every chunk; one part is not worth a
// second thread. The tensor after it is the next chunk's in its part, where that begins at 0 and has
// this one's types, or null.
template <class Run>
void for_each_chunk(const StepTensors& list, const Parts& parts, Run run) {
    const auto count = static_cast<int64_t>(parts.begins.size()) - 1;
    const auto tensor_of = [&](size_t c) -> const StepTensor& {
        return list.tensors[static_cast<size_t>(parts.chunks[c].tensor)];
    };
#pragma omp parallel for schedule(dynamic) if (count > 1)
    for (int64_t part = 0; part < count; ++part) {
        const size_t end = parts.begins[static_cast<size_t>(part) + 1];
        for (size_t c = parts.begins[static_cast<size_t>(part)]; c < end; ++c) {
            const StepTensor& tensor = tensor_of(c);
            run(tensor,
                tensor.layout < 0 ? nullptr : &list.layouts[static_cast<size_t>(tensor.layout)], c,
                parts.chunks[c], c + 1 < end ? &tensor_of(c + 1) : nullptr);
        }
    }
}

// call(a null pointer of the element type).
template <class Call>
void with_type(DType dtype, Call call) {
    switch (dtype) {
        case DType::f64: return call(static_cast<double*>(nullptr));
        case DType::bf16: return call(static_cast<bf16*>(nullptr));
        case DType::f16: return call(static_cast<f16*>(nullptr));
        default: return call(static_cast<float*>(nullptr));
    }
}

// call(the tensor's Streams). Copies are of float parameters, whose gradients may be of the copy's
// type; states of doubles are doubles.
template <class Call>
void with_streams(const StepTensor& tensor, Call call) {
    with_type(tensor.dtype, [&](auto* type) {
        using P = std::remove_pointer_t<decltype(type)>;
        const auto with_state = [&](auto* state) {
            using S = std::remove_pointer_t<decltype(state)>;
            const auto with_copy = [&](auto* copy) {
                using C = std::remove_pointer_t<decltype(copy)>;
                tensor.grad_dtype == DType::f32 ? call(Streams<P, P, S, C>())
                                                : call(Streams<P, C, S, C>());
            };
            if constexpr (std::is_same_v<P, float>)
                if (tensor.data[kCopy])
                    return tensor.copy_dtype == DType::bf16 ? with_copy(static_cast<bf16*>(nullptr))
                                                            : with_copy(static_cast<f16*>(nullptr));
            call(Streams<P, P, S, void>());
        };
        if constexpr (!std::is_same_v<P, double>) {
            if (tensor.state_dtype == DType::u8) return with_state(static_cast<uint8_t*>(nullptr));
            if constexpr (!std::is_same_v<P, bf16>)
                if (tensor.state_dtype == DType::bf16)
                    return with_state(static_cast<bf16*>(nullptr));
        }
        with_state(static_cast<P*>(nullptr));
    });
}

// Every tensor's update, in place: rule_of(its index, Streams) is the rule.
template <class RuleOf>
void step_over(const StepTensors& list, RuleOf rule_of) {
    for_each_chunk(list, Parts(list),
                   [&](const StepTensor& tensor, const StepLayout* layout, size_t,
                       const Chunk& chunk, const StepTensor* next) {
                       with_streams(tensor, [&](auto types) {
                           using Types = decltype(types);
                           rule_of(static_cast<size_t>(chunk.tensor), types, [&](const auto& rule) {
                               update_chunk<Types>(tensor, layout, chunk.begin, chunk.count, next,
                                                   rule);
                           });
                       });
                   });
}

}  // namespace bigops
