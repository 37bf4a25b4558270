// Every access that is checked comes through here: the kernel's own in the race build (hooks that
// GCC's -fsanitize=thread calls; this is not libtsan, of which nothing is linked), and those of the
// instructions in every build.
#include <cstring>

#include "block.h"
#include "findings.h"
#include "words.h"

namespace bigops::simt {
namespace {

void check(Block& block, const Access& access) {
    const Block::Space space = block.space(access.address, access.bytes);
    if (space == Block::Space::own) return;
    if (space == Block::Space::forbidden)
        fatal(Finding::out_of_bounds, std::string(access.write ? "writing " : "reading ") +
                                          std::to_string(access.bytes) + " bytes out of bounds: " +
                                          block.describe(access.address));
    block.races().access(access, space == Block::Space::shared);
    if (options().bank_conflicts && space == Block::Space::shared &&
        access.proxy == Proxy::generic && access.agent < block.size())
        block.banks().access(access.agent, access.address, access.bytes, access.pc);
}

void instruction(const void* pointer, size_t bytes, bool write, bool atomic, Agent agent,
                 Proxy proxy) {
    Block* block = Block::current();
    if (!block || bytes == 0) return;
    const void* origin = block->races().origin(agent);
    check(*block, {reinterpret_cast<uintptr_t>(pointer), bytes, write, atomic, agent, proxy,
                   origin ? origin : block->kernel_pc()});
}

void require_aligned(const void* pointer, size_t bytes) {
    if (reinterpret_cast<uintptr_t>(pointer) % bytes != 0)
        fatal(Finding::misaligned, "an atomic access of " + std::to_string(bytes) +
                                       " bytes at an address that is no multiple of them");
}

void order_atomic(Block& block, const void* pointer, size_t bytes, Agent agent, bool writes) {
    const auto address = reinterpret_cast<uintptr_t>(pointer);
    block.races().atomic(address, agent, writes,
                         block.space(address, bytes) == Block::Space::global);
}

}  // namespace

void read(const void* pointer, size_t bytes, Agent agent, Proxy proxy) {
    instruction(pointer, bytes, false, false, agent, proxy);
}

void write(void* pointer, size_t bytes, Agent agent, Proxy proxy) {
    instruction(pointer, bytes, true, false, agent, proxy);
}

void atomic(void* pointer, size_t bytes, Agent agent, Proxy proxy) {
    require_aligned(pointer, bytes);
    Block* block = Block::current();
    if (block && agent == block->now()) block->maybe_yield();
    instruction(pointer, bytes, true, true, agent, proxy);
    if (block) order_atomic(*block, pointer, bytes, agent, true);
}

void atomic_sum(void* pointer, size_t bytes, Agent agent, Proxy proxy) {
    require_aligned(pointer, bytes);
    instruction(pointer, bytes, true, !options().same_bits, agent, proxy);
}

bool compare_exchange(void* pointer, void* expected, const void* desired, size_t bytes) {
    const auto swap = [&]<class T>(T) {
        T next;
        memcpy(&next, desired, sizeof next);
        return __atomic_compare_exchange_n(static_cast<T*>(pointer), static_cast<T*>(expected), next,
                                           false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);
    };
    switch (bytes) {
        case 1: return swap(uint8_t());
        case 2: return swap(uint16_t());
        case 4: return swap(uint32_t());
        case 8: return swap(uint64_t());
        default: fatal(Finding::misuse, "no atomic access has this size");
    }
}

void acquire(const Clock& clock) { Block::current()->races().acquire(clock, self()); }
void acquire(const Clock& clock, Agent agent) { Block::current()->races().acquire(clock, agent); }
void release(Clock& clock) { Block::current()->races().release(clock, self()); }
void release(Clock& clock, Agent agent) { Block::current()->races().release(clock, agent); }
void copy_clock(Clock& clock) {
    clock = {};
    release(clock);
}
Agent fork_agent() {
    Block& block = *Block::current();
    return block.races().fork(block.now(), block.kernel_pc());
}
void join_agent(Agent agent) {
    Clock clock;
    release(clock, agent);
    acquire(clock);
}
void end_agent(Agent agent) { Block::current()->races().end(agent); }
void proxy_fence() { Block::current()->races().proxy_fence(self()); }
void fence() { Block::current()->races().fence(self()); }

#ifdef BIGOPS_SIMT_RACE

namespace {

enum class Aligned : bool { no, yes };

inline __attribute__((always_inline)) void hook(void* pointer, size_t bytes, bool write,
                                                Aligned aligned, bool strong, const void* pc) {
    Block* block = Block::current();
    if (!block || block->thread().quiet > 0) return;
    const auto address = reinterpret_cast<uintptr_t>(pointer);
    if (aligned == Aligned::yes && address % bytes != 0 &&
        block->space(address, 1) != Block::Space::own)
        fatal(Finding::misaligned, std::string(write ? "writing " : "reading ") +
                                       std::to_string(bytes) +
                                       " bytes at an address that is no multiple of them: " +
                                       block->describe(address));
    if (strong) block->maybe_yield();
    check(*block, {address, bytes, write, strong, block->now(), Proxy::generic, pc});
    if (strong) order_atomic(*block, pointer, bytes, block->now(), write);
}

}  // namespace

#define BIGOPS_PC __builtin_return_address(0)
#define BIGOPS_HOOKS(SIZE)                                                                      \
    void __tsan_read##SIZE(void* p) { hook(p, SIZE, false, Aligned::yes, false, BIGOPS_PC); }   \
    void __tsan_write##SIZE(void* p) { hook(p, SIZE, true, Aligned::yes, false, BIGOPS_PC); }   \
    void __tsan_unaligned_read##SIZE(void* p) {                                                 \
        hook(p, SIZE, false, Aligned::no, false, BIGOPS_PC);                                    \
    }                                                                                           \
    void __tsan_unaligned_write##SIZE(void* p) {                                                \
        hook(p, SIZE, true, Aligned::no, false, BIGOPS_PC);                                     \
    }                                                                                           \
    void __tsan_volatile_read##SIZE(void* p) {                                                  \
        hook(p, SIZE, false, Aligned::yes, true, BIGOPS_PC);                                    \
    }                                                                                           \
    void __tsan_volatile_write##SIZE(void* p) {                                                 \
        hook(p, SIZE, true, Aligned::yes, true, BIGOPS_PC);                                     \
    }                                                                                           \
    void __tsan_unaligned_volatile_read##SIZE(void* p) {                                        \
        hook(p, SIZE, false, Aligned::no, true, BIGOPS_PC);                                     \
    }                                                                                           \
    void __tsan_unaligned_volatile_write##SIZE(void* p) {                                       \
        hook(p, SIZE, true, Aligned::no, true, BIGOPS_PC);                                      \
    }

extern "C" {
BIGOPS_HOOKS(1)
BIGOPS_HOOKS(2)
BIGOPS_HOOKS(4)
BIGOPS_HOOKS(8)
BIGOPS_HOOKS(16)
void __tsan_read_range(void* p, size_t n) { hook(p, n, false, Aligned::no, false, BIGOPS_PC); }
void __tsan_write_range(void* p, size_t n) { hook(p, n, true, Aligned::no, false, BIGOPS_PC); }
void __tsan_vptr_update(void**, void*) {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_init() {}

// Kernels are linked with --wrap for these: GCC leaves them to libtsan.
void* __wrap_memcpy(void* to, const void* from, size_t n) {
    if (n > 0) {
        hook(const_cast<void*>(from), n, false, Aligned::no, false, BIGOPS_PC);
        hook(to, n, true, Aligned::no, false, BIGOPS_PC);
    }
    return memcpy(to, from, n);
}
void* __wrap_memmove(void* to, const void* from, size_t n) {
    if (n > 0) {
        hook(const_cast<void*>(from), n, false, Aligned::no, false, BIGOPS_PC);
        hook(to, n, true, Aligned::no, false, BIGOPS_PC);
    }
    return memmove(to, from, n);
}
void* __wrap_memset(void* to, int value, size_t n) {
    if (n > 0) hook(to, n, true, Aligned::no, false, BIGOPS_PC);
    return memset(to, value, n);
}
}

#endif

}  // namespace bigops::simt
