// Attention's forward pass with bf16 products, those of bf16 itself and those of float32 by parts:
// softmax(scale * query key^T + mask) value, in blocks with an online softmax (Milakov and
// Gimelshein 2018; Dao et al., FlashAttention, 2022), so that a thread never holds more than 32 x
// 256 scores.
//
// What makes it fast: keys and values are packed once into the layout the products want and shared
// by all query blocks and all heads of a group; scores, probabilities and results stay in a core's
// own caches; since the products leave bf16's exponential as the limit, it is one without range
// checks (exp2); and 16 rows find their maxima at once, whose latencies would add up otherwise.
// Placing the next block's products between the rows of softmax, or between pieces of a row, made
// it a tenth slower with AMX, though neither waits for the other.
#include "attention_bf16.h"

#if !defined(__AVX512BF16__)

namespace bigops {

bool attention_bf16_available() { return false; }

void attention_forward_bf16(const AttentionProblem&, const View&, const View&, const View&,
                            const View&, const View&) {
    require(false, "attention_forward_bf16 was compiled without bf16 products");
}

std::vector<bool> attention_forward_split(const AttentionProblem&, const View&, const View&,
                                          const View&, const View&, const View&) {
    return {};
}

}  // namespace bigops

#else

#include <cmath>
#include <vector>

#include "attention_keys_bf16.h"
#include "threads.h"

#if defined(__AMX_BF16__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace bigops {
namespace {

// 32 rows are the tile unit's 2x2 block; 256 keys amortise the traffic of the results, and their
// scores stay in the first cache (192: 3% slower, 384: 2%). More rows, which would read keys and
// values from the second cache less often, gain nothing.
constexpr int kRows = 32, kKeys = 256;
constexpr int kScoreStride = kKeys + kSkew;

// ---- the maths of rows ----

// A maximum replaces the one that a row's results are relative to when it is this much larger, in
// the scores' unit: seldom after the first keys. (Rescaling late is FlashAttention-4's.)
constexpr float kSlack = 8.0f;

// The largest lane of each of 16 registers, register i's in lane i.
inline VecF maxima(VecF (&rows)[kPanel]) {
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
#pragma GCC unroll 4
    for (int distance = kPanel / 2; distance > 0; distance /= 2) {
        const __mmask16 second = _mm512_test_epi32_mask(lane, _mm512_set1_epi32(distance));
        const __m512i other = _mm512_xor_si512(lane, _mm512_set1_epi32(distance));
        const __m512i from = _mm512_mask_add_epi32(other, second, other, _mm512_set1_epi32(kPanel));
#pragma GCC unroll 8
        for (int i = 0; i < distance; ++i) {
            const VecF a = rows[i], b = rows[i + distance];
            rows[i] = vmax<VecF>(_mm512_mask_blend_ps(second, a, b),
                                 _mm512_permutex2var_ps(a, from, b));
        }
    }
    return rows[0];
}

inline VecF largest_lanes(const float* scores, int width) {
    VecF top0 = load(scores), top1 = load(scores + 16);
    for (int j = 32; j < width; j += 32) {
        top0 = vmax(load(scores + j), top0);
        top1 = vmax(load(scores + j + 16), top1);
    }
    return vmax(top0, top1);
}

// Scores become power(scale * score - offset), as the left operand's rows in `weights`, whose parts
// lie `part` apart; it may be the scores' memory where they have one part. `width` is a multiple of
// 32; `sums` has one partial sum per lane, of the unrounded probabilities, as lse needs them;
// dropout, if any, comes after that.
template <class T, bool kDrops>
inline void weigh(const float* scores, int width, float scale, float offset, const int16_t* kept,
                  float* sums, bf16* weights, int64_t part) {
    const VecF factor = splat(scale), shift = splat(-offset);
    VecF sum0 = load(sums), sum1 = {};
    for (int j = 0; j < width; j += 32) {
        VecF p0 = power<T>(fma(load(scores + j), factor, shift));
        VecF p1 = power<T>(fma(load(scores + j + 16), factor, shift));
        sum0 += p0;
        sum1 += p1;
        if constexpr (kDrops) {
            p0 = _mm512_maskz_mov_ps(kept_lanes(kept + j), p0);
            p1 = _mm512_maskz_mov_ps(kept_lanes(kept + j + 16), p1);
        }
        // In place the store trails the loads: key j lands at byte 2j of a row, read from byte 4j.
        const Parts<T> parts = parts_of<T>(p0, p1);
        for (int n = 0; n < kParts<T>; ++n) _mm512_storeu_si512(weights + n * part + j, parts[n]);
    }
    store(sums, sum0 + sum1);
}

// ---- one block of queries ----

// A thread's memory. Rows are padded to whole tiles; what the padding holds is never used.
template <class T>
struct Arena {
    int64_t query_part, result_stride;
    Aligned<bf16> query;
    Aligned<float> scores, result;
    Aligned<bf16> weights;  // null where they take the place of the scores
    alignas(64) float sums[kRows][kPanel];
    alignas(64) float offset[kRows];  // what its results are relative to; -inf: it has seen nothing
    alignas(64) float addend[kKeys];
    alignas(64) int16_t kept[kKeys + Dropout::kRowSlack];

    static constexpr bool kInPlace = kParts<T> == 1;
    static constexpr int64_t kWeightStride = kInPlace ? 2 * kScoreStride : kKeys + 2 * kSkew;
    static constexpr int64_t kWeightPart = kRows * kWeightStride;

    Arena(int64_t depth, int64_t columns)
        : query_part(kRows * depth),
          result_stride(columns + kSkew),
          query(allocate<bf16>(kParts<T> * query_part)),
          scores(allocate<float>(kRows * kScoreStride)),
          result(allocate<float>(kRows * result_stride)),
          weights(kInPlace ? nullptr : allocate<bf16>(kParts<T> * kWeightPart)) {}

    bf16* weight_rows() const {
        return kInPlace ? reinterpret_cast<bf16*>(scores.get()) : weights.get();
    }
};

template <class T>
struct Forward {
    const AttentionProblem& p;
    const View &query, &key, &value, &out, &lse;
    SplitRanges& ranges;
    PackedHeads<T> packed{p};
    RowScores row_scores{p, kScoreUnit<T>};
    Dropout dropout{p.options.seed, p.options.dropout_p};
    Pieces blocks{p.batch, p.heads,
                  [this](int64_t b) { return divide_up(p.sequence(b).query_len, kRows); }};

    void block(Arena<T>& m, const Pieces::Piece& piece) const;
    void load_query(Arena<T>& m, const Sequence& s, int64_t h, int64_t first, int count) const;
    void softmax(Arena<T>& m, const Sequence& s, int64_t h, int64_t i, int row, int rows,
                 int64_t j, int count, bool first) const;
    void write(const Arena<T>& m, const Sequence& s, int64_t h, int64_t first, int count) const;
    void run() const;
};

template <class T>
void Forward<T>::load_query(Arena<T>& m, const Sequence& s, int64_t h, int64_t first,
                            int count) const {
    const __m512i sign = sign_of_scale(p.options.scale);
    const Rows<T> rows{s.query_row<T>(query, h, first), query.strides[2], query.strides[3], count,
                       p.head_size};
    ranges.take(s.index, SplitRanges::query, rows);
    for (int r = 0; r < count; ++r)
        for (int64_t d = 0; d < packed.depth; d += kTileDepth) {
            const Parts<T> row = rows.load(r, d);
            for (int part = 0; part < kParts<T>; ++part)
                _mm512_store_si512(m.query.get() + part * m.query_part + r * packed.depth + d,
                                   _mm512_xor_si512(row[part], sign));
        }
}

// Queries i and after, `rows` rows of their block from `row` on (16 at most), against keys
// [j, j + count), the rows' first ones or more of them; rescales the rows' results so far.
template <class T>
void Forward<T>::softmax(Arena<T>& m, const Sequence& s, int64_t h, int64_t i, int row,
                         int rows, int64_t j, int count, bool first) const {
    float* scores = m.scores.get() + row * kScoreStride;
    const int width = static_cast<int>(round_up(count, kTileDepth));
    VecF tops[kPanel];
    for (int r = 0; r < kPanel; ++r) {
        tops[r] = splat(-kInf);
        if (r >= rows) continue;
        float* of_row = scores + r * kScoreStride;
        row_scores.map(s, h, i + r, j, count, row + r == 0, of_row, m.addend);
        hide(s, i + r, j, width, of_row);
        tops[r] = largest_lanes(of_row, width);
    }
    const float factor = row_scores.factor();
    const VecF before = load(m.offset + row), top = maxima(tops) * factor;
    const __mmask16 grown = _mm512_cmp_ps_mask(top, before + kSlack, _CMP_GT_OQ);
    store(m.offset + row, _mm512_mask_mov_ps(before, grown, top));
    for (unsigned left = grown; left != 0; left &= left - 1) {
        const int r = std::countr_zero(left);
        // libm's: what our polynomial is off by would stay in the sums.
        const float shrink = first ? 0.0f : power_of<T>(before[r] - top[r]);
        float *sums = m.sums[row + r], *result = m.result.get() + (row + r) * m.result_stride;
        store(sums, load(sums) * shrink);
        for (int64_t d = 0; !first && d < packed.columns; d += kPanel)
            store(result + d, load(result + d) * shrink);
    }
    for (int r = 0; r < rows; ++r) {
        float* of_row = scores + r * kScoreStride;
        // A row that has seen nothing keeps -inf, and its scores must meet a finite offset.
        const float offset = m.offset[row + r] == -kInf ? 0.0f : m.offset[row + r];
        bf16* weights = m.weight_rows() + (row + r) * m.kWeightStride;
        if (dropout) {
            const int16_t* kept =
                dropout.row(s.index * p.heads + h, i + r, j, count, m.kept);
            weigh<T, true>(of_row, width, factor, offset, kept, m.sums[row + r], weights,
                           m.kWeightPart);
        } else {
            weigh<T, false>(of_row, width, factor, offset, nullptr, m.sums[row + r], weights,
                            m.kWeightPart);
        }
    }
}

template <class T>
void Forward<T>::write(const Arena<T>& m, const Sequence& s, int64_t h, int64_t first,
                       int count) const {
    // The sink is one more score, of no value.
    const float sink = p.sink<float>(h) * static_cast<float>(kScoreUnit<T>);
    for (int r = 0; r < count; ++r) {
        float total = sum(load(m.sums[r])), maximum = m.offset[r], shrink = 1.0f;
        const bool empty = total == 0.0f;  // not by the maximum: comparisons lose a NaN
        if (sink > -kInf) {
            maximum = std::max(sink, maximum);
            shrink = power_of<T>(m.offset[r] - maximum);
            total = total * shrink + power_of<T>(sink - maximum);
        }
        *s.query_row<float>(lse, h, first + r) =
            total == 0.0f
                ? -kInf
                : static_cast<float>(maximum / kScoreUnit<T> +
                                     std::log(static_cast<double>(total)));
        T* row = s.query_row<T>(out, h, first + r);
        const float* result = m.result.get() + r * m.result_stride;
        const float factor = static_cast<float>(dropout.factor()) * shrink / total;
        for (int64_t d = 0; d < p.value_size; d += kPanel)
            store_elements(row + d * out.strides[3], out.strides[3],
                           empty ? VecF{} : load(result + d) * factor, p.value_size - d);
    }
}

template <class T>
void Forward<T>::block(Arena<T>& m, const Pieces::Piece& piece) const {
    const Sequence s = p.sequence(piece.b);
    const int64_t first = piece.n * kRows, head = piece.h / p.group;
    const int count = static_cast<int>(std::min<int64_t>(kRows, s.query_len - first));
    const int64_t begin = s.first_key(first) / kGroup * kGroup, end = s.end_key(first + count - 1);
    load_query(m, s, piece.h, first, count);
    std::fill_n(m.offset, kRows, -kInf);
    std::fill_n(m.sums[0], count * kPanel, 0.0f);

    for (int64_t j = begin; j < end; j += kKeys) {
        const int seen = static_cast<int>(std::min<int64_t>(kKeys, end - j));
        const int padded = static_cast<int>(round_up(seen, kTileDepth));
        Product<kParts<T>>{.left = m.query.get(),
                           .left_stride = packed.depth,
                           .left_part = m.query_part,
                           .right = packed.key_panel(s, head, j),
                           .panel_stride = packed.depth * kPanel,
                           .right_part = packed.key_part,
                           .result = m.scores.get(),
                           .result_stride = kScoreStride,
                           .rows = count,
                           .panels = padded / kPanel,
                           .depth = static_cast<int>(packed.depth),
                           .accumulate = false}
            .run();
        for (int r = 0; r < count; r += kPanel)
            softmax(m, s, piece.h, first + r, r, std::min(kPanel, count - r), j, seen, j == begin);
        Product<kParts<T>>{.left = m.weight_rows(),
                           .left_stride = m.kWeightStride,
                           .left_part = m.kWeightPart,
                           .right = packed.value_panel(s, head, j),
                           .panel_stride = packed.value_panel_stride(s),
                           .right_part = packed.value_part,
                           .result = m.result.get(),
                           .result_stride = m.result_stride,
                           .rows = count,
                           .panels = static_cast<int>(packed.columns) / kPanel,
                           .depth = padded,
                           .accumulate = j > begin}
            .run();
    }
    write(m, s, piece.h, first, count);
}

template <class T>
void Forward<T>::run() const {
    const int64_t packs = packed.groups.total();
    const int team = static_cast<int>(std::min<int64_t>(
        threads_for(p.operations), std::max<int64_t>({1, blocks.total(), packs / 8})));
    std::vector<Arena<T>> scratch;
    for (int t = 0; t < team; ++t) scratch.emplace_back(packed.depth, packed.columns);

#pragma omp parallel num_threads(team)
    {
        const ProductThread thread;
        Arena<T>& m = scratch[static_cast<size_t>(omp_get_thread_num())];
#pragma omp for schedule(static)
        for (int64_t i = 0; i < packs; ++i)
            packed.pack(key, value, packed.groups.find(i), ranges);
        // Head after head, so that its keys and values stay cached; in a head the last queries
        // first: under a diagonal they see most, and the lightest blocks are left for the end.
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < blocks.total(); ++i) {
            Pieces::Piece piece = blocks.find(i);
            piece.n = blocks.count(piece.b) - 1 - piece.n;
            block(m, piece);
        }
    }
    fill_outside(p, p.options.cu_seqlens_q, out, p.value_size, T{});
    fill_outside(p, p.options.cu_seqlens_q, lse, 1, -kInf);
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

void attention_forward_bf16(const AttentionProblem& p, const View& query, const View& key,
                            const View& value, const View& out, const View& lse) {
    require(attention_bf16_available(), "this system withholds the tile registers");
    SplitRanges none(0);
    Forward<bf16>{p, query, key, value, out, lse, none}.run();
}

std::vector<bool> attention_forward_split([[maybe_unused]] const AttentionProblem& problem,
                                          [[maybe_unused]] const View& query,
                                          [[maybe_unused]] const View& key,
                                          [[maybe_unused]] const View& value,
                                          [[maybe_unused]] const View& out,
                                          [[maybe_unused]] const View& lse) {
#if defined(__AMX_BF16__)
    if (attention_bf16_available())
        return run_split(problem, [&](const AttentionProblem& p, SplitRanges& ranges) {
            Forward<float>{p, query, key, value, out, lse, ranges}.run();
        });
#endif
    return {};
}

}  // namespace bigops

#endif
