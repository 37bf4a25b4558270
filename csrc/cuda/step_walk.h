// How an optimizer's step goes over a list of tensors, and what its norm needs of the same. A step
// reads a few streams and writes most of them back and is as fast as memory, if it starts once and
// nothing waits: addresses and sizes travel as kernel arguments, of which there are 32764 bytes (CUDA
// C++ Programming Guide, "__global__ function parameters"; PTX ISA 8.1): 500 tensors a launch for Adam.
// So there is no table in memory to be filled, guarded and kept, and a captured graph holds its own
// copy. What a launch gets is copied whole, so that short lists have a short table.
//
// A block owns a chunk of one tensor; rows hold the number of their first chunk, so a binary search
// tells which. A thread has all that it reads of the chunk on the way before it uses any.
#pragma once

#include <algorithm>
#include <cstring>
#include <limits>
#include <type_traits>

#include "device/launch.h"
#include "step_tensors.h"

namespace bigops::cuda {

constexpr int kThreads = 256;
constexpr size_t kArgumentBytes = 32764;
constexpr size_t kFewBytes = 4096;
constexpr size_t kOtherArguments = 256;  // beside the table: more than there are

// 16-byte pieces of each stream that a thread moves: of four streams, 128 bytes are on the way.
constexpr int kPieces = 2;

// ---- The table

// C: of what the rounded copies of parameters are; void: there are none.
template <class C>
struct Copy {
    C* copy;
};
template <>
struct Copy<void> {};

template <class C, int kMostRoles>
struct StepRow : Copy<C> {
    void* data[kMostRoles];
    int64_t numel;
    int first_chunk;

    StepRow() = default;
    explicit StepRow(const StepTensor& tensor) : Copy<C>(), numel(tensor.numel), first_chunk(0) {
        std::copy_n(tensor.data, kMostRoles, data);
        if constexpr (!std::is_void_v<C>) this->copy = static_cast<C*>(tensor.copy);
    }
};

template <class R, int kRows>
struct Table {
    R rows[kRows];
    int count;
};

template <class R>
constexpr int rows_within(size_t bytes) {
    return static_cast<int>((bytes - kOtherArguments) / sizeof(R));
}

// Calls body(table, first row) with as few tables as hold all rows.
template <class R, class Body>
void for_tables(const std::vector<R>& rows, Body body) {
    constexpr int kFew = rows_within<R>(kFewBytes), kMany = rows_within<R>(kArgumentBytes);
    const auto fill = [&](auto table, size_t first) {
        const size_t most = std::extent_v<decltype(table.rows)>;
        table.count = static_cast<int>(std::min(most, rows.size() - first));
        std::memcpy(table.rows, rows.data() + first, table.count * sizeof(R));
        body(table, first);
    };
    for (size_t first = 0; first < rows.size(); first += kMany) {
        if (rows.size() - first <= kFew) fill(Table<R, kFew>{}, first);
        else fill(Table<R, kMany>{}, first);
    }
}

template <class R, int kRows>
__device__ int row_of(const Table<R, kRows>& table, int chunk) {
    int low = 0, high = table.count;
    while (high - low > 1) {
        const int middle = (low + high) / 2;
        if (table.rows[middle].first_chunk <= chunk) low = middle;
        else high = middle;
    }
    return low;
}

// ---- Elements

struct Math {
    using Scalar = float;
    using Lanes = float;
    static __device__ float fma(float a, float b, float c) { return fmaf(a, b, c); }
    static __device__ float sqrt(float x) { return sqrtf(x); }
};

__device__ inline float widen(float x) { return x; }
__device__ inline float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float widen(__half x) { return __half2float(x); }
template <class T>
__device__ inline T narrow(float x);
template <>
__device__ inline float narrow<float>(float x) { return x; }
template <>
__device__ inline __nv_bfloat16 narrow<__nv_bfloat16>(float x) { return __float2bfloat16_rn(x); }
template <>
__device__ inline __half narrow<__half>(float x) { return __float2half_rn(x); }

// Elements moved as one access, of 16 bytes (8 for copies) or a single one: the intrinsics tell the compiler that
// addresses from a table are global memory's, and that nothing is read again, so L1 is passed by.
template <class T, int kCount>
struct alignas(kCount * sizeof(T)) Pack {
    using Wide = std::conditional_t<kCount * sizeof(T) == 16, uint4, uint2>;
    using Word = std::conditional_t<kCount == 1, T, Wide>;
    static_assert(sizeof(Word) == kCount * sizeof(T));
    T lanes[kCount];

    __device__ void load(const T* at) {
        const Word raw = __ldcg(reinterpret_cast<const Word*>(at));
        memcpy(lanes, &raw, sizeof raw);
    }
    __device__ void store(T* at) const {
        Word raw;
        memcpy(&raw, lanes, sizeof raw);
        __stcg(reinterpret_cast<Word*>(at), raw);
    }
};

template <class T>
constexpr int kWide = 16 / sizeof(T);
template <class T>
constexpr int kChunk = kThreads * kPieces * kWide<T>;

// ---- The walk

// What a thread updates at once of all streams.
template <class T, class Rule, int kCount>
struct Piece {
    Pack<T, kCount> packs[Rule::kRoles];

    // Of the first `read` roles.
    __device__ void load(T* const* at, int i, int read) {
        for (int role = 0; role < Rule::kRoles; ++role) {
            if (role < read) packs[role].load(at[role] + i);
            else packs[role] = {};
        }
    }
    __device__ void update(const Rule& rule) {
#pragma unroll
        for (int k = 0; k < kCount; ++k) {
            float lanes[Rule::kRoles];
            for (int role = 0; role < Rule::kRoles; ++role)
                lanes[role] = widen(packs[role].lanes[k]);
            rule(lanes);
            for (int role = 0; role < Rule::kRoles; ++role)
                if (role != kGrad) packs[role].lanes[k] = narrow<T>(lanes[role]);
        }
    }
    __device__ void store(T* const* at, int i) const {
        for (int role = 0; role < Rule::kRoles; ++role)
            if (role != kGrad) packs[role].store(at[role] + i);
    }
    template <class C>
    __device__ void store_copy(C* at, int i) const {
        Pack<C, kCount> copy;
#pragma unroll
        for (int k = 0; k < kCount; ++k) copy.lanes[k] = narrow<C>(widen(packs[kParam].lanes[k]));
        copy.store(at + i);
    }
};

// This block's chunk of its row, by the Rule that `prepare` returns, which is asked when loads are on
// the way. Nothing, where *found_inf is not 0. What the last roles held does not count from `read` on.
template <class T, class Rule, class C, int kMostRoles, class Prepare>
__device__ void update_chunk(const StepRow<C, kMostRoles>& row, int read, const float* found_inf,
                             Prepare prepare) {
    const int64_t start = static_cast<int64_t>(blockIdx.x - row.first_chunk) * kChunk<T>;
    const int rest = static_cast<int>(min(int64_t{kChunk<T>}, row.numel - start));
    T* at[kMostRoles];
    uintptr_t addresses = 0;
    for (int role = 0; role < kMostRoles; ++role) {
        addresses |= reinterpret_cast<uintptr_t>(row.data[role]);
        at[role] = static_cast<T*>(row.data[role]) + start;
    }
    constexpr bool kCopies = !std::is_void_v<C>;
    if constexpr (kCopies)
        addresses |= reinterpret_cast<uintptr_t>(row.copy) * (sizeof(T) / sizeof(C));
    const auto store = [&](const auto& piece, int i) {
        piece.store(at, i);
        if constexpr (kCopies) piece.store_copy(row.copy + start, i);
    };

    constexpr int kCount = kWide<T>;
    const int wide = addresses % 16 == 0 ? rest / kCount * kCount : 0;
    const int first = static_cast<int>(threadIdx.x) * kCount;
    Piece<T, Rule, kCount> pieces[kPieces];
#pragma unroll
    for (int p = 0; p < kPieces; ++p)
        if (const int i = first + p * kThreads * kCount; i < wide) pieces[p].load(at, i, read);

    if (found_inf && *found_inf != 0.0f) return;
    const Rule rule = prepare();
#pragma unroll
    for (int p = 0; p < kPieces; ++p)
        if (const int i = first + p * kThreads * kCount; i < wide) {
            pieces[p].update(rule);
            store(pieces[p], i);
        }
    for (int i = wide + static_cast<int>(threadIdx.x); i < rest; i += kThreads) {
        Piece<T, Rule, 1> piece;
        piece.load(at, i, read);
        piece.update(rule);
        store(piece, i);
    }
}

// What gradients are multiplied by.
__device__ inline float factor_of(const StepScalars& scalars, float max_grad_norm, bool maximize) {
    return grad_factor(scalars.total_norm ? max_grad_norm : INFINITY, maximize,
                       scalars.total_norm ? *scalars.total_norm : 0.0f,
                       scalars.grad_scale ? *scalars.grad_scale : 1.0f);
}

// The learning rate, which may be on the device.
__device__ inline double rate_of(const StepScalars& scalars, double lr) {
    if (!scalars.lr.at) return lr;
    return scalars.lr.wide ? *static_cast<double*>(scalars.lr.at)
                           : *static_cast<float*>(scalars.lr.at);
}

// ---- Launchers

constexpr int64_t kMostBlocks = std::numeric_limits<int32_t>::max();

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Numbers the chunks of a table and returns how many there are. `size` tells of a row how many
// elements a chunk has.
template <class Rows, class Size>
int number_chunks(Rows& table, Size size) {
    int64_t chunks = 0;
    for (int i = 0; i < table.count; ++i) {
        auto& row = table.rows[i];
        row.first_chunk = static_cast<int>(chunks);
        chunks += ceil_div(row.numel, size(row));
        require(chunks <= kMostBlocks, "more chunks than a grid has blocks");
    }
    return static_cast<int>(chunks);
}

inline LaunchConfig blocks(int count, void* stream) {
    return {dim3(static_cast<unsigned>(count)), dim3(kThreads), 0, stream};
}

// run.operator()<type, type of copies or void>() for tensors of a dtype.
template <class Run>
void with_types(DType dtype, std::optional<DType> copies, Run run) {
    if (copies) {
        require(dtype == DType::f32 && (*copies == DType::bf16 || *copies == DType::f16),
                "a step copies float32 to bfloat16 or float16");
        if (*copies == DType::bf16) run.template operator()<float, __nv_bfloat16>();
        else run.template operator()<float, __half>();
        return;
    }
    switch (dtype) {
        case DType::f32: run.template operator()<float, void>(); break;
        case DType::bf16: run.template operator()<__nv_bfloat16, void>(); break;
        case DType::f16: run.template operator()<__half, void>(); break;
        default: require(false, "a step takes float32, bfloat16 and float16 on a GPU");
    }
}

}  // namespace bigops::cuda
