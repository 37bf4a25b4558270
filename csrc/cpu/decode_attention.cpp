// Decoding: a few new queries for each sequence against a long cache. What takes the time is reading
// the cache once (Pope et al. 2022, "Efficiently scaling Transformer inference"), so keys and values
// are read where they lie, once for all query heads and rows that share them, and the work is cut
// along the keys too, as in Dao et al. 2023, "Flash-Decoding for long-context inference": a split's
// partial result is its output and its log-sum-exp, and the splits are combined exactly at the end.
// Where splits begin depends on a sequence's own length alone, so that a sequence gives the same bits
// in any batch, on any number of threads, and in pages of any size.
#include "decode_attention.h"

#include <cmath>
#include <cstring>

#include "combine_attention.h"
#include "decode_attention_cache.h"
#include "decode_attention_tile.h"
#include "layout.h"
#include "microkernel.h"
#include "threads.h"

namespace bigops {
namespace {

// Keys of a block, whose scores are softmaxed at once; keys whose values are summed up at once,
// since a short chain of additions rounds less; the most query rows that a thread holds.
constexpr int64_t kBlock = 512, kChunk = 64, kRowBlock = 16;
// A thread reads so many runs of keys side by side: the memory answers one run more slowly.
constexpr int64_t kStreams = 4;

template <class C>
struct LaneIndex;
template <>
struct LaneIndex<float> {
    using type = int32_t;
};
template <>
struct LaneIndex<double> {
    using type = int64_t;
};

// Turns `count` elements, `stride` apart, by the angle of `position`: out of pairs of neighbours or,
// not interleaved, of the two halves. What the table does not cover stays.
template <class T>
void rotate(const DecodeCall& call, int64_t position, const T* row, int64_t stride, int64_t count,
            T* out, int64_t out_stride) {
    const int64_t half = call.rotary_cos ? call.rotary_cos->shape[1] : 0;
    using C = compute_t<T>;
    const auto angle = [&](const View& table, int64_t i) {
        const int64_t at = position * table.strides[0] + i * table.strides[1];
        return table.dtype == DType::f32 ? static_cast<C>(table.ptr<float>()[at])
                                         : static_cast<C>(to_float(table.ptr<T>()[at]));
    };
    for (int64_t i = 0; i < half; ++i) {
        const int64_t first = call.rotary_interleaved ? 2 * i : i;
        const int64_t second = call.rotary_interleaved ? 2 * i + 1 : i + half;
        const C x = to_float(row[first * stride]), y = to_float(row[second * stride]);
        const C cos = angle(*call.rotary_cos, i), sin = angle(*call.rotary_sin, i);
        out[first * out_stride] = from_float<T>(x * cos - y * sin);
        out[second * out_stride] = from_float<T>(x * sin + y * cos);
    }
    for (int64_t i = 2 * half; i < count; ++i) out[i * out_stride] = row[i * stride];
}

template <class T>
class Decode {
    using C = compute_t<T>;
    using Index = typename LaneIndex<C>::type;
    static constexpr int L = kLanes<C>;
    static constexpr C kInf = std::numeric_limits<C>::infinity();

   public:
    Decode(const DecodeCall& call, const DecodeSizes& sizes)
        : call(call),
          s(sizes),
          key_units(divide_up(s.head_size, Unit<T>::kElements)),
          value_units(divide_up(s.value_size, Unit<T>::kElements)),
          depth(key_units * Unit<T>::kElements),
          width(value_units * Unit<T>::kElements),
          row_block(std::min(kRowBlock, std::max<int64_t>(1, s.rows()))),
          copies_keys(depth != s.head_size || call.k_cache.strides[3] != 1),
          copies_values(width != s.value_size || call.v_cache.strides[3] != 1),
          scale(static_cast<C>(call.scale)),
          softcap(static_cast<C>(call.softcap)) {
        for (int64_t b = 0; b < s.batch; ++b) most_splits = std::max(most_splits, splits(b));
    }

    void run() {
        const int64_t pairs = s.batch * s.kv_heads, rows = s.rows();
        const int64_t partial_rows = pairs * most_splits * rows;
        Layout measure(nullptr);
        Partials(partial_rows, width, measure);
        const Arena shared(measure.size());
        Layout layout(shared.at(0));
        const Partials partials(partial_rows, width, layout);
        Layout thread_measure(nullptr);
        ThreadScratch(*this, thread_measure);
        const int threads = threads_for(operations());
        const Arena memory(thread_measure.size() * threads);
#pragma omp parallel num_threads(threads)
        {
            Layout own(memory.at(thread_measure.size() * omp_get_thread_num()));
            const ThreadScratch scratch(*this, own);
            if (s.new_len > 0) {
#pragma omp for
                for (int64_t pair = 0; pair < pairs; ++pair) append(pair);
            }
#pragma omp for schedule(dynamic)
            for (int64_t task = 0; task < pairs * most_splits; ++task) {
                const int64_t pair = task / most_splits, split = task % most_splits;
                if (split < splits(pair / s.kv_heads))
                    attend(pair, split, scratch, partials.at(task * rows, width));
            }
#pragma omp for
            for (int64_t row = 0; row < pairs * rows; ++row)
                combine(row / rows, row % rows, scratch, partials);
        }
    }

   private:
    // Of each row of queries and split: its output, in the units' order, and its log-sum-exp.
    struct Partials {
        C* out;
        double* lse;

        Partials(C* out, double* lse) : out(out), lse(lse) {}
        Partials(int64_t rows, int64_t width, Layout& layout)
            : out(layout.take<C>(rows * width)), lse(layout.take<double>(rows)) {}
        Partials at(int64_t row, int64_t width) const { return {out + row * width, lse + row}; }
    };

    struct ThreadScratch {
        C *query, *out, *scores, *max, *sum;
        Index* places;  // of the keys in their block
        T **keys, **values;
        T *row, *key_copies, *value_copies;
        T **copied_keys, **copied_values;
        double* weights;

        ThreadScratch(const Decode& d, Layout& layout) {
            query = layout.take<C>(d.row_block * d.depth);
            out = layout.take<C>(d.row_block * d.width);
            scores = layout.take<C>(d.row_block * kBlock);
            max = layout.take<C>(d.row_block);
            sum = layout.take<C>(d.row_block);
            places = layout.take<Index>(kBlock);
            keys = layout.take<T*>(kBlock + kAhead);
            values = layout.take<T*>(kBlock + kAhead);
            row = layout.take<T>(d.depth);
            key_copies = layout.take<T>(d.copies_keys ? kChunk * d.depth : 0);
            value_copies = layout.take<T>(d.copies_values ? kChunk * d.width : 0);
            copied_keys = layout.take<T*>(kChunk + kAhead);
            copied_values = layout.take<T*>(kChunk + kAhead);
            weights = layout.take<double>(d.most_splits + 1);
        }
    };

    // Keys that any query of the sequence sees.
    int64_t first(int64_t b) const { return s.first_key(call, b, 0); }
    int64_t seen(int64_t b) const {
        if (s.query_len == 0) return 0;
        return std::max<int64_t>(0, s.end_key(call, b, s.query_len - 1) - first(b));
    }
    int64_t split_size(int64_t b) const {
        if (call.num_splits == 0) return kBlock;
        return std::max(kChunk, round_up(divide_up(seen(b), call.num_splits), kChunk));
    }
    int64_t splits(int64_t b) const { return divide_up(seen(b), split_size(b)); }

    double operations() const {
        double keys = 0;
        for (int64_t b = 0; b < s.batch; ++b) keys += static_cast<double>(seen(b) + s.new_len);
        // A key that is read for one row takes as long as for four.
        return 2.0 * keys * static_cast<double>(s.kv_heads * std::max<int64_t>(4, s.rows())) *
               static_cast<double>(s.head_size + s.value_size);
    }

    void append(int64_t pair) const {
        const int64_t b = pair / s.kv_heads, h = pair % s.kv_heads;
        const CacheRows<T> keys(s, call.k_cache, call.block_table, b, h);
        const CacheRows<T> values(s, call.v_cache, call.block_table, b, h);
        const View &k = *call.k_new, &v = *call.v_new;
        for (int64_t i = 0; i < s.new_len; ++i) {
            const int64_t position = s.lengths[static_cast<size_t>(b)] + i;
            const T* key = k.ptr<T>() + b * k.strides[0] + h * k.strides[1] + i * k.strides[2];
            rotate(call, position, key, k.strides[3], s.head_size, keys.row(position),
                   call.k_cache.strides[3]);
            const T* value = v.ptr<T>() + b * v.strides[0] + h * v.strides[1] + i * v.strides[2];
            T* to = values.row(position);
            for (int64_t d = 0; d < s.value_size; ++d)
                to[d * call.v_cache.strides[3]] = value[d * v.strides[3]];
        }
    }

    // Row r of a key head's is query r % query_len of head r / query_len of the group.
    int64_t head_of(int64_t pair, int64_t r) const {
        return pair % s.kv_heads * s.group + r / s.query_len;
    }

    void load_query(int64_t pair, int64_t r, T* row, C* query) const {
        const View& q = call.query;
        const int64_t b = pair / s.kv_heads, i = r % s.query_len;
        const T* from = q.ptr<T>() + b * q.strides[0] + head_of(pair, r) * q.strides[1] +
                        i * q.strides[2];
        std::fill(row + s.head_size, row + depth, T{});
        rotate(call, s.query_position(call, b, i), from, q.strides[3], s.head_size, row, 1);
        constexpr int P = Unit<T>::kParts;
        for (int64_t u = 0; u < key_units; ++u) {
            Vec<C> parts[P];
            Unit<T>::read(row + u * Unit<T>::kElements, parts);
            for (int p = 0; p < P; ++p) store(query + (u * P + p) * L, parts[p]);
        }
    }

    // One split for all rows that read its keys.
    void attend(int64_t pair, int64_t split, const ThreadScratch& t, Partials partials) const {
        const int64_t b = pair / s.kv_heads, size = split_size(b);
        const int64_t begin = first(b) + split * size;
        const int64_t end = std::min(begin + size, first(b) + seen(b));
        for (int64_t r = 0; r < s.rows(); r += row_block) {
            const int64_t rows = std::min(row_block, s.rows() - r);
            for (int64_t m = 0; m < rows; ++m) load_query(pair, r + m, t.row, t.query + m * depth);
            std::fill(t.out, t.out + rows * width, C(0));
            std::fill(t.max, t.max + rows, -kInf);
            std::fill(t.sum, t.sum + rows, C(0));
            for (int64_t start = begin; start < end; start += kBlock)
                attend_block(pair, r, rows, start, std::min(kBlock, end - start), t);
            for (int64_t m = 0; m < rows; ++m) {
                const C sum = t.sum[m];
                partials.lse[r + m] = sum == 0 ? -std::numeric_limits<double>::infinity()
                                               : static_cast<double>(t.max[m]) +
                                                     std::log(static_cast<double>(sum));
                C* out = partials.out + (r + m) * width;
                for (int64_t d = 0; d < width; d += L)
                    store(out + d, sum == 0 ? Vec<C>{} : load(t.out + m * width + d) / sum);
            }
        }
    }

    void attend_block(int64_t pair, int64_t r, int64_t rows, int64_t start, int64_t count,
                      const ThreadScratch& t) const {
        const int64_t b = pair / s.kv_heads, h = pair % s.kv_heads;
        const CacheRows<T> keys(s, call.k_cache, call.block_table, b, h);
        const CacheRows<T> values(s, call.v_cache, call.block_table, b, h);
        const int64_t run = count / kStreams;
        for (int64_t stream = 0; stream < kStreams; ++stream) {
            keys.list(start + stream * run, run, t.keys + stream, kStreams);
            values.list(start + stream * run, run, t.values + stream, kStreams);
            for (int64_t i = 0; i < run; ++i)
                t.places[stream + i * kStreams] = static_cast<Index>(stream * run + i);
        }
        const int64_t rest = run * kStreams;
        keys.list(start + rest, count - rest, t.keys + rest, 1);
        values.list(start + rest, count - rest, t.values + rest, 1);
        for (int64_t i = rest; i < round_up(count, L); ++i) t.places[i] = static_cast<Index>(i);
        // What is read after the keys are the values.
        for (int64_t i = 0; i < kAhead; ++i) {
            t.keys[count + i] = t.values[std::min(i, count - 1)];
            t.values[count + i] = t.values[count - 1];
        }

        for (int64_t n = 0; n < count; n += kChunk) {
            const int64_t some = std::min(kChunk, count - n);
            const T* const* rows_of = t.keys + n;
            if (copies_keys)
                rows_of = copied(rows_of, some, s.head_size, call.k_cache.strides[3], depth,
                                 t.key_copies, t.copied_keys);
            block_scores<T>(rows, t.query, depth, rows_of, some, key_units, t.scores + n, kBlock);
        }
        for (int64_t m = 0; m < rows; ++m) softmax(pair, r + m, m, start, count, t);
        for (int64_t n = 0; n < count; n += kChunk) {
            const int64_t some = std::min(kChunk, count - n);
            const T* const* rows_of = t.values + n;
            if (copies_values)
                rows_of = copied(rows_of, some, s.value_size, call.v_cache.strides[3], width,
                                 t.value_copies, t.copied_values);
            block_values<T>(rows, t.scores + n, kBlock, rows_of, some, value_units, t.out, width);
        }
    }

    // Rows that no unit can be read from, since their elements lie apart or end within one.
    static const T* const* copied(const T* const* rows, int64_t count, int64_t size, int64_t stride,
                                  int64_t padded, T* copies, T** pointers) {
        for (int64_t n = 0; n < count; ++n) {
            T* copy = pointers[n] = copies + n * padded;
            if (stride == 1)
                std::memcpy(copy, rows[n], static_cast<size_t>(size) * sizeof(T));
            else
                for (int64_t d = 0; d < size; ++d) copy[d] = rows[n][d * stride];
            std::fill(copy + size, copy + padded, T{});
        }
        std::fill_n(pointers + count, kAhead, copies);
        return pointers;
    }

    // Turns products into weights, and what the row has gathered from earlier blocks is brought down
    // to the new maximum.
    void softmax(int64_t pair, int64_t r, int64_t m, int64_t start, int64_t count,
                 const ThreadScratch& t) const {
        C* scores = t.scores + m * kBlock;
        const int64_t b = pair / s.kv_heads, i = r % s.query_len, head = head_of(pair, r);
        const int64_t low = s.first_key(call, b, i) - start, high = s.end_key(call, b, i) - start;
        const Vec<C> own = splat(static_cast<C>(i + s.total(b) - s.query_len - start));
        const C slope = call.alibi_slopes ? slope_of(*call.alibi_slopes, b, head) : C(0);
        for (int64_t n = count; n < round_up(count, L); ++n) scores[n] = -kInf;
        Vec<C> top = splat(-kInf);
        for (int64_t n = 0; n < count; n += L) {
            Vec<C> score = load(scores + n) * scale;
            if (call.softcap > 0) score = tanh(score / softcap) * softcap;
            Mask<C> place;
            std::memcpy(&place, t.places + n, sizeof place);
            if (call.alibi_slopes) {
                const Vec<C> apart = own - __builtin_convertvector(place, Vec<C>);
                score -= select(apart < C(0), -apart, apart) * slope;
            }
            if (low > 0) score = select(place >= static_cast<Index>(low), score, splat(-kInf));
            if (high < count || n + L > count)
                score = select(place < static_cast<Index>(std::min(high, count)), score,
                               splat(-kInf));
            top = vmax(score, top);
            store(scores + n, score);
        }
        const C before = t.max[m], now = std::max(before, bigops::max(top));
        const Vec<C> shift = splat(now == -kInf ? C(0) : now);
        Vec<C> sum = {};
        for (int64_t n = 0; n < count; n += L) {
            const Vec<C> weight = bigops::exp(load(scores + n) - shift);
            sum += weight;
            store(scores + n, weight);
        }
        const C shrink = before == now ? C(1) : std::exp(before - now);
        t.max[m] = now;
        t.sum[m] = t.sum[m] * shrink + bigops::sum(sum);
        if (shrink != C(1))
            for (int64_t d = 0; d < width; d += L)
                store(t.out + m * width + d, load(t.out + m * width + d) * shrink);
    }

    static C slope_of(const View& slopes, int64_t b, int64_t head) {
        const int64_t at = slopes.ndim == 1 ? head * slopes.strides[0]
                                            : b * slopes.strides[0] + head * slopes.strides[1];
        return slopes.ptr<C>()[at];
    }

    void combine(int64_t pair, int64_t r, const ThreadScratch& t, const Partials& partials) const {
        const int64_t b = pair / s.kv_heads, i = r % s.query_len, head = head_of(pair, r);
        const int64_t parts = splits(b), rows = s.rows();
        const Partials own = partials.at(pair * most_splits * rows + r, width);
        for (int64_t part = 0; part < parts; ++part) t.weights[part] = own.lse[part * rows];
        if (call.sinks)  // one more part, of the value 0
            t.weights[parts] = static_cast<double>(call.sinks->ptr<C>()[head * call.sinks->strides[0]]);
        const double lse = combine_weights(t.weights, parts + (call.sinks ? 1 : 0));
        for (int64_t d = 0; d < width; d += L) {
            Vec<C> sum = {};
            for (int64_t part = 0; part < parts; ++part)
                sum = fma(load(own.out + part * rows * width + d),
                          splat(static_cast<C>(t.weights[part])), sum);
            store(t.out + d, sum);
        }
        const View &out = call.out, &lses = call.lse;
        T* to = out.ptr<T>() + b * out.strides[0] + head * out.strides[1] + i * out.strides[2];
        for (int64_t d = 0; d < s.value_size; ++d)
            to[d * out.strides[3]] = from_float<T>(t.out[Unit<T>::place(d)]);
        lses.ptr<C>()[b * lses.strides[0] + head * lses.strides[1] + i * lses.strides[2]] =
            static_cast<C>(lse);
    }

    const DecodeCall& call;
    const DecodeSizes& s;
    const int64_t key_units, value_units, depth, width, row_block;
    const bool copies_keys, copies_values;
    const C scale, softcap;
    int64_t most_splits = 0;
};

}  // namespace

void decode_attention(const DecodeCall& call) {
    const DecodeSizes sizes = decode_sizes(call);
    require(call.out.ndim == 4 && call.out.dtype == call.query.dtype &&
                call.out.shape[0] == sizes.batch && call.out.shape[1] == sizes.heads &&
                call.out.shape[2] == sizes.query_len && call.out.shape[3] == sizes.value_size,
            "out must be (batch, heads, query length, value size)");
    const DType wide = call.query.dtype == DType::f64 ? DType::f64 : DType::f32;
    require(call.lse.ndim == 3 && call.lse.dtype == wide && call.lse.shape[0] == sizes.batch &&
                call.lse.shape[1] == sizes.heads && call.lse.shape[2] == sizes.query_len,
            "lse must be (batch, heads, query length), float32 (float64 for float64)");
    require(!call.sinks || call.sinks->dtype == wide, "sinks must have lse's dtype");
    require(!call.alibi_slopes || call.alibi_slopes->dtype == wide,
            "alibi_slopes must have lse's dtype");
    switch (call.query.dtype) {
        case DType::f64: return Decode<double>(call, sizes).run();
        case DType::f32: return Decode<float>(call, sizes).run();
        case DType::bf16: return Decode<bf16>(call, sizes).run();
        case DType::f16: return Decode<f16>(call, sizes).run();
        default: require(false, "query must be floating point");
    }
}

}  // namespace bigops
