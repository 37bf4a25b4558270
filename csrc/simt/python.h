// What bigops/simt.py calls, plain C.
#pragma once

#include <cstddef>
#include <cstdint>

#include "invoke.h"

extern "C" {

struct BigopsSimtLaunch {
    void* function;
    uint32_t kernel;  // 1: once per thread of this grid; 0: an ordinary function, once
    uint32_t grid[3], block[3];
    uint64_t shared_bytes;
    uint32_t order;  // bigops::simt::Order
    uint32_t workers;
    uint64_t seed;
    double patience;  // seconds
    uint64_t bank_conflicts;  // 1: count them
    uint64_t same_bits;       // 1: sums of floats must have them in every run
    bigops::simt::Registers registers;
};

// Null, or what was thrown; valid until the next call.
const char* bigops_simt_run(const BigopsSimtLaunch* launch);
void bigops_simt_add_region(const void* low, size_t bytes, const char* name);
void bigops_simt_remove_region(const void* low);
// All findings since the last call: records end with 0x1e, their fields (kind, block x, y, z, thread
// x, y, z, times, message) with 0x1f. Valid until the next call.
const char* bigops_simt_take_findings();
}
