// CUDA's built-in vector types, with the alignment that makes an access one instruction.
#pragma once

#include <cstdint>

struct uint3 {
    unsigned x, y, z;
};

struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
    constexpr dim3(uint3 v) : x(v.x), y(v.y), z(v.z) {}
    constexpr operator uint3() const { return {x, y, z}; }
};

#define BIGOPS_VECTOR_TYPES(NAME, TYPE)                                                        \
    struct NAME##1 {                                                                           \
        TYPE x;                                                                                \
    };                                                                                         \
    struct __attribute__((aligned(2 * sizeof(TYPE)))) NAME##2 {                                \
        TYPE x, y;                                                                             \
    };                                                                                         \
    struct __attribute__((aligned(4 * sizeof(TYPE) < 16 ? 4 * sizeof(TYPE) : 16))) NAME##4 {   \
        TYPE x, y, z, w;                                                                       \
    };                                                                                         \
    constexpr NAME##1 make_##NAME##1(TYPE x) { return {x}; }                                   \
    constexpr NAME##2 make_##NAME##2(TYPE x, TYPE y) { return {x, y}; }                        \
    constexpr NAME##4 make_##NAME##4(TYPE x, TYPE y, TYPE z, TYPE w) { return {x, y, z, w}; }

BIGOPS_VECTOR_TYPES(char, signed char)
BIGOPS_VECTOR_TYPES(uchar, unsigned char)
BIGOPS_VECTOR_TYPES(short, short)
BIGOPS_VECTOR_TYPES(ushort, unsigned short)
BIGOPS_VECTOR_TYPES(int, int)
BIGOPS_VECTOR_TYPES(uint, unsigned)
BIGOPS_VECTOR_TYPES(longlong, long long)
BIGOPS_VECTOR_TYPES(ulonglong, unsigned long long)
BIGOPS_VECTOR_TYPES(float, float)
BIGOPS_VECTOR_TYPES(double, double)
#undef BIGOPS_VECTOR_TYPES

struct float3 {
    float x, y, z;
};
struct int3 {
    int x, y, z;
};
constexpr float3 make_float3(float x, float y, float z) { return {x, y, z}; }
constexpr int3 make_int3(int x, int y, int z) { return {x, y, z}; }
constexpr uint3 make_uint3(unsigned x, unsigned y, unsigned z) { return {x, y, z}; }
