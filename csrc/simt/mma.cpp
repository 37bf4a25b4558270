// mma.sync, ldmatrix and stmatrix: a warp's registers become matrices by the tables of layouts.h.
#include <bit>
#include <cstring>

#include "block.h"
#include "instructions.h"
#include "layouts.h"
#include "widen.h"

namespace bigops::simt {
namespace {

using layouts::Place;

struct Mma {
    float* d;
    const uint32_t* a;
    uint32_t b[2];
};

// Every instruction here is .sync.aligned: the whole warp.
int whole_warp(const char* instruction) {
    const int first = warp() * kWarpSize;
    if (first + kWarpSize > block_threads())
        fatal(Finding::misuse, std::string(instruction) + " needs all 32 threads of a warp");
    return first;
}

// d (16 x 8) += a (16 x depth) * b (depth x 8), the products summed one after the other in fp32.
template <int kDepth>
void multiply(const float (&a)[16][kDepth], const float (&b)[kDepth][8], Operands<Mma> lanes) {
    float d[16][8];
    for (int lane = 0; lane < kWarpSize; ++lane)
        for (int i = 0; i < 4; ++i) {
            const Place at = layouts::mma_m16n8_c(lane, i);
            d[at.row][at.column] = lanes[lane]->d[i];
        }
    for (int m = 0; m < 16; ++m)
        for (int k = 0; k < kDepth; ++k)
            for (int n = 0; n < 8; ++n) d[m][n] += a[m][k] * b[k][n];
    for (int lane = 0; lane < kWarpSize; ++lane)
        for (int i = 0; i < 4; ++i) {
            const Place at = layouts::mma_m16n8_c(lane, i);
            lanes[lane]->d[i] = d[at.row][at.column];
        }
}

float tf32(uint32_t bits) { return std::bit_cast<float>(bits & ~0x1fffu); }

struct Row {
    void* row;
    uint32_t* r;
};

}  // namespace

void mma_m16n8k16(Operand16 type, float* d, const uint32_t* a, uint32_t b0, uint32_t b1, Site site) {
    Mma mine = {d, a, {b0, b1}};
    const auto run = [&](Operands<Mma> lanes) {
        float left[16][16], right[16][8];
        for (int lane = 0; lane < kWarpSize; ++lane) {
            for (int i = 0; i < 8; ++i) {
                const Place at = layouts::mma_m16n8k16_a(lane, i);
                left[at.row][at.column] = widen(type, half_of(lanes[lane]->a[i / 2], i % 2));
            }
            for (int i = 0; i < 4; ++i) {
                const Place at = layouts::mma_m16n8k16_b(lane, i);
                right[at.row][at.column] = widen(type, half_of(lanes[lane]->b[i / 2], i % 2));
            }
        }
        multiply(left, right, lanes);
    };
    const char* key = type == Operand16::bf16 ? "mma.m16n8k16.bf16" : "mma.m16n8k16.f16";
    collective(whole_warp(key), kWarpSize, key, mine, run, false, site);
}

void mma_m16n8k8_tf32(float* d, const uint32_t* a, uint32_t b0, uint32_t b1, Site site) {
    Mma mine = {d, a, {b0, b1}};
    const auto run = [&](Operands<Mma> lanes) {
        float left[16][8], right[8][8];
        for (int lane = 0; lane < kWarpSize; ++lane) {
            for (int i = 0; i < 4; ++i) {
                const Place at = layouts::mma_m16n8k8_tf32_a(lane, i);
                left[at.row][at.column] = tf32(lanes[lane]->a[i]);
            }
            for (int i = 0; i < 2; ++i) {
                const Place at = layouts::mma_m16n8k8_tf32_b(lane, i);
                right[at.row][at.column] = tf32(lanes[lane]->b[i]);
            }
        }
        multiply(left, right, lanes);
    };
    collective(whole_warp("mma.m16n8k8.tf32"), kWarpSize, "mma.m16n8k8.tf32", mine, run, false, site);
}

void ldmatrix_x4(uint32_t* r, const void* row, bool transposed, Site site) {
    const char* key = transposed ? "ldmatrix.x4.trans" : "ldmatrix.x4";
    require_shared(row, 16, key);
    const int first = whole_warp(key);
    Row mine = {const_cast<void*>(row), r};
    const auto run = [&](Operands<Row> lanes) {
        for (int matrix = 0; matrix < 4; ++matrix) {
            uint16_t elements[8][8];
            for (int i = 0; i < 8; ++i) {
                const int lane = 8 * matrix + i;
                read(lanes[lane]->row, 16, first + lane, Proxy::generic);
                std::memcpy(elements[i], lanes[lane]->row, 16);
            }
            for (int lane = 0; lane < kWarpSize; ++lane) {
                const auto [i, k] = layouts::ldmatrix_fragment(lane);
                const uint32_t low = transposed ? elements[k][i] : elements[i][k];
                const uint32_t high = transposed ? elements[k + 1][i] : elements[i][k + 1];
                lanes[lane]->r[matrix] = high << 16 | low;
            }
        }
    };
    collective(first, kWarpSize, key, mine, run, false, site);
}

void stmatrix_x4(void* row, const uint32_t* r, bool transposed, Site site) {
    const char* key = transposed ? "stmatrix.x4.trans" : "stmatrix.x4";
    require_shared(row, 16, key);
    const int first = whole_warp(key);
    Row mine = {row, const_cast<uint32_t*>(r)};
    const auto run = [&](Operands<Row> lanes) {
        for (int matrix = 0; matrix < 4; ++matrix) {
            uint16_t elements[8][8];
            for (int lane = 0; lane < kWarpSize; ++lane) {
                const auto [i, k] = layouts::ldmatrix_fragment(lane);
                const uint32_t both = lanes[lane]->r[matrix];
                (transposed ? elements[k][i] : elements[i][k]) = half_of(both, 0);
                (transposed ? elements[k + 1][i] : elements[i][k + 1]) = half_of(both, 1);
            }
            for (int i = 0; i < 8; ++i) {
                const int lane = 8 * matrix + i;
                write(lanes[lane]->row, 16, first + lane, Proxy::generic);
                std::memcpy(lanes[lane]->row, elements[i], 16);
            }
        }
    };
    collective(first, kWarpSize, key, mine, run, false, site);
}

}  // namespace bigops::simt
