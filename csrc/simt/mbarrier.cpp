// mbarriers: "Phases of the mbarrier object", "Tracking asynchronous operations by the mbarrier object". The
// state is kept beside shared memory, where a mark stands instead: whoever overwrites it is found.
#include <cstring>
#include <string>
#include <unordered_map>

#include "block.h"
#include "instructions.h"

namespace bigops::simt {
namespace {

constexpr uint64_t kMark = 0x6d62617272696572;  // "mbarrier"
constexpr uint32_t kMaxCount = (1 << 20) - 1;
constexpr int64_t kMaxBytes = (1 << 20) - 1;

struct Barrier {
    uint32_t count = 0, pending = 0;
    int64_t bytes = 0;   // announced less come
    uint64_t phase = 0;  // complete ones
    Agent owner = 0;     // who initialised it
    bool fenced = false;
    Clock arriving, done;

    void settle() {
        if (pending > 0 || bytes != 0) return;
        ++phase;
        pending = count;
        done = std::exchange(arriving, {});
    }
    std::string state() const {
        std::string text = std::to_string(count - pending) + " of " + std::to_string(count) +
                           " arrivals";
        if (bytes != 0) text += ", " + std::to_string(bytes) + " bytes to come";
        return text;
    }
};

struct Barriers {
    std::unordered_map<const void*, Barrier> all;
};

std::string name(const void* barrier) {
    return "mbarrier at " + Block::current()->describe(reinterpret_cast<uintptr_t>(barrier));
}

Barrier& find(uint64_t* barrier, Agent agent) {
    require_shared(barrier, sizeof *barrier, "mbarrier");
    // Not as an atomic access, which the next one would hide: only who initialises it writes.
    read(barrier, 1, agent, Proxy::generic);
    auto& all = block_state<Barriers>().all;
    const auto it = all.find(barrier);
    if (it == all.end()) fatal(Finding::misuse, name(barrier) + " was not initialised");
    if (*barrier != kMark)
        fatal(Finding::misuse, name(barrier) + " was overwritten by ordinary stores");
    return it->second;
}

void expect(Barrier& barrier, uint64_t* at, uint32_t bytes) {
    barrier.bytes += bytes;
    if (barrier.bytes > kMaxBytes)
        fatal(Finding::misuse, name(at) + " expects " + std::to_string(barrier.bytes) +
                                   " bytes: a phase counts up to 2^20 - 1");
}

}  // namespace

void mbarrier_init(uint64_t* barrier, uint32_t count) {
    require_shared(barrier, sizeof *barrier, "mbarrier.init");
    if (count < 1 || count > kMaxCount)
        fatal(Finding::misuse, "mbarrier.init with a count of " + std::to_string(count) +
                                   ": must be 1 to 2^20 - 1");
    write(barrier, sizeof *barrier, self(), Proxy::generic);
    Barrier fresh;
    fresh.count = fresh.pending = count;
    fresh.owner = self();
    auto& all = block_state<Barriers>().all;
    if (all.contains(barrier) && *barrier == kMark)
        fatal(Finding::misuse, name(barrier) + " is initialised again without mbarrier.inval");
    all[barrier] = fresh;
    std::memcpy(barrier, &kMark, sizeof kMark);
}

void fence_mbarrier_init() {
    for (auto& [at, barrier] : block_state<Barriers>().all)
        if (barrier.owner == self()) barrier.fenced = true;
}

void fence_proxy_async() {
    for (auto& [at, barrier] : block_state<Barriers>().all) barrier.fenced = true;
    proxy_fence();
}

void mbarrier_arrive(uint64_t* at, uint32_t expected_bytes) {
    Barrier& barrier = find(at, self());
    expect(barrier, at, expected_bytes);
    if (barrier.pending == 0)
        fatal(Finding::misuse, name(at) + ": more than its " + std::to_string(barrier.count) +
                                   " arrivals in one phase");
    --barrier.pending;
    release(barrier.arriving);
    barrier.settle();
}

void mbarrier_wait(uint64_t* at, uint32_t parity, Site site) {
    Barrier& barrier = find(at, self());
    if (parity > 1)
        fatal(Finding::misuse, "mbarrier.try_wait.parity of " + std::to_string(parity) +
                                   ": must be 0 or 1");
    const auto over = [&] { return (barrier.phase & 1) != parity; };
    if (!over()) {
        const std::string what = name(at) + ", parity " + std::to_string(parity) + ": ";
        const auto ready = [&] {
            if (over()) return true;
            // What is missing, for the report, should this have been the last that could be done.
            if (!tma_loads_pending()) Block::current()->thread().what = what + barrier.state();
            return false;
        };
        wait_until(ready, what, site);
    }
    acquire(barrier.done);
}

void check_mbarrier(uint64_t* at) {
    if (!find(at, self()).fenced)
        report(Finding::missing_fence,
               name(at) + " was initialised, but no fence.mbarrier_init shows it to the async proxy");
}

void mbarrier_complete_bytes(uint64_t* at, uint32_t bytes, Agent agent) {
    Barrier& barrier = find(at, agent);
    barrier.bytes -= bytes;
    if (barrier.bytes < 0 && barrier.pending == 0)
        fatal(Finding::misuse, name(at) + ": " + std::to_string(-barrier.bytes) +
                                   " bytes more have come than were expected");
    release(barrier.arriving, agent);
    barrier.settle();
}

}  // namespace bigops::simt
