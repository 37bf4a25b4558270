// Races between the blocks of a launch. Blocks tell at their end which bytes of global memory they have
// touched, when by their own clocks, and what they had by then heard of others; what orders two blocks
// are atomic accesses between fences.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>
#include <vector>

#include "core.h"

namespace bigops::simt {

// What is known of other blocks: by block, its threads' epochs.
using BlockClocks = std::unordered_map<uint64_t, std::vector<uint32_t>>;

class GridRaces {
public:
    struct Touch {
        uint64_t block;
        uint32_t epoch;
        uint16_t agent;
        bool atomic, write;
        uint32_t pc;
        uint32_t heard;  // which of its block's
        bool operator==(const Touch&) const = default;
    };
    GridRaces(uintptr_t module_low, dim3 grid) : low_(module_low), grid_(grid) {}

    // Through a variable that is accessed atomically: a block tells what it had seen, of itself and of
    // others, when it fenced; another hears what was told.
    void tell(uintptr_t address, uint64_t block, const std::vector<uint32_t>& fenced,
              const BlockClocks& heard);
    void hear(uintptr_t address, BlockClocks& heard);

    // All touches of one block, between begin and end.
    void begin(uint64_t block, const std::vector<BlockClocks>& heard);
    void touch(uintptr_t address, const Touch& touch);
    void end();

private:
    struct Byte {  // indices into touches_; 0: none. Two blocks' reads are as good as any number.
        uint32_t writer, readers[2];
    };
    static constexpr size_t kPage = 4096;

    bool ordered(const Touch& a, const Touch& b) const;
    void conflict(const Touch& a, const Touch& b, uintptr_t address) const;
    uint32_t number(const Touch& touch);
    uint3 index(uint64_t block) const;

    const uintptr_t low_;
    const dim3 grid_;
    std::mutex mutex_;
    std::unordered_map<uintptr_t, BlockClocks> told_;
    std::vector<Touch> touches_ = {{}};
    std::unordered_map<uint64_t, std::vector<BlockClocks>> heard_;  // by blocks that have ended
    std::unordered_map<uintptr_t, std::unique_ptr<Byte[]>> pages_;
};

}  // namespace bigops::simt
