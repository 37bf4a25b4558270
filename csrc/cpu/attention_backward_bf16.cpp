// Attention's backward pass with bf16 products: FlashAttention-2's (Dao, 2023), as in
// attention_backward.cpp, whose account of tasks and turns holds here too: a task is a block of keys
// of one key head, which walks over the blocks of queries that see it, and a block of queries adds up
// its gradient from its key blocks in their order, whatever the threads do.
//
// The five products want their operands in different orders. With scores kept a row a query,
//   S = query key^T, dP = grad_out value^T, grad_query = dS key
// take rows of queries from the left, and
//   grad_value^T = grad_out^T P, grad_key^T = query^T dS
// take P and dS as panels, whose rows are pairs of queries: the form in which two rows of softmax
// come out of the registers. So nothing quadratic is ever transposed; queries and grad_out are packed
// once a call, both ways around, and keys and values once a task.
#include "attention_bf16.h"

#if !defined(__AVX512BF16__)

namespace bigops {

void attention_backward_bf16(const View&, const View*, const View&, const View&, const View&,
                             const AttentionOptions&, const View&, const View&,
                             const AttentionGradients&) {
    require(false, "attention_backward_bf16 was compiled without bf16 products");
}

}  // namespace bigops

#else

#include <atomic>
#include <cmath>
#include <variant>

#include "attention_scores_bf16.h"
#include "threads.h"

namespace bigops {
namespace {

constexpr int kQueries = 128, kKeys = 128;  // of a block
constexpr int kSlab = kGroup;               // queries whose scores and dP are held at a time
constexpr int kScoreStride = kKeys + kSkew;                      // floats
constexpr int kWeightStride = kKeys + 2 * kSkew;                 // bf16
constexpr int kWeightPanel = kQueries * kPanel + 2 * kSkew;      // bf16

// A thread's memory.
struct Scratch {
    Aligned<bf16> key_t, value_t, keys;        // key^T, value^T and key, as panels
    Aligned<float> grad_key_t, grad_value_t;   // of the task's keys
    Aligned<float> scores, grads;              // S and dP of a slab
    Aligned<bf16> weights, grad_scores;        // P and dS of a block, as panels
    Aligned<bf16> grad_score_rows;             // dS once more, a row a query
    Aligned<float> addend, slopes[2];          // of a row, of a pair of rows
    Aligned<int16_t> kept[2];
    Aligned<float> row_sums = allocate<float>(kQueries);  // of dS

    Scratch(int64_t depth, int64_t columns)
        : key_t(allocate<bf16>(kKeys * depth)),
          value_t(allocate<bf16>(kKeys * columns)),
          keys(allocate<bf16>(depth * kKeys)),
          grad_key_t(allocate<float>(depth * kScoreStride)),
          grad_value_t(allocate<float>(columns * kScoreStride)),
          scores(allocate<float>(kSlab * kScoreStride)),
          grads(allocate<float>(kSlab * kScoreStride)),
          weights(allocate<bf16>(kKeys / kPanel * kWeightPanel)),
          grad_scores(allocate<bf16>(kKeys / kPanel * kWeightPanel)),
          grad_score_rows(allocate<bf16>(kQueries * kWeightStride)),
          addend(allocate<float>(kKeys)) {
        for (auto& row : slopes) {
            row = allocate<float>(kKeys);
            std::fill_n(row.get(), kKeys, 0.0f);  // beyond the last key a weight of 0 meets it
        }
        for (auto& row : kept) row = allocate<int16_t>(kKeys + Dropout::kRowSlack);
    }
};

// Rows of a tensor as left operands, both ways around: as they are, and as `depth` rows of
// `stride` columns of which these are 32.
void pack_rows_both_ways(const Rows& rows, __m512i sign, int64_t depth, bf16* straight,
                         bf16* transposed, int64_t stride) {
    alignas(64) static constexpr auto pick = [] {
        struct {
            int16_t lanes[2][32];
        } index = {};
        for (int odd = 0; odd < 2; ++odd)
            for (int i = 0; i < 32; ++i) index.lanes[odd][i] = static_cast<int16_t>(2 * i + odd);
        return index;
    }();
    const __m512i even = _mm512_load_si512(pick.lanes[0]), odd = _mm512_load_si512(pick.lanes[1]);
    for (int64_t d = 0; d < depth; d += kTileDepth) {
        __m512i halves[2][kPanel];
        for (int i = 0; i < kGroup; ++i) {
            const __m512i row = _mm512_xor_si512(rows.load(i, d), sign);
            _mm512_store_si512(straight + i * depth + d, row);
            halves[i / kPanel][i % kPanel] = row;
        }
        transpose(halves[0]);
        transpose(halves[1]);
        for (int r = 0; r < kPanel; ++r) {
            bf16* to = transposed + (d + 2 * r) * stride;
            _mm512_store_si512(to, _mm512_permutex2var_epi16(halves[0][r], even, halves[1][r]));
            _mm512_store_si512(to + stride,
                               _mm512_permutex2var_epi16(halves[0][r], odd, halves[1][r]));
        }
    }
}

// A switch that is set at run time, as an argument of a template.
using Switched = std::variant<std::false_type, std::true_type>;
inline Switched switched(bool on) { return on ? Switched(std::true_type{}) : std::false_type{}; }

struct Backward {
    using Turn = std::atomic<int32_t>;

    const AttentionProblem& p;
    const View& grad_out;
    const View* grad_lse;
    const View &query, &key, &value, &out, &lse;
    const AttentionGradients& gradients;

    int64_t depth = padded_size(p.head_size), columns = padded_size(p.value_size);
    RowScores row_scores{p};
    Dropout dropout{p.options.seed, p.options.dropout_p};
    bool drops = static_cast<bool>(dropout), caps = p.options.softcap > 0;
    Pieces groups{p.batch, p.heads, [this](int64_t b) {  // of 32 queries
                      return divide_up(p.sequence(b).query_len, kGroup);
                  }};
    Pieces query_blocks{p.batch, p.heads, [this](int64_t b) {
                            return divide_up(p.sequence(b).query_len, kQueries);
                        }};
    Pieces key_blocks{p.batch, p.kv_heads, [this](int64_t b) {
                          return divide_up(p.sequence(b).key_len, kKeys);
                      }};
    int64_t rows = groups.total() * kGroup;
    Aligned<bf16> queries = allocate<bf16>(rows * depth), queries_t = allocate<bf16>(rows * depth);
    Aligned<bf16> grads = allocate<bf16>(rows * columns), grads_t = allocate<bf16>(rows * columns);
    Aligned<float> shifts = allocate<float>(rows);  // -lse in units of log 2
    Aligned<float> deltas = allocate<float>(rows);
    Aligned<float> sums = allocate<float>(gradients.query ? rows * depth : 0);
    // For the sinks' gradient, of each row: the sum of dS, and grad_lse.
    Aligned<float> residues = allocate<float>(gradients.sinks ? rows : 0);
    Aligned<float> lse_grads = allocate<float>(gradients.sinks ? rows : 0);
    std::vector<Turn> turns = std::vector<Turn>(query_blocks.total());

    // Of one sequence and query head: queries [i, i + padded), of which those from `count` on are none.
    struct Block {
        Sequence s;
        int64_t b, h, n, i, count, padded;
        int64_t row;  // of its first query among all
        int64_t first, last;  // the key blocks it sees
    };
    Block block(const Sequence& s, int64_t h, int64_t n) const {
        Block q{s, s.index, h, n, n * kQueries, 0, 0, 0, 0, 0};
        q.count = std::min<int64_t>(kQueries, s.query_len - q.i);
        q.padded = round_up(q.count, kGroup);
        q.row = groups.first(q.b, h) * kGroup + q.i;
        q.first = s.first_key(q.i) / kKeys;
        q.last = divide_up(s.end_key(q.i + q.count - 1), kKeys);
        return q;
    }

    void prepare(const Scratch& m, const Pieces::Piece& piece) const;
    void key_block(const Scratch& m, const Pieces::Piece& piece);
    void query_block(const Scratch& m, const Block& q, int64_t n, int64_t count);
    void slab(const Scratch& m, const Block& q, int64_t r, int64_t j, int from, int to) const;
    template <bool kDrops, bool kCaps, bool kSums>
    void weigh(const Scratch& m, const Block& q, int64_t r, int k, int from, int to,
               const int16_t* const (&kept)[2]) const;
    void add_to_rows(const Scratch& m, const Block& q, int64_t n, int first_row, int end_row,
                     int from, int to);
    void write_grad_query(const Block& q) const;
    void write_transposed(const View& view, const float* packed, float scale, const Sequence& s,
                          int64_t h, int64_t j, int64_t count) const;
    void write_grad_sink(int64_t h) const;
    void run();
};

// 32 queries: what every key block needs of them.
void Backward::prepare(const Scratch& m, const Pieces::Piece& piece) const {
    const Sequence s = p.sequence(piece.b);
    const int64_t i = piece.n * kGroup, count = std::min<int64_t>(kGroup, s.query_len - i);
    const Block q = block(s, piece.h, i / kQueries);
    const int64_t row = q.row + i - q.i;
    const auto rows_of = [&](const View& view) {
        return Rows{s.query_row<bf16>(view, piece.h, i), view.strides[2], view.strides[3], count,
                    view.shape[3]};
    };
    bf16* grad_rows = grads.get() + row * columns;
    pack_rows_both_ways(rows_of(query), sign_of_scale(p.options.scale), depth,
                        queries.get() + row * depth, queries_t.get() + q.row * depth + i - q.i,
                        q.padded);
    pack_rows_both_ways(rows_of(grad_out), _mm512_setzero_si512(), columns, grad_rows,
                        grads_t.get() + q.row * columns + i - q.i, q.padded);

    // delta by the products that make dP: where a row's weight is all on one key, out is that key's
    // value, and what must cancel does, to the last bit.
    const Rows outs = rows_of(out);
    bf16* panel = m.value_t.get();
    alignas(64) float products[kPanel][kPanel];
    for (int half = 0; half < kGroup; half += kPanel) {
        for (int64_t d = 0; d < columns; d += kTileDepth) {
            __m512i lines[kPanel];
            for (int r = 0; r < kPanel; ++r) lines[r] = outs.load(half + r, d);
            pack_columns(lines, panel + d * kPanel);
        }
        Product{.left = grad_rows + half * columns,
                .left_stride = columns,
                .right = panel,
                .panel_stride = 0,
                .result = products[0],
                .result_stride = kPanel,
                .rows = kPanel,
                .panels = 1,
                .depth = static_cast<int>(columns),
                .accumulate = false}
            .run();
        for (int r = 0; r < kPanel; ++r) {
            const bool there = half + r < count;
            const auto of_row = [&](const View& view) {
                return *s.query_row<float>(view, piece.h, i + half + r);
            };
            // A row without keys has lse = -inf, and no key may get a weight there.
            const float row_lse = there ? of_row(lse) : -kInf;
            shifts[row + half + r] =
                row_lse == -kInf ? -kInf : static_cast<float>(-kLog2E) * row_lse;
            const float from_lse = grad_lse && row_lse != -kInf ? of_row(*grad_lse) : 0.0f;
            deltas[row + half + r] = row_lse != -kInf ? products[r][r] - from_lse : 0.0f;
            if (gradients.sinks) {
                lse_grads[row + half + r] = from_lse;
                residues[row + half + r] = 0.0f;
            }
        }
    }
    if (gradients.query && i == q.i && q.first >= q.last) {
        std::fill_n(sums.get() + q.row * depth, q.padded * depth, 0.0f);
        write_grad_query(q);
    }
}

void Backward::key_block(const Scratch& m, const Pieces::Piece& piece) {
    const Sequence s = p.sequence(piece.b);
    const int64_t j = piece.n * kKeys, count = std::min<int64_t>(kKeys, s.key_len - j);
    const auto rows_of = [&](const View& view) {
        return Rows{s.key_row<bf16>(view, piece.h, j), view.strides[2], view.strides[3], count,
                    view.shape[3]};
    };
    const auto pack_transposed = [&](const Rows& rows, int64_t size, bf16* panels) {
        for (int64_t k = 0; k < round_up(count, kGroup); k += kPanel)
            for (int64_t d = 0; d < size; d += kTileDepth) {
                __m512i lines[kPanel];
                for (int i = 0; i < kPanel; ++i) lines[i] = rows.load(k + i, d);
                pack_columns(lines, panels + k * size + d * kPanel);
            }
    };
    const Rows keys = rows_of(key);
    pack_transposed(keys, depth, m.key_t.get());
    pack_transposed(rows_of(value), columns, m.value_t.get());
    for (int64_t d = 0; d < depth; d += 2 * kPanel)
        for (int64_t k = 0; k < round_up(count, kGroup); k += 2)
            pack_rows(keys.load(k, d), keys.load(k + 1, d), m.keys.get() + d * kKeys + k * kPanel,
                      m.keys.get() + (d + kPanel) * kKeys + k * kPanel);
    std::fill_n(m.grad_key_t.get(), depth * kScoreStride, 0.0f);
    std::fill_n(m.grad_value_t.get(), columns * kScoreStride, 0.0f);

    for (int64_t h = piece.h * p.group; h < (piece.h + 1) * p.group; ++h)
        for (int64_t n = s.first_query(j) / kQueries; n < query_blocks.count(piece.b); ++n) {
            const Block q = block(s, h, n);
            if (q.first > piece.n) break;
            if (q.last > piece.n) query_block(m, q, piece.n, count);
        }
    const float scale = static_cast<float>(std::abs(p.options.scale));
    if (gradients.key) write_transposed(*gradients.key, m.grad_key_t.get(), scale, s, piece.h, j, count);
    if (gradients.value)
        write_transposed(*gradients.value, m.grad_value_t.get(),
                         static_cast<float>(dropout.factor()), s, piece.h, j, count);
}

void Backward::query_block(const Scratch& m, const Block& q, int64_t n, int64_t count) {
    const int64_t j = n * kKeys;
    // The keys of this block that queries [r, r + n) see, in whole groups.
    const auto seen = [&](int64_t r, int64_t rows) {
        const int64_t first = std::clamp<int64_t>(q.s.first_key(q.i + r) - j, 0, count);
        const int64_t end = std::clamp<int64_t>(
            q.s.end_key(q.i + std::min(r + rows, q.count) - 1) - j, 0, count);
        return std::pair(static_cast<int>(first / kGroup * kGroup),
                         first < end ? static_cast<int>(round_up(end, kGroup)) : 0);
    };
    const auto [from, to] = seen(0, q.count);
    int first_row = kQueries, end_row = 0;
    for (int r = 0; r < q.padded; r += kSlab) {
        auto [slab_from, slab_to] = seen(r, kSlab);
        if (slab_from >= slab_to) {
            if (end_row > 0) break;
            continue;
        }
        first_row = std::min(first_row, r);
        end_row = r + kSlab;
        slab(m, q, r, j, slab_from, slab_to);
        const auto clear = [&](int begin, int end) {
            for (int k = begin; k < end; k += kPanel) {
                const int64_t at = k / kPanel * kWeightPanel + r * kPanel;
                std::memset(m.weights.get() + at, 0, kSlab * kPanel * sizeof(bf16));
                std::memset(m.grad_scores.get() + at, 0, kSlab * kPanel * sizeof(bf16));
            }
            if (begin < end)
                for (int i = r; i < r + kSlab; ++i)
                    std::memset(m.grad_score_rows.get() + i * kWeightStride + begin, 0,
                                static_cast<size_t>(end - begin) * sizeof(bf16));
        };
        clear(from, slab_from);
        clear(slab_to, to);
    }
    if (first_row < end_row) {
        const auto add = [&](const bf16* left, const bf16* panels, float* result, int64_t size) {
            Product{.left = left + first_row,
                    .left_stride = q.padded,
                    .right = panels + from / kPanel * kWeightPanel + first_row * kPanel,
                    .panel_stride = kWeightPanel,
                    .result = result + from,
                    .result_stride = kScoreStride,
                    .rows = static_cast<int>(round_up(size, kPanel)),
                    .panels = (to - from) / kPanel,
                    .depth = end_row - first_row,
                    .accumulate = true}
                .run();
        };
        if (gradients.value)
            add(grads_t.get() + q.row * columns, m.weights.get(), m.grad_value_t.get(),
                p.value_size);
        if (gradients.key)
            add(queries_t.get() + q.row * depth, m.grad_scores.get(), m.grad_key_t.get(),
                p.head_size);
    }
    if (gradients.query || gradients.sinks) add_to_rows(m, q, n, first_row, end_row, from, to);
}

// Queries [r, r + 32) of the block against keys [j + from, j + to): P and dS.
void Backward::slab(const Scratch& m, const Block& q, int64_t r, int64_t j, int from,
                    int to) const {
    const auto multiply = [&](const bf16* left, const bf16* panels, float* result, int64_t size) {
        Product{.left = left + (q.row + r) * size,
                .left_stride = size,
                .right = panels + from * size,
                .panel_stride = kPanel * size,
                .result = result + from,
                .result_stride = kScoreStride,
                .rows = kSlab,
                .panels = (to - from) / kPanel,
                .depth = static_cast<int>(size),
                .accumulate = false}
            .run();
    };
    multiply(queries.get(), m.key_t.get(), m.scores.get(), depth);
    multiply(grads.get(), m.value_t.get(), m.grads.get(), columns);

    const int count = static_cast<int>(std::min<int64_t>(to, q.s.key_len - j)) - from;
    for (int k = 0; k < kSlab; k += 2) {
        const int16_t* kept[2] = {};
        for (int odd = 0; odd < 2; ++odd) {
            // A row beyond the last has weights of 0 whatever its scores.
            const int64_t i = q.i + std::min(r + k + odd, q.count - 1);
            float* row = m.scores.get() + (k + odd) * kScoreStride + from;
            row_scores.map(q.s, q.h, i, j + from, count, k + odd == 0, row, m.addend.get(),
                           m.slopes[odd].get());
            hide(q.s, i, j + from, to - from, row);
            if (drops)
                kept[odd] = dropout.row(q.b * p.heads + q.h, i, j + from, count, m.kept[odd].get());
        }
        const auto weigh_as = [&]<bool... kFeatures>(std::bool_constant<kFeatures>...) {
            weigh<kFeatures...>(m, q, r, k, from, to, kept);
        };
        std::visit(weigh_as, switched(drops), switched(caps), switched(gradients.sinks));
    }
}

// Rows k and k + 1 of the slab of queries [r, r + 32).
template <bool kDrops, bool kCaps, bool kSums>
void Backward::weigh(const Scratch& m, const Block& q, int64_t r, int k, int from, int to,
                     const int16_t* const (&kept)[2]) const {
    alignas(64) static constexpr auto pairs = [] {
        struct {
            int16_t lanes[32];
        } index = {};
        for (int i = 0; i < 32; ++i) index.lanes[i] = static_cast<int16_t>(i / 2 + i % 2 * kPanel);
        return index;
    }();
    const __m512i interleave = _mm512_load_si512(pairs.lanes);
    const VecF factor = splat(row_scores.factor());
    const VecF keep_factor = splat(static_cast<float>(dropout.factor()));
    const int64_t row = q.row + r + k;
    const VecF shift[2] = {splat(shifts[row]), splat(shifts[row + 1])};
    const VecF delta[2] = {splat(deltas[row]), splat(deltas[row + 1])};
    const float *scores = m.scores.get() + k * kScoreStride, *grads = m.grads.get() + k * kScoreStride;
    bf16* p_panel = m.weights.get() + (r + k) * kPanel;
    bf16* ds_panel = m.grad_scores.get() + (r + k) * kPanel;
    bf16* ds_row = m.grad_score_rows.get() + (r + k) * kWeightStride;
    VecF row_sums[2] = {};
    for (int c = from; c < to; c += kPanel) {
        VecF weights[2], ds[2];
#pragma GCC unroll 2
        for (int odd = 0; odd < 2; ++odd) {
            const VecF x = exp2(fma(load(scores + odd * kScoreStride + c), factor, shift[odd]));
            VecF dp = load(grads + odd * kScoreStride + c);
            weights[odd] = x;
            if constexpr (kDrops) {
                const __mmask16 keep = kept_lanes(kept[odd] + c - from);
                weights[odd] = _mm512_maskz_mov_ps(keep, x);
                dp = _mm512_maskz_mul_ps(keep, dp, keep_factor);
            }
            ds[odd] = x * (dp - delta[odd]);
            if constexpr (kSums) row_sums[odd] += ds[odd];
            if constexpr (kCaps) ds[odd] *= load(m.slopes[odd].get() + c - from);
        }
        const int64_t at = c / kPanel * kWeightPanel;
        const __m512i ds_pair = to_bf16_pair(ds[0], ds[1]);
        _mm512_store_si512(p_panel + at, _mm512_permutexvar_epi16(
                                             interleave, to_bf16_pair(weights[0], weights[1])));
        _mm512_store_si512(ds_panel + at, _mm512_permutexvar_epi16(interleave, ds_pair));
        _mm256_store_si256(reinterpret_cast<__m256i*>(ds_row + c),
                           _mm512_castsi512_si256(ds_pair));
        _mm256_store_si256(reinterpret_cast<__m256i*>(ds_row + kWeightStride + c),
                           _mm512_extracti64x4_epi64(ds_pair, 1));
    }
    if constexpr (kSums)
        for (int odd = 0; odd < 2; ++odd) m.row_sums[r + k + odd] = sum(row_sums[odd]);
}

// What the queries gather from their key blocks, which take turns, first to last.
void Backward::add_to_rows(const Scratch& m, const Block& q, int64_t n, int first_row, int end_row,
                           int from, int to) {
    // The key block whose turn it is, counted from the first one seen.
    Turn& turn = turns[query_blocks.first(q.b, q.h) + q.n];
    while (turn.load(std::memory_order_acquire) != n - q.first) _mm_pause();
    if (gradients.query) {
        float* sum = sums.get() + q.row * depth;
        if (n == q.first) std::fill_n(sum, q.padded * depth, 0.0f);
        if (first_row < end_row)
            Product{.left = m.grad_score_rows.get() + first_row * kWeightStride + from,
                    .left_stride = kWeightStride,
                    .right = m.keys.get() + from * kPanel,
                    .panel_stride = kKeys * kPanel,
                    .result = sum + first_row * depth,
                    .result_stride = depth,
                    .rows = end_row - first_row,
                    .panels = static_cast<int>(round_up(p.head_size, kPanel)) / kPanel,
                    .depth = to - from,
                    .accumulate = true}
                .run();
        if (n + 1 == q.last) write_grad_query(q);
    }
    if (gradients.sinks)
        for (int r = first_row; r < end_row; ++r) residues[q.row + r] += m.row_sums[r];
    turn.store(static_cast<int32_t>(n - q.first + 1), std::memory_order_release);
}

void Backward::write_grad_query(const Block& q) const {
    const View& view = *gradients.query;
    const float scale = static_cast<float>(p.options.scale);
    for (int64_t r = 0; r < q.count; ++r) {
        bf16* row = q.s.query_row<bf16>(view, q.h, q.i + r);
        const float* sum = sums.get() + (q.row + r) * depth;
        for (int64_t d = 0; d < p.head_size; d += kPanel)
            store_bf16(row + d * view.strides[3], view.strides[3], load(sum + d) * scale,
                       p.head_size - d);
    }
}

void Backward::write_transposed(const View& view, const float* packed, float scale,
                                const Sequence& s, int64_t h, int64_t j, int64_t count) const {
    for (int64_t k = 0; k < count; k += kPanel)
        for (int64_t d = 0; d < view.shape[3]; d += kPanel) {
            __m512i lines[kPanel];
            for (int r = 0; r < kPanel; ++r)
                lines[r] = _mm512_loadu_si512(packed + (d + r) * kScoreStride + k);
            transpose(lines);
            for (int64_t r = 0; r < std::min<int64_t>(kPanel, count - k); ++r)
                store_bf16(s.key_row<bf16>(view, h, j + k + r) + d * view.strides[3],
                           view.strides[3], _mm512_castsi512_ps(lines[r]) * scale,
                           view.shape[3] - d);
        }
}

// minus the sum of share * (sum_j P_ij dP_ij - grad_lse_i), where the sink's share of a row is
// exp(sink - lse) and the sum is taken from that of dS: delta, which comes from the rounded output,
// is exact enough for dS only.
void Backward::write_grad_sink(int64_t h) const {
    const VecF sink = splat(p.sink<float>(h) * static_cast<float>(kLog2E));
    double total = 0;
    for (int64_t b = 0; b < p.batch; ++b) {
        const int64_t first = groups.first(b, h) * kGroup;
        for (int64_t row = first; row < first + groups.count(b) * kGroup; row += kPanel) {
            const VecF share = exp2(sink + load(shifts.get() + row));
            const VecF products = fma(load(deltas.get() + row), 1.0f - share,
                                      load(residues.get() + row));
            total += sum(share * (products - load(lse_grads.get() + row)));
        }
    }
    gradients.sinks->ptr<float>()[h * gradients.sinks->strides[0]] = static_cast<float>(-total);
}

void Backward::run() {
    const int team = threads_for(2.5 * p.operations);
    std::vector<Scratch> scratch;
    for (int t = 0; t < team; ++t) scratch.emplace_back(depth, columns);
    const bool any = gradients.query || gradients.key || gradients.value || gradients.sinks;
    const int64_t tasks = any ? key_blocks.total() : 0;
    std::atomic<int64_t> next_task = 0;
#pragma omp parallel num_threads(team)
    {
        const ProductThread thread;
        const Scratch& m = scratch[static_cast<size_t>(omp_get_thread_num())];
#pragma omp for schedule(static)
        for (int64_t n = 0; n < groups.total(); ++n) prepare(m, groups.find(n));
        // Handed out one by one and in order, which the turns rely on.
        for (int64_t task = next_task++; task < tasks; task = next_task++)
            key_block(m, key_blocks.find(task));
        if (gradients.sinks) {
#pragma omp barrier
#pragma omp for schedule(static)
            for (int64_t h = 0; h < p.heads; ++h) write_grad_sink(h);
        }
    }
    const auto clear = [&](const View* gradient, const View* cu_seqlens) {
        if (gradient) fill_outside(p, cu_seqlens, *gradient, gradient->shape[3], bf16{});
    };
    clear(gradients.query, p.options.cu_seqlens_q);
    clear(gradients.key, p.options.cu_seqlens_k);
    clear(gradients.value, p.options.cu_seqlens_k);
}

}  // namespace

void attention_backward_bf16(const View& grad_out, const View* grad_lse, const View& query,
                             const View& key, const View& value, const AttentionOptions& options,
                             const View& out, const View& lse,
                             const AttentionGradients& gradients) {
    require(attention_bf16_available(), "this system withholds the tile registers");
    const AttentionProblem p = attention_problem(query, key, value, options);
    Backward{p, grad_out, grad_lse, query, key, value, out, lse, gradients}.run();
}

}  // namespace bigops

#endif
