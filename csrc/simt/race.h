// Races by vector clocks (Fidge 1988; FastTrack, Flanagan and Freund 2009): every byte remembers its
// last writer and the readers since, each with its epoch; an access by somebody who has not seen
// that epoch is a race. Agents are a block's threads and the asynchronous work they start.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "core.h"
#include "grid_races.h"

namespace bigops::simt {

class Block;

#ifdef BIGOPS_SIMT_RACE
constexpr bool kRaces = true;
#else
constexpr bool kRaces = false;
#endif

struct Access {
    uintptr_t address;
    size_t bytes;
    bool write, atomic;
    Agent agent;
    Proxy proxy;
    const void* pc;
};

// Only in the race build does any of this do something.
class Races {
public:
    void start(Block& block, int threads);
    // `shared`: must have been written before it is read.
    void access(const Access& access, bool shared);

    void acquire(const Clock& clock, Agent agent);
    void release(Clock& clock, Agent agent);
    // All members have seen what any of them has.
    void barrier(const std::vector<int>& members);
    void proxy_fence(Agent agent);
    void fence(Agent agent);
    // What a relaxed atomic access orders, given fences on both sides.
    void atomic(uintptr_t address, Agent agent, bool writes, bool global);
    // The block has ended: its part in races with others.
    void tell(GridRaces& grid);
    Agent fork(Agent parent, const void* pc);
    void end(Agent agent);
    const void* origin(Agent agent) const;

private:
    static constexpr int kAgents = 96;
    // A byte's history. `pc` is relative to the kernel's shared object.
    struct Record {
        uint32_t epoch;
        uint16_t agent;
        bool atomic, async;
        uint32_t pc, heard;
    };
    struct Cell {
        Record write, read;
        uint32_t more;        // further readers, in more_[more - 1]; 0: none
        uint32_t generation;  // of another block: nothing is known
    };
    static constexpr uint32_t kNobody = 0;  // as epoch
    static constexpr size_t kPage = 4096;
    struct Page {
        std::unique_ptr<Cell[]> cells;
        uint32_t generation = 0;
        bool global = false;
    };

    uint32_t* seen(Agent agent) { return seen_.data() + static_cast<size_t>(agent) * width_; }
    uint32_t* async(Agent agent) { return async_.data() + static_cast<size_t>(agent) * width_; }
    Cell* page(uintptr_t address, bool shared);
    void touch(Cell& cell, uintptr_t address, const Access& access, const Record& mine,
               bool shared);
    void conflict(const Record& other, bool other_writes, uintptr_t address, const Access& access,
                  bool fence);
    std::string who(Agent agent) const;
    uint32_t both(uint32_t a, uint32_t b);  // indices into heard_

    Block* block_ = nullptr;
    int threads_ = 0;
    size_t width_ = 0;
    std::vector<uint32_t> seen_, async_;
    // Of each thread: what it had seen at its last fence, and the variables that its atomic accesses
    // have read since, of which the next fence makes it see what they were told. (By then they may
    // have been told more than was read: nobody is accused wrongly.)
    std::vector<Clock> fenced_;
    std::vector<std::vector<uintptr_t>> read_;
    std::unordered_map<uintptr_t, Clock> told_;
    // What has been heard of other blocks, and which of that each agent knows of: the first is nothing.
    std::vector<BlockClocks> heard_;
    std::vector<uint32_t> knows_;
    std::map<std::pair<uint32_t, uint32_t>, uint32_t> both_;
    std::vector<const void*> origins_;
    std::vector<bool> busy_;
    int next_agent_ = 0;
    uint32_t generation_ = 0;
    std::unordered_map<uintptr_t, Page> pages_;
    uintptr_t last_page_ = 0;
    Page* last_ = nullptr;
    std::vector<std::vector<Record>> more_;
    std::vector<uint32_t> free_more_;
};

}  // namespace bigops::simt
