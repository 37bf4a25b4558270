#include "boxes.h"

#include <algorithm>
#include <cstring>
#include <string>

#include "layouts.h"

namespace bigops::simt {
namespace {

constexpr int kMaxIm2colOffset = 255;  // of a four-dimensional tensor

// The part of a row of `count` elements from coordinate `c` on that exists; `data` is at coordinate 0.
Row clipped(char* data, int64_t c, int64_t count, const TensorMap& map) {
    const int64_t size = static_cast<int64_t>(map.sizes[0]);
    const int64_t first = std::clamp<int64_t>(-c, 0, count);
    const int64_t last = std::clamp<int64_t>(size - c, first, count);
    return {data + (c + first) * map.element_bytes, static_cast<int>(first), static_cast<int>(last)};
}

Rows empty_rows(const TensorMap& map, uint32_t elements) {
    Rows rows;
    rows.element_bytes = map.element_bytes;
    rows.row_bytes = static_cast<size_t>(elements) * static_cast<size_t>(map.element_bytes);
    rows.swizzle = map.swizzle;
    return rows;
}

// Calls visit(shared, row, chunk) for each 16 bytes of shared memory.
template <class Visit>
void each_chunk(const Rows& rows, char* shared, Visit visit) {
    const uint32_t base = shared_address(shared);
    const size_t chunks = rows.row_bytes / layouts::kChunk;
    for (size_t row = 0; row < rows.rows.size(); ++row)
        for (size_t chunk = 0; chunk < chunks; ++chunk) {
            const auto offset = static_cast<uint32_t>(row * rows.row_bytes + chunk * layouts::kChunk);
            visit(shared + (layouts::swizzled(base + offset, rows.swizzle) - base), row, chunk);
        }
}

}  // namespace

// "Tiled mode": of a dimension with a step, every step-th element of the box.
Rows tiled_rows(const TensorMap& map, const int64_t* at) {
    Rows result = empty_rows(map, map.box[0]);
    int64_t counts[TensorMap::kMaxRank], index[TensorMap::kMaxRank] = {};
    size_t total = 1;
    for (int i = 1; i < map.rank; ++i) {
        counts[i] = (map.box[i] + map.steps[i] - 1) / map.steps[i];
        total *= static_cast<size_t>(counts[i]);
    }
    for (size_t n = 0; n < total; ++n) {
        bool inside = true;
        char* data = map.data;
        for (int i = 1; i < map.rank; ++i) {
            const int64_t c = at[i] + index[i] * map.steps[i];
            inside = inside && c >= 0 && c < static_cast<int64_t>(map.sizes[i]);
            data += c * static_cast<int64_t>(map.strides[i]);
        }
        result.rows.push_back(inside ? clipped(data, at[0], map.box[0], map) : Row{});
        for (int i = 1; i < map.rank && ++index[i] == counts[i]; ++i) index[i] = 0;
    }
    return result;
}

// "Im2col mode": from the filter's base position on, `pixels` positions in steps within the bounding box,
// width first, then height, then images; each is read where the offsets lead from it.
Rows im2col_rows(const TensorMap& map, const int64_t* at, const int* offset) {
    Rows result = empty_rows(map, map.channels);
    int64_t last[2], c[3] = {at[1], at[2], at[3]};
    for (int i = 0; i < 2; ++i) {
        last[i] = static_cast<int64_t>(map.sizes[1 + i]) - 1 + map.upper[i];
        if (c[i] < map.lower[i] || c[i] > last[i])
            fatal(Finding::misuse, "im2col: the position " + std::to_string(c[i]) +
                                       " is outside of the bounding box, " +
                                       std::to_string(map.lower[i]) + " to " +
                                       std::to_string(last[i]) + (i == 0 ? " in width" : " in height"));
        if (offset[i] > kMaxIm2colOffset)
            fatal(Finding::misuse, "im2col: the offset " + std::to_string(offset[i]) +
                                       " is more than 255");
    }
    for (uint32_t pixel = 0; pixel < map.pixels; ++pixel) {
        const int64_t where[3] = {c[0] + offset[0], c[1] + offset[1], c[2]};
        bool inside = true;
        char* data = map.data;
        for (int i = 0; i < 3; ++i) {
            inside = inside && where[i] >= 0 && where[i] < static_cast<int64_t>(map.sizes[1 + i]);
            data += where[i] * static_cast<int64_t>(map.strides[1 + i]);
        }
        result.rows.push_back(inside ? clipped(data, at[0], map.channels, map) : Row{});
        c[0] += map.steps[1];
        if (c[0] <= last[0]) continue;
        c[0] = map.lower[0];
        c[1] += map.steps[2];
        if (c[1] <= last[1]) continue;
        c[1] = map.lower[1];
        ++c[2];
    }
    return result;
}

void copy_in(const Rows& rows, char* shared, Agent agent) {
    write(shared, rows.bytes(), agent, Proxy::async);
    std::vector<char> content(rows.bytes());
    for (size_t i = 0; i < rows.rows.size(); ++i) {
        const size_t bytes = rows.existing(i);
        if (bytes == 0) continue;
        read(rows.rows[i].data, bytes, agent, Proxy::async);
        std::memcpy(&content[rows.offset(i)], rows.rows[i].data, bytes);
    }
    each_chunk(rows, shared, [&](char* to, size_t row, size_t chunk) {
        std::memcpy(to, &content[row * rows.row_bytes + chunk * layouts::kChunk], layouts::kChunk);
    });
}

std::vector<char> taken_out(const Rows& rows, char* shared, Agent agent) {
    read(shared, rows.bytes(), agent, Proxy::async);
    std::vector<char> content(rows.bytes());
    each_chunk(rows, shared, [&](const char* from, size_t row, size_t chunk) {
        std::memcpy(&content[row * rows.row_bytes + chunk * layouts::kChunk], from, layouts::kChunk);
    });
    return content;
}

}  // namespace bigops::simt
