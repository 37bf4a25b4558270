// The instruction wgmma.mma_async for every N from 8 to 256; included by wgmma.h alone. A register list
// and its operands grow by four from one macro to the next, as a string cannot be computed. The last
// numbers of BIGOPS_WGMMA are the operands that follow the N / 2 accumulators.
#pragma once

#define BIGOPS_D(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define BIGOPS_R0 "%0, %1, %2, %3"
#define BIGOPS_R1 BIGOPS_R0 ", %4, %5, %6, %7"
#define BIGOPS_R2 BIGOPS_R1 ", %8, %9, %10, %11"
#define BIGOPS_R3 BIGOPS_R2 ", %12, %13, %14, %15"
#define BIGOPS_R4 BIGOPS_R3 ", %16, %17, %18, %19"
#define BIGOPS_R5 BIGOPS_R4 ", %20, %21, %22, %23"
#define BIGOPS_R6 BIGOPS_R5 ", %24, %25, %26, %27"
#define BIGOPS_R7 BIGOPS_R6 ", %28, %29, %30, %31"
#define BIGOPS_R8 BIGOPS_R7 ", %32, %33, %34, %35"
#define BIGOPS_R9 BIGOPS_R8 ", %36, %37, %38, %39"
#define BIGOPS_R10 BIGOPS_R9 ", %40, %41, %42, %43"
#define BIGOPS_R11 BIGOPS_R10 ", %44, %45, %46, %47"
#define BIGOPS_R12 BIGOPS_R11 ", %48, %49, %50, %51"
#define BIGOPS_R13 BIGOPS_R12 ", %52, %53, %54, %55"
#define BIGOPS_R14 BIGOPS_R13 ", %56, %57, %58, %59"
#define BIGOPS_R15 BIGOPS_R14 ", %60, %61, %62, %63"
#define BIGOPS_R16 BIGOPS_R15 ", %64, %65, %66, %67"
#define BIGOPS_R17 BIGOPS_R16 ", %68, %69, %70, %71"
#define BIGOPS_R18 BIGOPS_R17 ", %72, %73, %74, %75"
#define BIGOPS_R19 BIGOPS_R18 ", %76, %77, %78, %79"
#define BIGOPS_R20 BIGOPS_R19 ", %80, %81, %82, %83"
#define BIGOPS_R21 BIGOPS_R20 ", %84, %85, %86, %87"
#define BIGOPS_R22 BIGOPS_R21 ", %88, %89, %90, %91"
#define BIGOPS_R23 BIGOPS_R22 ", %92, %93, %94, %95"
#define BIGOPS_R24 BIGOPS_R23 ", %96, %97, %98, %99"
#define BIGOPS_R25 BIGOPS_R24 ", %100, %101, %102, %103"
#define BIGOPS_R26 BIGOPS_R25 ", %104, %105, %106, %107"
#define BIGOPS_R27 BIGOPS_R26 ", %108, %109, %110, %111"
#define BIGOPS_R28 BIGOPS_R27 ", %112, %113, %114, %115"
#define BIGOPS_R29 BIGOPS_R28 ", %116, %117, %118, %119"
#define BIGOPS_R30 BIGOPS_R29 ", %120, %121, %122, %123"
#define BIGOPS_R31 BIGOPS_R30 ", %124, %125, %126, %127"
#define BIGOPS_O0 BIGOPS_D(0)
#define BIGOPS_O1 BIGOPS_O0, BIGOPS_D(4)
#define BIGOPS_O2 BIGOPS_O1, BIGOPS_D(8)
#define BIGOPS_O3 BIGOPS_O2, BIGOPS_D(12)
#define BIGOPS_O4 BIGOPS_O3, BIGOPS_D(16)
#define BIGOPS_O5 BIGOPS_O4, BIGOPS_D(20)
#define BIGOPS_O6 BIGOPS_O5, BIGOPS_D(24)
#define BIGOPS_O7 BIGOPS_O6, BIGOPS_D(28)
#define BIGOPS_O8 BIGOPS_O7, BIGOPS_D(32)
#define BIGOPS_O9 BIGOPS_O8, BIGOPS_D(36)
#define BIGOPS_O10 BIGOPS_O9, BIGOPS_D(40)
#define BIGOPS_O11 BIGOPS_O10, BIGOPS_D(44)
#define BIGOPS_O12 BIGOPS_O11, BIGOPS_D(48)
#define BIGOPS_O13 BIGOPS_O12, BIGOPS_D(52)
#define BIGOPS_O14 BIGOPS_O13, BIGOPS_D(56)
#define BIGOPS_O15 BIGOPS_O14, BIGOPS_D(60)
#define BIGOPS_O16 BIGOPS_O15, BIGOPS_D(64)
#define BIGOPS_O17 BIGOPS_O16, BIGOPS_D(68)
#define BIGOPS_O18 BIGOPS_O17, BIGOPS_D(72)
#define BIGOPS_O19 BIGOPS_O18, BIGOPS_D(76)
#define BIGOPS_O20 BIGOPS_O19, BIGOPS_D(80)
#define BIGOPS_O21 BIGOPS_O20, BIGOPS_D(84)
#define BIGOPS_O22 BIGOPS_O21, BIGOPS_D(88)
#define BIGOPS_O23 BIGOPS_O22, BIGOPS_D(92)
#define BIGOPS_O24 BIGOPS_O23, BIGOPS_D(96)
#define BIGOPS_O25 BIGOPS_O24, BIGOPS_D(100)
#define BIGOPS_O26 BIGOPS_O25, BIGOPS_D(104)
#define BIGOPS_O27 BIGOPS_O26, BIGOPS_D(108)
#define BIGOPS_O28 BIGOPS_O27, BIGOPS_D(112)
#define BIGOPS_O29 BIGOPS_O28, BIGOPS_D(116)
#define BIGOPS_O30 BIGOPS_O29, BIGOPS_D(120)
#define BIGOPS_O31 BIGOPS_O30, BIGOPS_D(124)

#define BIGOPS_WGMMA_TYPE(N, I, TYPE, NAME,    P0, P1, P2, P3, P4, P5, P6)                         \
    template <>                                                                                    \
    struct Wgmma<N, TYPE> {                                                                        \
        template <int kTransA, int kTransB>                                                        \
        BIGOPS_DEVICE static void shared(float (&d)[N / 2], uint64_t a, uint64_t b, int add) {     \
            asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #P2 ", 0;\n"                         \
                         "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." NAME "." NAME           \
                         " {" BIGOPS_R##I "}, %" #P0 ", %" #P1 ", p, 1, 1, %" #P3 ", %" #P4 ";\n}" \
                         : BIGOPS_O##I                                                             \
                         : "l"(a), "l"(b), "r"(add), "n"(kTransA), "n"(kTransB));                  \
        }                                                                                          \
        template <int kTransB>                                                                     \
        BIGOPS_DEVICE static void registers(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, \
                                            int add) {                                             \
            asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #P5 ", 0;\n"                         \
                         "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." NAME "." NAME           \
                         " {" BIGOPS_R##I "}, {%" #P0 ", %" #P1 ", %" #P2 ", %" #P3 "}, %" #P4     \
                         ", p, 1, 1, %" #P6 ";\n}"                                                 \
                         : BIGOPS_O##I                                                             \
                         : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add),           \
                           "n"(kTransB));                                                          \
        }                                                                                          \
    };
#define BIGOPS_WGMMA(N, I, ...)                                                                    \
    BIGOPS_WGMMA_TYPE(N, I, bf16, "bf16", __VA_ARGS__)                                             \
    BIGOPS_WGMMA_TYPE(N, I, f16, "f16", __VA_ARGS__)

BIGOPS_WGMMA(8, 0, 4, 5, 6, 7, 8, 9, 10)
BIGOPS_WGMMA(16, 1, 8, 9, 10, 11, 12, 13, 14)
BIGOPS_WGMMA(24, 2, 12, 13, 14, 15, 16, 17, 18)
BIGOPS_WGMMA(32, 3, 16, 17, 18, 19, 20, 21, 22)
BIGOPS_WGMMA(40, 4, 20, 21, 22, 23, 24, 25, 26)
BIGOPS_WGMMA(48, 5, 24, 25, 26, 27, 28, 29, 30)
BIGOPS_WGMMA(56, 6, 28, 29, 30, 31, 32, 33, 34)
BIGOPS_WGMMA(64, 7, 32, 33, 34, 35, 36, 37, 38)
BIGOPS_WGMMA(72, 8, 36, 37, 38, 39, 40, 41, 42)
BIGOPS_WGMMA(80, 9, 40, 41, 42, 43, 44, 45, 46)
BIGOPS_WGMMA(88, 10, 44, 45, 46, 47, 48, 49, 50)
BIGOPS_WGMMA(96, 11, 48, 49, 50, 51, 52, 53, 54)
BIGOPS_WGMMA(104, 12, 52, 53, 54, 55, 56, 57, 58)
BIGOPS_WGMMA(112, 13, 56, 57, 58, 59, 60, 61, 62)
BIGOPS_WGMMA(120, 14, 60, 61, 62, 63, 64, 65, 66)
BIGOPS_WGMMA(128, 15, 64, 65, 66, 67, 68, 69, 70)
BIGOPS_WGMMA(136, 16, 68, 69, 70, 71, 72, 73, 74)
BIGOPS_WGMMA(144, 17, 72, 73, 74, 75, 76, 77, 78)
BIGOPS_WGMMA(152, 18, 76, 77, 78, 79, 80, 81, 82)
BIGOPS_WGMMA(160, 19, 80, 81, 82, 83, 84, 85, 86)
BIGOPS_WGMMA(168, 20, 84, 85, 86, 87, 88, 89, 90)
BIGOPS_WGMMA(176, 21, 88, 89, 90, 91, 92, 93, 94)
BIGOPS_WGMMA(184, 22, 92, 93, 94, 95, 96, 97, 98)
BIGOPS_WGMMA(192, 23, 96, 97, 98, 99, 100, 101, 102)
BIGOPS_WGMMA(200, 24, 100, 101, 102, 103, 104, 105, 106)
BIGOPS_WGMMA(208, 25, 104, 105, 106, 107, 108, 109, 110)
BIGOPS_WGMMA(216, 26, 108, 109, 110, 111, 112, 113, 114)
BIGOPS_WGMMA(224, 27, 112, 113, 114, 115, 116, 117, 118)
BIGOPS_WGMMA(232, 28, 116, 117, 118, 119, 120, 121, 122)
BIGOPS_WGMMA(240, 29, 120, 121, 122, 123, 124, 125, 126)
BIGOPS_WGMMA(248, 30, 124, 125, 126, 127, 128, 129, 130)
BIGOPS_WGMMA(256, 31, 128, 129, 130, 131, 132, 133, 134)
