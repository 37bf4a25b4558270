// Bank conflicts of shared memory, counted on request: 32 banks of 4 bytes serve a warp's access in
// one pass if no bank has two different words of it; accesses of 8 and 16 bytes come as halves and
// quarters of a warp (CUDA C++ Best Practices Guide, "Shared Memory and Memory Banks").
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <map>
#include <mutex>
#include <unordered_map>

namespace bigops::simt {

struct Passes {
    uint64_t requests = 0, taken = 0, least = 0;
};

// Of a launch, by place in the code.
class BankTotals {
public:
    void add(const std::unordered_map<const void*, Passes>& block);
    // What took more passes than it had to becomes a finding.
    void report(uintptr_t module_low) const;

private:
    std::mutex mutex_;
    std::map<const void*, Passes> places_;
};

// Of a block. Threads run one after another, so a warp's access is put together from the n-th ones of
// its lanes at one place.
class Banks {
public:
    void access(int thread, uintptr_t address, size_t bytes, const void* pc);
    void end(BankTotals& totals);

private:
    static constexpr int kLanes = 32;
    struct Request {
        uint32_t lanes = 0;
        uint32_t bytes = 0;
        uintptr_t addresses[kLanes];
    };
    struct Place {
        uint64_t first = 0;  // the number of the request that is in front
        uint64_t next[kLanes] = {};
        std::deque<Request> requests;
    };
    void count(const Request& request, const void* pc);

    std::map<std::pair<const void*, int>, Place> open_;
    std::unordered_map<const void*, Passes> places_;
};

}  // namespace bigops::simt
