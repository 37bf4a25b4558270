// Attention's forward pass with bf16 products: softmax(scale * query key^T + mask) value, in blocks
// with an online softmax (Milakov and Gimelshein 2018; Dao et al., FlashAttention, 2022), so that a
// thread never holds more than 32 x 256 scores.
//
// What makes it fast: keys and values are packed once into the layout the products want and shared
// by all query blocks and all heads of a group; scores, probabilities and results stay in a core's
// own caches; since the products leave the exponential as the limit, it is one without range checks
// (exp2 below); and 16 rows find their maxima at once, whose latencies would add up otherwise.
// Placing the next block's products between the rows of softmax, or between pieces of a row, made
// it a tenth slower with AMX, though neither waits for the other.
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
#include <vector>

#include "attention_scores_bf16.h"
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
// powers of two: seldom after the first keys. (Rescaling late is FlashAttention-4's.)
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

// Scores become 2^(scale * score - offset), as bf16 at the front of the same memory. `width` is a
// multiple of 32; `sums` has one partial sum per lane, of the unrounded probabilities, as lse needs
// them; dropout, if any, comes after that.
template <bool kDrops>
inline void weigh(float* scores, int width, float scale, float offset, const int16_t* kept,
                  float* sums) {
    const VecF factor = splat(scale), shift = splat(-offset);
    VecF sum0 = load(sums), sum1 = {};
    for (int j = 0; j < width; j += 32) {
        VecF p0 = exp2(fma(load(scores + j), factor, shift));
        VecF p1 = exp2(fma(load(scores + j + 16), factor, shift));
        sum0 += p0;
        sum1 += p1;
        if constexpr (kDrops) {
            p0 = _mm512_maskz_mov_ps(kept_lanes(kept + j), p0);
            p1 = _mm512_maskz_mov_ps(kept_lanes(kept + j + 16), p1);
        }
        // The store trails the loads: key j lands at byte 2j of the row, read from byte 4j.
        _mm512_storeu_si512(reinterpret_cast<bf16*>(scores) + j, to_bf16_pair(p0, p1));
    }
    store(sums, sum0 + sum1);
}

// ---- packed operands ----

// Keys and values, packed 32 keys at a time. Per key head: panels of 16 keys over `depth`, and
// panels of 16 value columns over all its keys, which begin at the first that any query sees.
struct PackedHeads {
    const AttentionProblem& p;
    int64_t depth, columns;  // padded head sizes of key and value
    Pieces groups;
    Aligned<bf16> keys, values;

    explicit PackedHeads(const AttentionProblem& problem)
        : p(problem),
          depth(padded_size(p.head_size)),
          columns(round_up(p.value_size, kPanel)),
          groups(p.batch, p.kv_heads,
                 [this](int64_t b) {
                     const Sequence s = p.sequence(b);
                     const int64_t end = s.query_len > 0 ? s.end_key(s.query_len - 1) : 0;
                     return std::max<int64_t>(0, divide_up(end - first_key(s), kGroup));
                 }),
          keys(allocate<bf16>(groups.total() * kGroup * depth)),
          values(allocate<bf16>(groups.total() * kGroup * columns)) {}

    // Where packing begins, a whole number of groups into the sequence.
    static int64_t first_key(const Sequence& s) { return s.first_key(0) / kGroup * kGroup; }

    const bf16* key_panel(const Sequence& s, int64_t head, int64_t j) const {
        return keys.get() + (groups.first(s.index, head) * kGroup + j - first_key(s)) * depth;
    }
    const bf16* value_panel(const Sequence& s, int64_t head, int64_t j) const {
        return values.get() + groups.first(s.index, head) * kGroup * columns +
               (j - first_key(s)) * kPanel;
    }
    int64_t value_panel_stride(const Sequence& s) const {
        return groups.count(s.index) * kGroup * kPanel;
    }

    void pack(const View& key, const View& value, const Pieces::Piece& piece) const {
        const Sequence s = p.sequence(piece.b);
        const int64_t j = first_key(s) + piece.n * kGroup;
        const auto rows_of = [&](const View& view) {
            return Rows{s.key_row<bf16>(view, piece.h, j), view.strides[2], view.strides[3],
                        s.key_len - j, view.shape[3]};
        };
        const Rows key_rows = rows_of(key), value_rows = rows_of(value);
        bf16* key_panels = keys.get() + (groups.first(piece.b, piece.h) + piece.n) * kGroup * depth;
        for (int64_t panel = 0; panel < kGroup; panel += kPanel)
            for (int64_t d = 0; d < depth; d += kTileDepth) {
                __m512i rows[kPanel];
                for (int i = 0; i < kPanel; ++i) rows[i] = key_rows.load(panel + i, d);
                pack_columns(rows, key_panels + panel * depth + d * kPanel);
            }
        const int64_t stride = value_panel_stride(s);
        bf16* value_panels = values.get() +
                             groups.first(piece.b, piece.h) * kGroup * columns +
                             piece.n * kGroup * kPanel;
        for (int64_t d = 0; d < columns; d += 2 * kPanel)
            for (int64_t i = 0; i < kGroup; i += 2) {
                bf16* panel = value_panels + d / kPanel * stride + i * kPanel;
                pack_rows(value_rows.load(i, d), value_rows.load(i + 1, d), panel,
                          d + kPanel < columns ? panel + stride : nullptr);
            }
    }
};

// ---- one block of queries ----

// A thread's memory. Rows are padded to whole tiles; what the padding holds is never used.
struct Scratch {
    Aligned<bf16> query;
    Aligned<float> scores, result;
    int64_t result_stride;
    alignas(64) float sums[kRows][kPanel];
    alignas(64) float offset[kRows];  // what its results are relative to; -inf: it has seen nothing
    alignas(64) float addend[kKeys];
    alignas(64) int16_t kept[kKeys + Dropout::kRowSlack];

    Scratch(int64_t depth, int64_t columns)
        : query(allocate<bf16>(kRows * depth)),
          scores(allocate<float>(kRows * kScoreStride)),
          result(allocate<float>(kRows * (columns + kSkew))),
          result_stride(columns + kSkew) {}
};

struct Forward {
    const AttentionProblem& p;
    const View &query, &key, &value, &out, &lse;
    PackedHeads packed{p};
    RowScores row_scores{p};
    Dropout dropout{p.options.seed, p.options.dropout_p};
    Pieces blocks{p.batch, p.heads,
                  [this](int64_t b) { return divide_up(p.sequence(b).query_len, kRows); }};

    void block(Scratch& m, const Pieces::Piece& piece) const;
    void load_query(Scratch& m, const Sequence& s, int64_t h, int64_t first, int count) const;
    void softmax(Scratch& m, const Sequence& s, int64_t h, int64_t i, int row, int rows, int64_t j,
                 int count, bool first) const;
    void write(const Scratch& m, const Sequence& s, int64_t h, int64_t first, int count) const;
    void run() const;
};

void Forward::load_query(Scratch& m, const Sequence& s, int64_t h, int64_t first, int count) const {
    const __m512i sign = sign_of_scale(p.options.scale);
    const Rows rows{s.query_row<bf16>(query, h, first), query.strides[2], query.strides[3], count,
                    p.head_size};
    for (int r = 0; r < count; ++r)
        for (int64_t d = 0; d < packed.depth; d += kTileDepth)
            _mm512_store_si512(m.query.get() + r * packed.depth + d,
                               _mm512_xor_si512(rows.load(r, d), sign));
}

// Queries i and after, `rows` rows of their block from `row` on (16 at most), against keys
// [j, j + count), the rows' first ones or more of them; rescales the rows' results so far.
void Forward::softmax(Scratch& m, const Sequence& s, int64_t h, int64_t i, int row, int rows,
                      int64_t j, int count, bool first) const {
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
        const float shrink = first ? 0.0f : std::exp2(before[r] - top[r]);
        float *sums = m.sums[row + r], *result = m.result.get() + (row + r) * m.result_stride;
        store(sums, load(sums) * shrink);
        for (int64_t d = 0; !first && d < packed.columns; d += kPanel)
            store(result + d, load(result + d) * shrink);
    }
    for (int r = 0; r < rows; ++r) {
        float* of_row = scores + r * kScoreStride;
        // A row that has seen nothing keeps -inf, and its scores must meet a finite offset.
        const float offset = m.offset[row + r] == -kInf ? 0.0f : m.offset[row + r];
        if (dropout) {
            const int16_t* kept =
                dropout.row(s.index * p.heads + h, i + r, j, count, m.kept);
            weigh<true>(of_row, width, factor, offset, kept, m.sums[row + r]);
        } else {
            weigh<false>(of_row, width, factor, offset, nullptr, m.sums[row + r]);
        }
    }
}

void Forward::write(const Scratch& m, const Sequence& s, int64_t h, int64_t first,
                    int count) const {
    // The sink is one more score, of no value.
    const float sink = p.sink<float>(h) * static_cast<float>(kLog2E);
    for (int r = 0; r < count; ++r) {
        float total = sum(load(m.sums[r])), maximum = m.offset[r], shrink = 1.0f;
        const bool empty = total == 0.0f;  // not by the maximum: comparisons lose a NaN
        if (sink > -kInf) {
            maximum = std::max(sink, maximum);
            shrink = std::exp2(m.offset[r] - maximum);
            total = total * shrink + std::exp2(sink - maximum);
        }
        *s.query_row<float>(lse, h, first + r) =
            total == 0.0f
                ? -kInf
                : static_cast<float>(maximum * kLn2 + std::log(static_cast<double>(total)));
        bf16* row = s.query_row<bf16>(out, h, first + r);
        const float* result = m.result.get() + r * m.result_stride;
        const float factor = static_cast<float>(dropout.factor()) * shrink / total;
        for (int64_t d = 0; d < p.value_size; d += kPanel)
            store_bf16(row + d * out.strides[3], out.strides[3],
                       empty ? VecF{} : load(result + d) * factor,
                       p.value_size - d);
    }
}

void Forward::block(Scratch& m, const Pieces::Piece& piece) const {
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
        Product{.left = m.query.get(),
                .left_stride = packed.depth,
                .right = packed.key_panel(s, head, j),
                .panel_stride = packed.depth * kPanel,
                .result = m.scores.get(),
                .result_stride = kScoreStride,
                .rows = count,
                .panels = padded / kPanel,
                .depth = static_cast<int>(packed.depth),
                .accumulate = false}
            .run();
        for (int r = 0; r < count; r += kPanel)
            softmax(m, s, piece.h, first + r, r, std::min(kPanel, count - r), j, seen, j == begin);
        Product{.left = reinterpret_cast<const bf16*>(m.scores.get()),
                .left_stride = 2 * kScoreStride,
                .right = packed.value_panel(s, head, j),
                .panel_stride = packed.value_panel_stride(s),
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

void Forward::run() const {
    const int64_t packs = packed.groups.total();
    const int team = static_cast<int>(std::min<int64_t>(
        threads_for(p.operations), std::max<int64_t>({1, blocks.total(), packs / 8})));
    std::vector<Scratch> scratch;
    for (int t = 0; t < team; ++t) scratch.emplace_back(packed.depth, packed.columns);

#pragma omp parallel num_threads(team)
    {
        const ProductThread thread;
#pragma omp for schedule(static)
        for (int64_t i = 0; i < packs; ++i) packed.pack(key, value, packed.groups.find(i));
        // Head after head, so that its keys and values stay cached; in a head the last queries
        // first: under a diagonal they see most, and the lightest blocks are left for the end.
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < blocks.total(); ++i) {
            Pieces::Piece piece = blocks.find(i);
            piece.n = blocks.count(piece.b) - 1 - piece.n;
            block(scratch[static_cast<size_t>(omp_get_thread_num())], piece);
        }
    }
    fill_outside(p, p.options.cu_seqlens_q, out, p.value_size, bf16{});
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

void attention_forward_bf16(const View& query, const View& key, const View& value,
                            const AttentionOptions& options, const View& out, const View& lse) {
    require(attention_bf16_available(), "this system withholds the tile registers");
    const AttentionProblem p = attention_problem(query, key, value, options);
    require(query.dtype == DType::bf16, "query must be bfloat16");
    require_rows(query, value, out, lse);
    Forward{p, query, key, value, out, lse}.run();
}

}  // namespace bigops

#endif
