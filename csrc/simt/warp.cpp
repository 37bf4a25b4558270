// Named barriers ("barrier{.cta}"), the register pool ("setmaxnreg") and elect.sync.
#include <algorithm>
#include <map>
#include <string>
#include <vector>

#include "block.h"
#include "findings.h"
#include "instructions.h"

namespace bigops::simt {
namespace {

constexpr int kNamedBarriers = 16;
constexpr int kWarpgroupSize = 128;

struct NamedBarrier {
    int expected = 0, arrived = 0;
    std::vector<bool> here = std::vector<bool>(static_cast<size_t>(block_threads()));
    uint64_t passed = 0;
    Clock arriving, done;
};

struct NamedBarriers {
    NamedBarrier of[kNamedBarriers];

    ~NamedBarriers() {
        if (Block::current()->launch().stopped) return;
        for (int id = 0; id < kNamedBarriers; ++id)
            if (of[id].arrived > 0)
                report(Finding::not_reached,
                       "the block ends while barrier " + std::to_string(id) + " has " +
                           std::to_string(of[id].arrived) + " of " +
                           std::to_string(of[id].expected) + " threads");
    }
};

// A multiprocessor's registers are shared out to the warps of a block that has it for itself: each gets as
// many as fit, in steps of 8.
struct RegisterPool {
    static constexpr int kAll = 64 * 1024, kStep = 8, kMost = 256;
    int free;
    std::map<int, int> of_warpgroup;  // of each thread
    int at_first;

    RegisterPool() {
        at_first = std::min(kMost, kAll / block_threads() / kStep * kStep);
        free = 0;
    }
    int& of(int warpgroup) { return of_warpgroup.try_emplace(warpgroup, at_first).first->second; }
};

}  // namespace

void require_shared(const void* pointer, size_t alignment, const char* instruction) {
    if (shared_address(pointer) == 0)
        fatal(Finding::out_of_bounds, std::string(instruction) + ": " +
                                          Block::current()->describe(
                                              reinterpret_cast<uintptr_t>(pointer)) +
                                          " is not shared memory");
    if (reinterpret_cast<uintptr_t>(pointer) % alignment != 0)
        fatal(Finding::misaligned,
              std::string(instruction) + ": " +
                  Block::current()->describe(reinterpret_cast<uintptr_t>(pointer)) +
                  " is no multiple of " + std::to_string(alignment) + " bytes");
}

std::string here() {
    Block& block = *Block::current();
    return place(block.kernel_pc(), block.launch().module.low);
}

void named_barrier(int id, int threads, bool wait, Site site) {
    const std::string name = "barrier " + std::to_string(id);
    if (id < 1 || id >= kNamedBarriers)
        fatal(Finding::misuse, name + ": there are barriers 1 to 15, and 0 is __syncthreads'");
    if (threads <= 0 || threads % kWarpSize != 0 || threads > block_threads())
        fatal(Finding::misuse, name + " of " + std::to_string(threads) +
                                   " threads: must be a multiple of 32, at most the block's");
    NamedBarrier& barrier = block_state<NamedBarriers>().of[id];
    if (barrier.arrived > 0 && barrier.expected != threads)
        fatal(Finding::mismatch, name + ": one thread says " + std::to_string(barrier.expected) +
                                     " threads take part, another " + std::to_string(threads));
    // What is counted is threads that take part.
    if (barrier.here[static_cast<size_t>(thread_index())])
        report(Finding::misuse, name + ": thread " + std::to_string(thread_index()) +
                                    " arrives a second time before all " + std::to_string(threads) +
                                    " threads have");
    barrier.here[static_cast<size_t>(thread_index())] = true;
    barrier.expected = threads;
    ++barrier.arrived;
    release(barrier.arriving);
    const uint64_t turn = barrier.passed;
    if (barrier.arrived == barrier.expected) {
        barrier.arrived = 0;
        barrier.here.assign(barrier.here.size(), false);
        ++barrier.passed;
        barrier.done = std::exchange(barrier.arriving, {});
    } else if (wait) {
        wait_until([&] { return barrier.passed != turn; },
                   name + " of " + std::to_string(threads) + " threads", site);
    }
    if (wait) acquire(barrier.done);
}

void set_registers(int registers, bool increase, Site site) {
    const char* name = increase ? "setmaxnreg.inc" : "setmaxnreg.dec";
    if (registers < 24 || registers > 256 || registers % 8 != 0)
        fatal(Finding::misuse, std::string(name) + " " + std::to_string(registers) +
                                   ": must be 24 to 256 and a multiple of 8");
    const int group = thread_index() / kWarpgroupSize;
    const int first = group * kWarpgroupSize;
    if (first + kWarpgroupSize > block_threads())
        fatal(Finding::misuse, std::string(name) + " needs a whole warpgroup");
    auto& pool = block_state<RegisterPool>();
    int asked = registers;
    const auto check = [&](Operands<int> all) {
        for (int i = 0; i < kWarpgroupSize; ++i)
            if (*all[i] != registers)
                fatal(Finding::mismatch, std::string(name) + ": warps of a warpgroup ask for " +
                                             std::to_string(*all[i]) + " and " +
                                             std::to_string(registers) + " registers");
        int& now = pool.of(group);
        if (increase ? registers < now : registers > now)
            fatal(Finding::misuse, std::string(name) + " to " + std::to_string(registers) +
                                       " registers, from " + std::to_string(now));
        if (increase) return;
        pool.free += (now - registers) * kWarpgroupSize;
        now = registers;
    };
    collective(first, kWarpgroupSize, name, asked, check, false, site);
    if (!increase) return;
    const auto granted = [&pool, group, registers] {
        int& now = pool.of(group);
        const int needed = (registers - now) * kWarpgroupSize;
        if (needed > pool.free) return false;
        pool.free -= needed;
        now = registers;
        return true;
    };
    if (!granted())
        wait_until(granted, "setmaxnreg.inc: " + std::to_string(registers) +
                                " registers a thread, which others have to give back first",
                   site);
}

// The same lane each time, but which one is not promised: the last if threads run in reverse.
bool elect(Site site) {
    const int first = warp() * kWarpSize;
    const int count = std::min(kWarpSize, block_threads() - first);
    collective(first, count, "elect.sync", [] {}, false, site);
    return lane() == (options().order == Order::reverse ? count - 1 : 0);
}

}  // namespace bigops::simt
