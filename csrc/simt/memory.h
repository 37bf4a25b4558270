// Which memory a kernel may touch, and what an address is called in a message.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace bigops::simt {

struct Region {
    uintptr_t low = 0, high = 0;
    std::string name;
    bool holds(uintptr_t address, size_t bytes) const {
        return address >= low && bytes <= high - low && address - low <= high - low - bytes;
    }
};

// Global memory: tensors that a launch was given and what cudaMalloc handed out. While there is none
// (a C++ program that registers nothing), global accesses are not checked for bounds.
void add_region(const void* low, size_t bytes, std::string name);
void remove_region(const void* low);
// Sorted, overlapping ones joined.
std::vector<Region> regions();

// The shared object that holds a kernel: its code and constants, and the thread-local block in which
// its __shared__ variables are.
struct Module {
    uintptr_t low = 0, high = 0;
    size_t tls_id = 0, tls_bytes = 0;
};
Module module_of(const void* code);
// The calling thread's.
char* tls_block(const Module& module);

}  // namespace bigops::simt
