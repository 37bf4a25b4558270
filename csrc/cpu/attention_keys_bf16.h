// Keys and values as the panels that attention's forward pass with bf16 products multiplies.
#pragma once

#if defined(__AVX512BF16__)

#include "attention_scores_bf16.h"
#include "attention_split_bf16.h"

namespace bigops {

// Packed 32 keys at a time. Per key head: panels of 16 keys over `depth`, and panels of 16 value
// columns over all its keys, which begin at the first that any query sees.
template <class T>
struct PackedHeads {
    const AttentionProblem& p;
    int64_t depth, columns;  // padded head sizes of key and value
    Pieces groups;
    int64_t key_part, value_part;  // from a part of all to the next
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
          key_part(groups.total() * kGroup * depth),
          value_part(groups.total() * kGroup * columns),
          keys(allocate<bf16>(kParts<T> * key_part)),
          values(allocate<bf16>(kParts<T> * value_part)) {}

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

    void pack(const View& key, const View& value, const Pieces::Piece& piece,
              SplitRanges& ranges) const {
        const Sequence s = p.sequence(piece.b);
        const int64_t j = first_key(s) + piece.n * kGroup;
        const auto rows_of = [&](const View& view) {
            return Rows<T>{s.key_row<T>(view, piece.h, j), view.strides[2], view.strides[3],
                           std::min<int64_t>(kGroup, s.key_len - j), view.shape[3]};
        };
        const Rows<T> key_rows = rows_of(key), value_rows = rows_of(value);
        ranges.take(piece.b, SplitRanges::key, key_rows);
        ranges.take(piece.b, SplitRanges::value, value_rows);
        bf16* key_panels = keys.get() + (groups.first(piece.b, piece.h) + piece.n) * kGroup * depth;
        for (int64_t panel = 0; panel < kGroup; panel += kPanel)
            for (int64_t d = 0; d < depth; d += kTileDepth)
                pack_columns(key_rows, panel, d, key_panels + panel * depth + d * kPanel, key_part);
        const int64_t stride = value_panel_stride(s);
        bf16* value_panels = values.get() +
                             groups.first(piece.b, piece.h) * kGroup * columns +
                             piece.n * kGroup * kPanel;
        for (int64_t d = 0; d < columns; d += 2 * kPanel)
            for (int64_t i = 0; i < kGroup; i += 2) {
                bf16* panel = value_panels + d / kPanel * stride + i * kPanel;
                pack_rows(value_rows, i, d, panel, d + kPanel < columns ? panel + stride : nullptr,
                          value_part);
            }
    }
};

}  // namespace bigops

#endif
