// Calls a function whose parameters are known only to the caller in Python (bigops/simt.py): by the
// System V ABI, integers and pointers fill six registers, floating-point numbers eight, in order, and
// the rest lies on the stack; a function that takes fewer ignores the others.
#pragma once

#include <cstdint>

namespace bigops::simt {

struct Registers {
    static constexpr int kStack = 24;
    uint64_t integers[6];
    double floats[8];
    uint64_t stack[kStack];
};

inline void invoke(void* function, const Registers& r) {
#if defined(__x86_64__)
    using U = uint64_t;
    using D = double;
    reinterpret_cast<void (*)(U, U, U, U, U, U, D, D, D, D, D, D, D, D, U, U, U, U, U, U, U, U, U,
                              U, U, U, U, U, U, U, U, U, U, U, U, U, U, U)>(function)(
        r.integers[0], r.integers[1], r.integers[2], r.integers[3], r.integers[4], r.integers[5],
        r.floats[0], r.floats[1], r.floats[2], r.floats[3], r.floats[4], r.floats[5], r.floats[6],
        r.floats[7], r.stack[0], r.stack[1], r.stack[2], r.stack[3], r.stack[4], r.stack[5],
        r.stack[6], r.stack[7], r.stack[8], r.stack[9], r.stack[10], r.stack[11], r.stack[12],
        r.stack[13], r.stack[14], r.stack[15], r.stack[16], r.stack[17], r.stack[18], r.stack[19],
        r.stack[20], r.stack[21], r.stack[22], r.stack[23]);
#else
#error "the CPU model's Python face knows x86-64's calling convention only"
#endif
}

}  // namespace bigops::simt
