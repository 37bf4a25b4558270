// The words of CUDA C++ that are functions: barriers, shuffles, votes, atomics, cached accesses and
// single-precision arithmetic. Programming guide, "C++ Language Extensions". All are inlined, so that
// the line of a finding is the kernel's.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>

#include "core.h"

#define __forceinline__ inline __attribute__((always_inline))
#define threadIdx (bigops_simt_context_of_kernel()->thread)
#define blockIdx (bigops_simt_context_of_kernel()->block)
#define blockDim (bigops_simt_context_of_kernel()->block_size)
#define gridDim (bigops_simt_context_of_kernel()->grid_size)
constexpr int warpSize = 32;

__forceinline__ bigops::simt::Context* bigops_simt_context_of_kernel() {
    return ::bigops::simt::bigops_simt_context();
}

namespace bigops::simt {

// Of the calling thread's warp, as meet() wants it: the last warp of a block may be short.
struct Warp {
    int first = warp() * 32;
    int count = std::min(32, block_threads() - first);
};

template <class T>
struct Shuffled {
    T value, result;
    int from;  // lane
};

// Every lane of the mask names the lane whose value it wants.
template <class T>
__forceinline__ T shuffle(unsigned mask, T value, int from, const char* key, Site site) {
    const Warp w;
    Shuffled<T> mine = {value, value, from};
    const auto exchange = [&](void* const* all) {
        for (int i = 0; i < w.count; ++i) {
            auto* lane = static_cast<Shuffled<T>*>(all[i]);
            if (!lane) continue;
            const auto* source = lane->from < w.count ? static_cast<Shuffled<T>*>(all[lane->from])
                                                      : nullptr;
            if (source) lane->result = source->value;
            else report(Finding::misuse, std::string(key) + " reads lane " +
                                             std::to_string(lane->from) +
                                             ", which does not take part");
        }
    };
    meet(w.first, w.count, mask, key, &mine, exchange, false, site);
    return mine.result;
}

// A lane whose source lies outside of its segment of `width` keeps its own value.
template <class T>
__forceinline__ T shuffle_within(unsigned mask, T value, int from, int width, const char* key, Site site) {
    const int here = lane(), segment = here / width * width;
    return shuffle(mask, value, from < segment || from >= segment + width ? here : from, key, site);
}

// fold(accumulated, one lane's value), lanes ascending; every lane gets the result.
template <class T, class Fold>
__forceinline__ T reduce(unsigned mask, T value, T start, Fold fold, const char* key, Site site) {
    const Warp w;
    Shuffled<T> mine = {value, start, 0};
    const auto combine = [&](void* const* all) {
        T result = start;
        for (int i = 0; i < w.count; ++i)
            if (all[i]) result = fold(result, static_cast<Shuffled<T>*>(all[i])->value, i);
        for (int i = 0; i < w.count; ++i)
            if (all[i]) static_cast<Shuffled<T>*>(all[i])->result = result;
    };
    meet(w.first, w.count, mask, key, &mine, combine, false, site);
    return mine.result;
}

// Swaps in `desired` if the value is still `expected`, which becomes what was there.
bool compare_exchange(void* pointer, void* expected, const void* desired, size_t bytes);

template <class T, class Update>
__forceinline__ T atomic_update(T* pointer, Update update) {
    if constexpr (std::is_integral_v<T>) atomic(pointer, sizeof(T), self(), Proxy::generic);
    else atomic_sum(pointer, sizeof(T), self(), Proxy::generic);
    T old = {}, next;
    do next = update(old);
    while (!compare_exchange(pointer, &old, &next, sizeof(T)));
    return old;
}

template <class T>
struct Same {
    using type = T;
};

}  // namespace bigops::simt

__forceinline__ void __syncthreads(bigops::simt::Site site = bigops::simt::Site::current()) {
    bigops::simt::meet(0, bigops::simt::block_threads(), ~0u, "__syncthreads", nullptr,
                       [](void* const*) {}, true, site);
}
__forceinline__ void __syncwarp(unsigned mask = ~0u,
                       bigops::simt::Site site = bigops::simt::Site::current()) {
    const bigops::simt::Warp w;
    bigops::simt::meet(w.first, w.count, mask, "__syncwarp", nullptr, [](void* const*) {}, true,
                       site);
}
__forceinline__ void __threadfence_block() { bigops::simt::fence(); }
__forceinline__ void __threadfence() { bigops::simt::fence(); }
__forceinline__ void __threadfence_system() { bigops::simt::fence(); }
__forceinline__ void __nanosleep(unsigned) { bigops::simt::yield(); }

template <class T>
__forceinline__ T __shfl_sync(unsigned mask, T value, int source, int width = 32,
              bigops::simt::Site site = bigops::simt::Site::current()) {
    const int segment = bigops::simt::lane() / width * width;
    return bigops::simt::shuffle(mask, value, segment + (source & (width - 1)), "__shfl_sync",
                                 site);
}
template <class T>
__forceinline__ T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32,
                 bigops::simt::Site site = bigops::simt::Site::current()) {
    return bigops::simt::shuffle_within(mask, value,
                                        bigops::simt::lane() - static_cast<int>(delta), width,
                                        "__shfl_up_sync", site);
}
template <class T>
__forceinline__ T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32,
                   bigops::simt::Site site = bigops::simt::Site::current()) {
    return bigops::simt::shuffle_within(mask, value,
                                        bigops::simt::lane() + static_cast<int>(delta), width,
                                        "__shfl_down_sync", site);
}
template <class T>
__forceinline__ T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32,
                  bigops::simt::Site site = bigops::simt::Site::current()) {
    const int from = bigops::simt::lane() ^ bits;
    const int end = (bigops::simt::lane() / width + 1) * width;  // lower segments may be read
    return bigops::simt::shuffle(mask, value, from < end ? from : bigops::simt::lane(),
                                 "__shfl_xor_sync", site);
}

__forceinline__ unsigned __ballot_sync(unsigned mask, int vote,
                              bigops::simt::Site site = bigops::simt::Site::current()) {
    return bigops::simt::reduce(
        mask, unsigned{vote != 0}, 0u,
        [](unsigned all, unsigned one, int lane) { return all | one << lane; }, "__ballot_sync",
        site);
}
__forceinline__ int __any_sync(unsigned mask, int vote,
                      bigops::simt::Site site = bigops::simt::Site::current()) {
    return bigops::simt::reduce(
        mask, int{vote != 0}, 0, [](int all, int one, int) { return all | one; }, "__any_sync",
        site);
}
__forceinline__ int __all_sync(unsigned mask, int vote,
                      bigops::simt::Site site = bigops::simt::Site::current()) {
    return bigops::simt::reduce(
        mask, int{vote != 0}, 1, [](int all, int one, int) { return all & one; }, "__all_sync",
        site);
}
#define BIGOPS_REDUCE(NAME, START, EXPRESSION)                                                   \
    template <class T>                                                                           \
    __forceinline__ T NAME(unsigned mask, T value, bigops::simt::Site site = bigops::simt::Site::current()) {    \
        return bigops::simt::reduce(                                                             \
            mask, value, static_cast<T>(START), [](T a, T b, int) { return EXPRESSION; }, #NAME, \
            site);                                                                               \
    }
BIGOPS_REDUCE(__reduce_add_sync, 0, a + b)
BIGOPS_REDUCE(__reduce_min_sync, std::numeric_limits<T>::max(), std::min(a, b))
BIGOPS_REDUCE(__reduce_max_sync, std::numeric_limits<T>::lowest(), std::max(a, b))
BIGOPS_REDUCE(__reduce_and_sync, ~T(0), a& b)
BIGOPS_REDUCE(__reduce_or_sync, 0, a | b)
BIGOPS_REDUCE(__reduce_xor_sync, 0, a ^ b)
#undef BIGOPS_REDUCE

// Lanes that have not exited: who of them is elsewhere in the code is not told.
__forceinline__ unsigned __activemask() {
    const bigops::simt::Warp w;
    unsigned mask = 0;
    for (int i = 0; i < w.count; ++i)
        mask |= unsigned{!bigops::simt::has_exited(w.first + i)} << i;
    return mask;
}

#define BIGOPS_ATOMIC(NAME, EXPRESSION)                                                  \
    template <class T>                                                                   \
    __forceinline__ T NAME(T* pointer, typename bigops::simt::Same<T>::type value) {                     \
        return bigops::simt::atomic_update(                                              \
            pointer, [&](T old) { return static_cast<T>(EXPRESSION); });                 \
    }
BIGOPS_ATOMIC(atomicAdd, old + value)
BIGOPS_ATOMIC(atomicSub, old - value)
BIGOPS_ATOMIC(atomicMin, old < value ? old : value)
BIGOPS_ATOMIC(atomicMax, old > value ? old : value)
BIGOPS_ATOMIC(atomicAnd, old & value)
BIGOPS_ATOMIC(atomicOr, old | value)
BIGOPS_ATOMIC(atomicXor, old ^ value)
BIGOPS_ATOMIC(atomicExch, value)
BIGOPS_ATOMIC(atomicInc, old >= value ? 0 : old + 1)
BIGOPS_ATOMIC(atomicDec, old == 0 || old > value ? value : old - 1)
#undef BIGOPS_ATOMIC

template <class T>
__forceinline__ T atomicCAS(T* pointer, typename bigops::simt::Same<T>::type compare,
            typename bigops::simt::Same<T>::type value) {
    return bigops::simt::atomic_update(pointer, [&](T old) { return old == compare ? value : old; });
}

// Caching is not modelled: these are plain accesses, of one instruction each.
#define BIGOPS_LOAD(NAME)       \
    template <class T>          \
    __forceinline__ T NAME(const T* p) { \
        return *p;              \
    }
#define BIGOPS_STORE(NAME)           \
    template <class T>               \
    __forceinline__ void NAME(T* p, T value) { \
        *p = value;                  \
    }
BIGOPS_LOAD(__ldg)
BIGOPS_LOAD(__ldca)
BIGOPS_LOAD(__ldcg)
BIGOPS_LOAD(__ldcs)
BIGOPS_LOAD(__ldlu)
BIGOPS_LOAD(__ldcv)
BIGOPS_STORE(__stwb)
BIGOPS_STORE(__stcg)
BIGOPS_STORE(__stcs)
BIGOPS_STORE(__stwt)
#undef BIGOPS_LOAD
#undef BIGOPS_STORE

__forceinline__ size_t __cvta_generic_to_shared(const void* p) { return bigops::simt::shared_address(p); }
__forceinline__ void* __cvta_shared_to_generic(size_t address) {
    return bigops::simt::shared_pointer(static_cast<uint32_t>(address));
}
[[noreturn]] __forceinline__ void __trap() {
    bigops::simt::fatal(bigops::simt::Finding::misuse, "__trap()");
}

// ---- Arithmetic. The approximate functions are exact here: errors within their bounds are not
// modelled.

template <class A, class B>
constexpr std::common_type_t<A, B> min(A a, B b) {
    using T = std::common_type_t<A, B>;
    return static_cast<T>(b) < static_cast<T>(a) ? static_cast<T>(b) : static_cast<T>(a);
}
template <class A, class B>
constexpr std::common_type_t<A, B> max(A a, B b) {
    using T = std::common_type_t<A, B>;
    return static_cast<T>(a) < static_cast<T>(b) ? static_cast<T>(b) : static_cast<T>(a);
}
__forceinline__ float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
__forceinline__ float __expf(float x) { return std::exp(x); }
__forceinline__ float __logf(float x) { return std::log(x); }
__forceinline__ float __log2f(float x) { return std::log2(x); }
__forceinline__ float __fdividef(float a, float b) { return a / b; }
__forceinline__ float __frcp_rn(float x) { return 1.0f / x; }
__forceinline__ float __fsqrt_rn(float x) { return std::sqrt(x); }
__forceinline__ float __fadd_rn(float a, float b) { return a + b; }
__forceinline__ float __fsub_rn(float a, float b) { return a - b; }
__forceinline__ float __fmul_rn(float a, float b) { return a * b; }
__forceinline__ float __fdiv_rn(float a, float b) { return a / b; }
__forceinline__ float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
__forceinline__ float __saturatef(float x) { return x > 0.0f ? (x < 1.0f ? x : 1.0f) : 0.0f; }
__forceinline__ int __float_as_int(float x) { return std::bit_cast<int>(x); }
__forceinline__ unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
__forceinline__ float __int_as_float(int x) { return std::bit_cast<float>(x); }
__forceinline__ float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
__forceinline__ long long __double_as_longlong(double x) { return std::bit_cast<long long>(x); }
__forceinline__ double __longlong_as_double(long long x) { return std::bit_cast<double>(x); }
__forceinline__ int __float2int_rn(float x) { return static_cast<int>(std::nearbyint(x)); }
__forceinline__ int __float2int_rz(float x) { return static_cast<int>(x); }
__forceinline__ int __popc(unsigned x) { return std::popcount(x); }
__forceinline__ int __popcll(unsigned long long x) { return std::popcount(x); }
__forceinline__ int __clz(int x) { return std::countl_zero(static_cast<unsigned>(x)); }
__forceinline__ int __ffs(int x) { return x == 0 ? 0 : std::countr_zero(static_cast<unsigned>(x)) + 1; }
__forceinline__ unsigned __umulhi(unsigned a, unsigned b) {
    return static_cast<unsigned>(static_cast<uint64_t>(a) * b >> 32);
}
__forceinline__ int __mulhi(int a, int b) {
    return static_cast<int>(static_cast<int64_t>(a) * b >> 32);
}
__forceinline__ unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
    return static_cast<unsigned long long>(static_cast<unsigned __int128>(a) * b >> 64);
}
__forceinline__ unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
    const uint64_t bytes = static_cast<uint64_t>(b) << 32 | a;
    unsigned result = 0;
    for (int i = 0; i < 4; ++i) {
        const unsigned select = selector >> (4 * i) & 0xf;
        unsigned byte = static_cast<unsigned>(bytes >> (8 * (select & 7)) & 0xff);
        if (select & 8) byte = byte & 0x80 ? 0xff : 0;  // the sign, replicated
        result |= byte << (8 * i);
    }
    return result;
}
__forceinline__ unsigned __funnelshift_l(unsigned low, unsigned high, unsigned shift) {
    const uint64_t both = static_cast<uint64_t>(high) << 32 | low;
    return static_cast<unsigned>(both << (shift & 31) >> 32);
}
__forceinline__ unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
    const uint64_t both = static_cast<uint64_t>(high) << 32 | low;
    return static_cast<unsigned>(both >> (shift & 31));
}
