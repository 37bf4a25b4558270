// Adam, AdamW and AMSGrad (the rule is csrc/adam_rule.h) over a list of tensors, and the norm that
// clips them. A step reads four streams and writes three and is as fast as memory, if it starts
// once and nothing waits: addresses and sizes travel as kernel arguments, of which there are 32764
// bytes (CUDA C++ Programming Guide, "__global__ function parameters"; PTX ISA 8.1): 500 tensors a
// launch. So there is no table in memory to be filled, guarded and kept, and a captured graph holds
// its own copy. What a launch gets is copied whole, so that short lists have a short table.
//
// A block owns a chunk of one tensor; rows hold the number of their first chunk, so a binary search
// tells which. A thread has all that it reads of the chunk on the way before it uses any.
//
// The norm adds squares in double: each block writes its chunk's sum, and the last block to finish
// adds these up in a fixed order.
#include "adam.h"

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "device/launch.h"

namespace bigops::cuda {
namespace {

constexpr int kThreads = 256;
constexpr size_t kArgumentBytes = 32764;
constexpr size_t kFewBytes = 4096;
constexpr size_t kOtherArguments = 256;  // beside the table: more than there are

// 16-byte pieces of each stream that a thread moves: of four streams, 128 bytes are on the way.
constexpr int kPieces = 2;
// Of one stream only, and so more.
constexpr int kNormPieces = 8;

// ---- The table

// C: of what the rounded copies of parameters are; void: there are none.
template <class C>
struct Copy {
    C* copy;
};
template <>
struct Copy<void> {};

template <class C>
struct Row : Copy<C> {
    void* data[kAdamRoles];
    int64_t numel;
    int first_chunk;
    AdamPace<float> pace;
};

struct Counter {
    double step;
    DeviceNumber count;
};

struct NormRow {
    const void* grad;
    int64_t numel;
    int first_chunk;
    DType dtype;
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
template <class T>
constexpr int kNormChunk = kThreads * kNormPieces * kWide<T>;

// What a thread updates at once of all streams.
template <class T, bool kAmsgrad, int kCount>
struct Piece {
    static constexpr int kRoles = kAmsgrad ? kAdamRoles : kMaxExpAvgSq;
    Pack<T, kCount> packs[kRoles];

    __device__ void load(T* const* at, int i) {
        for (int role = 0; role < kRoles; ++role) packs[role].load(at[role] + i);
    }
    __device__ void update(const AdamNumbers<float>& numbers) {
#pragma unroll
        for (int k = 0; k < kCount; ++k) {
            float lanes[kAdamRoles] = {};
            for (int role = 0; role < kRoles; ++role) lanes[role] = widen(packs[role].lanes[k]);
            adam_rule<kAmsgrad, Math>(numbers, lanes[kGrad], lanes[kParam], lanes[kExpAvg],
                                      lanes[kExpAvgSq], lanes[kMaxExpAvgSq]);
            for (int role = 0; role < kRoles; ++role)
                if (role != kGrad) packs[role].lanes[k] = narrow<T>(lanes[role]);
        }
    }
    __device__ void store(T* const* at, int i) const {
        for (int role = 0; role < kRoles; ++role)
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

// ---- The step

// For a step whose count or learning rate is on the device: advances the count and writes what the
// update wants of both.
template <int kRows>
__global__ void __launch_bounds__(kThreads)
    adam_pace_kernel(const __grid_constant__ Table<Counter, kRows> table, AdamOptions options,
                     DeviceNumber lr, const float* found_inf, AdamPace<float>* paces) {
    const int i = static_cast<int>(blockIdx.x * kThreads + threadIdx.x);
    if (i >= table.count || (found_inf && *found_inf != 0.0f)) return;
    const auto [step, count] = table.rows[i];
    double now = step;
    if (count.at && count.wide) now = *static_cast<double*>(count.at) += 1;
    else if (count.at) now = *static_cast<float*>(count.at) += 1;
    double rate = options.lr;
    if (lr.at) rate = lr.wide ? *static_cast<double*>(lr.at) : *static_cast<float*>(lr.at);
    paces[i] = AdamPace<float>(options, rate, now);
}

template <class T, class C, bool kAmsgrad, int kRows>
__global__ void __launch_bounds__(kThreads)
    adam_kernel(const __grid_constant__ Table<Row<C>, kRows> table, AdamNumbers<float> numbers,
                float max_grad_norm, bool maximize, const float* total_norm,
                const float* grad_scale, const float* found_inf, const AdamPace<float>* paces) {
    const int number = row_of(table, static_cast<int>(blockIdx.x));
    const Row<C>& row = table.rows[number];
    const int64_t start = static_cast<int64_t>(blockIdx.x - row.first_chunk) * kChunk<T>;
    const int rest = static_cast<int>(min(int64_t{kChunk<T>}, row.numel - start));
    T* at[kAdamRoles];
    uintptr_t addresses = 0;
    for (int role = 0; role < kAdamRoles; ++role) {
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
    Piece<T, kAmsgrad, kCount> pieces[kPieces];
#pragma unroll
    for (int p = 0; p < kPieces; ++p)
        if (const int i = first + p * kThreads * kCount; i < wide) pieces[p].load(at, i);

    if (found_inf && *found_inf != 0.0f) return;
    numbers.factor = grad_factor(total_norm ? max_grad_norm : INFINITY, maximize,
                                 total_norm ? *total_norm : 0.0f, grad_scale ? *grad_scale : 1.0f);
    static_cast<AdamPace<float>&>(numbers) = paces ? paces[number] : row.pace;
#pragma unroll
    for (int p = 0; p < kPieces; ++p)
        if (const int i = first + p * kThreads * kCount; i < wide) {
            pieces[p].update(numbers);
            store(pieces[p], i);
        }
    for (int i = wide + static_cast<int>(threadIdx.x); i < rest; i += kThreads) {
        Piece<T, kAmsgrad, 1> piece;
        piece.load(at, i);
        piece.update(numbers);
        store(piece, i);
    }
}

// ---- The norm

template <class T>
__device__ double squares(const void* grads, int64_t start, int64_t numel) {
    const T* grad = static_cast<const T*>(grads) + start;
    constexpr int kCount = kWide<T>;
    const int rest = static_cast<int>(min(int64_t{kNormChunk<T>}, numel - start));
    const int wide = reinterpret_cast<uintptr_t>(grad) % 16 == 0 ? rest / kCount * kCount : 0;
    const int first = static_cast<int>(threadIdx.x) * kCount;
    Pack<T, kCount> packs[kNormPieces] = {};
    for (int p = 0; p < kNormPieces; ++p)
        if (const int i = first + p * kThreads * kCount; i < wide) packs[p].load(grad + i);
    // A thread adds up at most 72 squares, so float serves; across threads it is double.
    float sum = 0.0f;
    for (int p = 0; p < kNormPieces; ++p)
        for (int k = 0; k < kCount; ++k) {
            const float x = widen(packs[p].lanes[k]);
            sum = fmaf(x, x, sum);
        }
    for (int i = wide + static_cast<int>(threadIdx.x); i < rest; i += kThreads) {
        const float x = widen(grad[i]);
        sum = fmaf(x, x, sum);
    }
    return sum;
}

// The sum over the block, in thread 0. Between two calls there has to be a barrier.
__device__ double block_sum(double x) {
    __shared__ double warps[kThreads / 32];
    for (int lane = 16; lane > 0; lane /= 2) x += __shfl_down_sync(0xffffffffu, x, lane);
    if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = x;
    __syncthreads();
    if (threadIdx.x == 0)
        for (int warp = 1; warp < kThreads / 32; ++warp) x += warps[warp];
    return x;
}

// One of the launches that write `total` sums; this one's begin with number `first`.
template <int kRows>
__global__ void __launch_bounds__(kThreads)
    grad_norm_kernel(const __grid_constant__ Table<NormRow, kRows> table, unsigned first,
                     unsigned total, double* sums, unsigned* finished, float* out) {
    const NormRow& row = table.rows[row_of(table, static_cast<int>(blockIdx.x))];
    const auto chunk = static_cast<int64_t>(blockIdx.x) - row.first_chunk;
    double sum = 0.0;
    if (row.dtype == DType::bf16)
        sum = squares<__nv_bfloat16>(row.grad, chunk * kNormChunk<__nv_bfloat16>, row.numel);
    else if (row.dtype == DType::f16)
        sum = squares<__half>(row.grad, chunk * kNormChunk<__half>, row.numel);
    else
        sum = squares<float>(row.grad, chunk * kNormChunk<float>, row.numel);
    sum = block_sum(sum);

    __shared__ bool last;
    if (threadIdx.x == 0) {
        sums[first + blockIdx.x] = sum;
        __threadfence();
        last = atomicAdd(finished, 1u) == total - 1;
    }
    __syncthreads();
    if (!last) return;
    __threadfence();
    double all = 0.0;
#pragma unroll 8
    for (unsigned i = threadIdx.x; i < total; i += kThreads) all += __ldcg(sums + i);
    all = block_sum(all);
    if (threadIdx.x == 0) *out = static_cast<float>(::sqrt(all));
}

// ---- Launchers

constexpr int64_t kMostBlocks = std::numeric_limits<int32_t>::max();

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

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

LaunchConfig blocks(int count, void* stream) {
    return {dim3(static_cast<unsigned>(count)), dim3(kThreads), 0, stream};
}

template <class T, class C, bool kAmsgrad>
void step(const std::vector<Row<C>>& rows, const AdamOptions& options, const AdamScalars& scalars,
          const AdamPace<float>* paces, void* stream) {
    const AdamNumbers<float> numbers(options, 1);
    const auto max_grad_norm = static_cast<float>(options.max_grad_norm);
    for_tables(rows, [&]<int kRows>(Table<Row<C>, kRows>& table, size_t first) {
        const int chunks = number_chunks(table, [](const Row<C>&) { return kChunk<T>; });
        launch("adam_kernel", adam_kernel<T, C, kAmsgrad, kRows>, blocks(chunks, stream), table,
               numbers, max_grad_norm, options.maximize, scalars.total_norm, scalars.grad_scale,
               scalars.found_inf, paces ? paces + first : nullptr);
    });
}

// With each tensor's pace, where its step is known here.
template <class C>
std::vector<Row<C>> rows_of(const std::vector<AdamTensor>& tensors, const AdamOptions& options) {
    std::vector<Row<C>> rows;
    rows.reserve(tensors.size());
    AdamPace<float> pace;
    double step_of_pace = -1;
    for (const AdamTensor& tensor : tensors) {
        if (tensor.step != step_of_pace)
            pace = AdamPace<float>(options, options.lr, step_of_pace = tensor.step);
        Row<C> row = {};
        std::copy_n(tensor.data, kAdamRoles, row.data);
        if constexpr (!std::is_void_v<C>) row.copy = static_cast<C*>(tensor.copy);
        row.numel = tensor.numel;
        row.pace = pace;
        rows.push_back(row);
    }
    return rows;
}

int norm_chunk(DType dtype) { return dtype == DType::f32 ? kNormChunk<float> : kNormChunk<__half>; }

}  // namespace

int64_t adam_workspace(size_t tensors) {
    return static_cast<int64_t>(tensors * sizeof(AdamPace<float>));
}

int64_t grad_norm_workspace(size_t tensors, int64_t numel) {
    const int64_t sums = ceil_div(numel, kNormChunk<float>) + static_cast<int64_t>(tensors);
    return (sums + 1) * static_cast<int64_t>(sizeof(double));
}

void adam(const std::vector<AdamTensor>& tensors, DType dtype, std::optional<DType> copies,
          const AdamOptions& options, const AdamScalars& scalars, void* workspace, void* stream) {
    AdamPace<float>* paces = nullptr;
    const auto counted = [](const AdamTensor& tensor) { return tensor.count.at != nullptr; };
    if (scalars.lr.at || std::any_of(tensors.begin(), tensors.end(), counted)) {
        std::vector<Counter> counters;
        paces = static_cast<AdamPace<float>*>(workspace);
        for (const AdamTensor& tensor : tensors) counters.push_back({tensor.step, tensor.count});
        for_tables(counters, [&]<int kRows>(Table<Counter, kRows>& table, size_t first) {
            const int count = static_cast<int>(ceil_div(table.count, kThreads));
            launch("adam_pace_kernel", adam_pace_kernel<kRows>, blocks(count, stream), table,
                   options, scalars.lr, scalars.found_inf, paces + first);
        });
    }
    const auto run = [&]<class T, class C>() {
        const auto rows = rows_of<C>(tensors, options);
        if (options.amsgrad) step<T, C, true>(rows, options, scalars, paces, stream);
        else step<T, C, false>(rows, options, scalars, paces, stream);
    };
    if (copies) {
        require(dtype == DType::f32 && (*copies == DType::bf16 || *copies == DType::f16),
                "adam copies float32 to bfloat16 or float16");
        if (*copies == DType::bf16) run.operator()<float, __nv_bfloat16>();
        else run.operator()<float, __half>();
        return;
    }
    switch (dtype) {
        case DType::f32: run.operator()<float, void>(); break;
        case DType::bf16: run.operator()<__nv_bfloat16, void>(); break;
        case DType::f16: run.operator()<__half, void>(); break;
        default: require(false, "adam takes float32, bfloat16 and float16 on a GPU");
    }
}

void grad_norm(const std::vector<AdamTensor>& tensors, const std::vector<DType>& dtypes, float* out,
               void* workspace, void* stream) {
    auto* queue = static_cast<cudaStream_t>(stream);
    std::vector<NormRow> rows;
    int64_t total = 0;
    for (size_t i = 0; i < tensors.size(); ++i) {
        if (tensors[i].numel == 0) continue;
        rows.push_back({tensors[i].data[kGrad], tensors[i].numel, 0, dtypes[i]});
        total += ceil_div(tensors[i].numel, norm_chunk(dtypes[i]));
    }
    if (rows.empty()) {
        check(cudaMemsetAsync(out, 0, sizeof(float), queue), "grad_norm: clearing the result");
        return;
    }
    require(total <= kMostBlocks, "more chunks than a grid has blocks");
    auto* finished = static_cast<unsigned*>(workspace);
    auto* sums = static_cast<double*>(workspace) + 1;
    check(cudaMemsetAsync(finished, 0, sizeof(unsigned), queue), "grad_norm: clearing the counter");
    unsigned done = 0;
    for_tables(rows, [&]<int kRows>(Table<NormRow, kRows>& table, size_t) {
        const int chunks =
            number_chunks(table, [](const NormRow& row) { return norm_chunk(row.dtype); });
        launch("grad_norm_kernel", grad_norm_kernel<kRows>, blocks(chunks, stream), table, done,
               static_cast<unsigned>(total), sums, finished, out);
        done += static_cast<unsigned>(chunks);
    });
}

}  // namespace bigops::cuda
