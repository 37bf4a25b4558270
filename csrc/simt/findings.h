// What the detectors found, until somebody takes it (python.cpp).
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "core.h"

namespace bigops::simt {

// Places in the kernel's code stand in a message as {offset}, hexadecimal, in its shared object:
// whoever prints it looks up the lines.
struct Found {
    Finding kind;
    std::string message;
    uint3 block = {}, thread = {};
    uint64_t times = 1;
};

// A kernel that went wrong may never end: after so many findings it is ended where threads switch next.
constexpr uint64_t kEnough = 1'000'000;

// `key` tells findings apart: of equal ones only the first is kept, and counted.
void add_finding(Found found, const std::string& key);
std::vector<Found> take_findings();
std::string place(const void* pc, uintptr_t module_low);

}  // namespace bigops::simt
