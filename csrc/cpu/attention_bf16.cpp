// Attention's forward pass with bf16 products: softmax(scale * query key^T + mask) value, in blocks
// with an online softmax (Milakov and Gimelshein 2018; Dao et al., FlashAttention, 2022), so that a
// thread never holds more than 32 x 512 scores.
//
// What makes it fast: keys and values are packed once into the layout the products want and shared
// by all query blocks and all heads of a group; scores, probabilities and results stay in a core's
// own caches; and since the products leave the exponential as the limit, it is one without range
// checks (exp2 below). Placing the next block's products between the rows of softmax was tried on
// Sapphire Rapids and gained nothing.
#include "attention_bf16.h"

#if !defined(__AVX512BF16__)

namespace bigops {

bool attention_bf16_available() { return false; }

void attention_forward_bf16(const View&, const View&, const View&, const AttentionOptions&,
                            const View&, const View&) {
    require(false, "attention_forward_bf16 was compiled without bf16 products");
}

}  // namespace bigops

#else

#include <cmath>
#include <memory>
#include <new>
#include <vector>

#include "attention_scores.h"
#include "attention_tiles_bf16.h"
#include "threads.h"

#if defined(__AMX_BF16__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace bigops {
namespace {

// 32 rows are the tile unit's 2x2 block; 512 keys amortise a row's reductions and the traffic of
// the results (256: 10% slower; 64 rows: the same with more memory).
constexpr int kRows = 32, kKeys = 512;
constexpr int kScoreStride = kKeys + kSkew;

// ---- the maths of one row ----

// Scores become probabilities relative to the row's maximum so far, as bf16 at the front of the
// same memory. `width` is a multiple of 32; `sums` has one partial sum per lane, of the unrounded
// probabilities, as lse needs them. Returns what the row's earlier results must be multiplied by.
inline float softmax_row(float* scores, int width, float scale, float& maximum, float* sums) {
    VecF top0 = load(scores), top1 = load(scores + 16);
    for (int j = 32; j < width; j += 32) {
        top0 = vmax(load(scores + j), top0);
        top1 = vmax(load(scores + j + 16), top1);
    }
    const float before = maximum;
    maximum = std::max(before, max(vmax(top0, top1)) * scale);
    // A row that has seen nothing keeps -inf, and its scores must meet a finite offset.
    const float offset = maximum == -kInf ? 0.0f : maximum;
    // libm's: what our polynomial is off by would stay in the sums.
    const float shrink = maximum == before ? 1.0f : std::exp2(before - offset);
    const VecF factor = splat(scale), shift = splat(-offset);
    VecF sum0 = load(sums) * shrink, sum1 = {};
    for (int j = 0; j < width; j += 32) {
        const VecF p0 = exp2(fma(load(scores + j), factor, shift));
        const VecF p1 = exp2(fma(load(scores + j + 16), factor, shift));
        sum0 += p0;
        sum1 += p1;
        // The store trails the loads: key j lands at byte 2j of the row, read from byte 4j.
        _mm512_storeu_si512(reinterpret_cast<bf16*>(scores) + j,
                            reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(p1, p0)));
    }
    store(sums, sum0 + sum1);
    return shrink;
}

// ---- packed operands ----

struct Sizes : AttentionProblem {
    int64_t keys, padded_keys;  // keys that any query sees
    int64_t depth, columns;     // padded head sizes of key and value
    Sequence all;
    int64_t query_len;
    int64_t keys_seen(int64_t i) const { return all.end_key(i); }

    explicit Sizes(const AttentionProblem& problem)
        : AttentionProblem(problem), all(sequence(0)), query_len(query_rows) {
        keys = query_len > 0 ? keys_seen(query_len - 1) : 0;
        padded_keys = round_up(keys, kGroup);
        depth = round_up(head_size, kTileDepth);
        columns = round_up(value_size, kPanel);
    }
};

// Per key head: panels of 16 keys over `depth`, and panels of 16 value columns over `padded_keys`.
struct PackedHeads {
    Sizes p;
    Aligned<bf16> keys, values;

    explicit PackedHeads(const Sizes& sizes) : p(sizes) {
        const int64_t rows = p.batch * p.kv_heads * p.padded_keys;
        keys = allocate<bf16>(rows * p.depth);
        values = allocate<bf16>(rows * p.columns);
    }
    bf16* key_panel(int64_t head, int64_t j) const {
        return keys.get() + (head * p.padded_keys + j) * p.depth;
    }
    bf16* value_panel(int64_t head, int64_t column, int64_t j) const {
        return values.get() + (head * p.columns + column) * p.padded_keys + j * kPanel;
    }

    // Keys [j, j + 32) of one head; those beyond the last are zero.
    void pack(const View& key, const View& value, int64_t head, int64_t j) const {
        const int64_t b = head / p.kv_heads, h = head % p.kv_heads;
        const bf16* key_head = key.ptr<bf16>() + b * key.strides[0] + h * key.strides[1];
        const bf16* value_head = value.ptr<bf16>() + b * value.strides[0] + h * value.strides[1];
        const auto row = [&](const bf16* source, const View& view, int64_t i, int64_t d) {
            if (i >= p.keys) return _mm512_setzero_si512();
            return load_bf16(source + i * view.strides[2] + d * view.strides[3], view.strides[3],
                             view.shape[3] - d);
        };
        for (int64_t panel = j; panel < j + kGroup; panel += kPanel)
            for (int64_t d = 0; d < p.depth; d += kTileDepth) {
                __m512i rows[kPanel];
                for (int i = 0; i < kPanel; ++i) rows[i] = row(key_head, key, panel + i, d);
                pack_columns(rows, key_panel(head, panel) + d * kPanel);
            }
        for (int64_t d = 0; d < p.columns; d += 2 * kPanel)
            for (int64_t i = j; i < j + kGroup; i += 2)
                pack_rows(row(value_head, value, i, d), row(value_head, value, i + 1, d),
                          value_panel(head, d, i),
                          d + kPanel < p.columns ? value_panel(head, d + kPanel, i) : nullptr);
    }
};

// ---- one block of queries ----

// A thread's memory. Rows are padded to whole tiles; what the padding holds is never used.
struct Scratch {
    Aligned<bf16> query;
    Aligned<float> scores, result;
    int64_t result_stride;
    alignas(64) float sums[kRows][kPanel];
    float maximum[kRows];
    alignas(64) float addend[kKeys];

    explicit Scratch(const Sizes& p)
        : query(allocate<bf16>(kRows * p.depth)),
          scores(allocate<float>(kRows * kScoreStride)),
          result(allocate<float>(kRows * (p.columns + kSkew))),
          result_stride(p.columns + kSkew) {}
};

struct Forward {
    Sizes p;
    const View &query, &key, &value;
    const View* mask;
    const View &out, &lse;
    PackedHeads packed;

    void block(Scratch& s, int64_t b, int64_t h, int64_t first) const;
    void load_query(Scratch& s, int64_t b, int64_t h, int64_t first, int count) const;
    void softmax(Scratch& s, int64_t b, int64_t h, int64_t i, int r, int64_t j, int count) const;
    void write(const Scratch& s, int64_t b, int64_t h, int64_t first, int count) const;
};

// A negative scale moves into the queries' signs, so that the largest score has the largest product.
void Forward::load_query(Scratch& s, int64_t b, int64_t h, int64_t first, int count) const {
    const __m512i sign = _mm512_set1_epi16(static_cast<int16_t>(p.options.scale < 0 ? 0x8000 : 0));
    for (int r = 0; r < count; ++r) {
        const bf16* row = query.ptr<bf16>() + b * query.strides[0] + h * query.strides[1] +
                          (first + r) * query.strides[2];
        for (int64_t d = 0; d < p.depth; d += kTileDepth) {
            const __m512i x =
                load_bf16(row + d * query.strides[3], query.strides[3], p.head_size - d);
            _mm512_store_si512(s.query.get() + r * p.depth + d, _mm512_xor_si512(x, sign));
        }
    }
}

// Query i, row r of its block, against keys [j, j + count); scales the row's result so far.
void Forward::softmax(Scratch& s, int64_t b, int64_t h, int64_t i, int r, int64_t j,
                      int count) const {
    float* scores = s.scores.get() + r * kScoreStride;
    const int width = static_cast<int>(round_up(count, kTileDepth));
    // Not 0, which would make the unseen keys' -inf a NaN; so small that all others become 0.
    float scale = std::max(static_cast<float>(std::abs(p.options.scale) * kLog2E),
                           std::numeric_limits<float>::min());
    if (mask) {
        if (r == 0 || mask->strides[2] != 0) addend_row(p, p.sequence(b), h, i, j, count, static_cast<float>(kLog2E), s.addend);
        for (int k = 0; k < width; k += 16)
            store(scores + k, fma(load(scores + k), splat(scale), load(s.addend + k)));
        scale = 1.0f;
    }
    std::fill(scores + std::clamp<int64_t>(p.keys_seen(i) - j, 0, count), scores + width, -kInf);
    const float shrink = softmax_row(scores, width, scale, s.maximum[r], s.sums[r]);
    if (j == 0 || shrink == 1.0f) return;
    float* result = s.result.get() + r * s.result_stride;
    for (int64_t d = 0; d < p.columns; d += kPanel) store(result + d, load(result + d) * shrink);
}

void Forward::write(const Scratch& s, int64_t b, int64_t h, int64_t first, int count) const {
    for (int r = 0; r < count; ++r) {
        const int64_t i = first + r;
        const float total = sum(load(s.sums[r]));
        const bool empty = total == 0.0f;  // not by the maximum: comparisons lose a NaN
        lse.ptr<float>()[b * lse.strides[0] + h * lse.strides[1] + i * lse.strides[2]] =
            empty ? -kInf
                  : static_cast<float>(s.maximum[r] * kLn2 + std::log(static_cast<double>(total)));
        bf16* row = out.ptr<bf16>() + b * out.strides[0] + h * out.strides[1] + i * out.strides[2];
        const float* result = s.result.get() + r * s.result_stride;
        for (int64_t d = 0; d < p.value_size; d += kPanel) {
            const int lanes = static_cast<int>(std::min<int64_t>(kPanel, p.value_size - d));
            const VecF x = empty ? VecF{} : load(result + d) * (1.0f / total);
            if (out.strides[3] == 1) {
                _mm256_mask_storeu_epi16(row + d, static_cast<__mmask16>((1u << lanes) - 1),
                                         to_bf16_bits(x));
            } else {
                bf16 rounded[kPanel];
                store(rounded, x);
                for (int k = 0; k < lanes; ++k) row[(d + k) * out.strides[3]] = rounded[k];
            }
        }
    }
}

void Forward::block(Scratch& s, int64_t b, int64_t h, int64_t first) const {
    const int count = static_cast<int>(std::min<int64_t>(kRows, p.query_len - first));
    const int64_t head = b * p.kv_heads + h / p.group;
    const int64_t keys = p.keys_seen(first + count - 1);
    load_query(s, b, h, first, count);
    std::fill_n(s.maximum, count, -kInf);
    std::fill_n(s.sums[0], count * kPanel, 0.0f);

    for (int64_t j = 0; j < keys; j += kKeys) {
        const int seen = static_cast<int>(std::min<int64_t>(kKeys, keys - j));
        const int padded = static_cast<int>(round_up(seen, kTileDepth));
        Product{.left = s.query.get(),
                .left_stride = p.depth,
                .right = packed.key_panel(head, j),
                .panel_stride = p.depth * kPanel,
                .result = s.scores.get(),
                .result_stride = kScoreStride,
                .rows = count,
                .panels = padded / kPanel,
                .depth = static_cast<int>(p.depth),
                .accumulate = false}
            .run();
        for (int r = 0; r < count; ++r) softmax(s, b, h, first + r, r, j, seen);
        Product{.left = reinterpret_cast<const bf16*>(s.scores.get()),
                .left_stride = 2 * kScoreStride,
                .right = packed.value_panel(head, 0, j),
                .panel_stride = p.padded_keys * kPanel,
                .result = s.result.get(),
                .result_stride = s.result_stride,
                .rows = count,
                .panels = static_cast<int>(p.columns) / kPanel,
                .depth = padded,
                .accumulate = j > 0}
            .run();
    }
    write(s, b, h, first, count);
}

}  // namespace

bool attention_bf16_available() {
#if defined(__AMX_BF16__)
    // Linux hands out the tile state on request, to the whole process and once for all threads,
    // those already running included (Documentation/arch/x86/xstate.rst).
    constexpr int kArchReqXcompPerm = 0x1023, kXfeatureTileData = 18;
    static const bool granted =
        syscall(SYS_arch_prctl, kArchReqXcompPerm, kXfeatureTileData) == 0;
    return granted;
#else
    return true;
#endif
}

void attention_forward_bf16(const View& query, const View& key, const View& value,
                            const AttentionOptions& options, const View& out, const View& lse) {
    require(attention_bf16_available(), "this system withholds the tile registers");
    const Sizes p(attention_problem(query, key, value, options));
    require(query.dtype == DType::bf16, "query must be bfloat16");
    require_rows(query, value, out, lse);
    const View* mask = options.bias;
    if (p.batch * p.heads * p.query_len == 0) return;

    const int64_t threads = threads_for(p.operations);
    const int64_t heads = p.batch * p.heads;
    const int64_t blocks = (p.query_len + kRows - 1) / kRows;
    const int64_t groups = p.padded_keys / kGroup;
    const int64_t packs = p.batch * p.kv_heads * groups;
    const Forward forward{p, query, key, value, mask, out, lse, PackedHeads(p)};
    const int team = static_cast<int>(std::min(threads, std::max(heads * blocks, packs / 8)));
    std::vector<Scratch> scratch;
    for (int t = 0; t < team; ++t) scratch.emplace_back(p);

#pragma omp parallel num_threads(team)
    {
        const ProductThread thread;
#pragma omp for schedule(static)
        for (int64_t i = 0; i < packs; ++i)
            forward.packed.pack(key, value, i / groups, i % groups * kGroup);
        // Head after head, so that its keys and values stay cached; in a head the last queries
        // first: under a diagonal they see most, and the lightest blocks are left for the end.
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < heads * blocks; ++i) {
            const int64_t head = i / blocks, block = blocks - 1 - i % blocks;
            forward.block(scratch[static_cast<size_t>(omp_get_thread_num())], head / p.heads,
                          head % p.heads, block * kRows);
        }
    }
}

}  // namespace bigops

#endif
