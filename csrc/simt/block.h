// One block on one OS thread: its fibers, where they meet, and its memory.
#pragma once

#include <atomic>
#include <chrono>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <random>

#include "banks.h"
#include "core.h"
#include "fiber.h"
#include "grid_races.h"
#include "memory.h"
#include "race.h"

namespace bigops::simt {

constexpr size_t kMaxShared = 227 * 1024;
constexpr int kMaxThreads = 1024;
constexpr int kWarpSize = 32;

// In which order threads run when several can: a bug may need another than 0, 1, 2, ...
enum class Order : int { forward, reverse, shuffled };

struct Options {
    Order order = Order::forward;
    uint64_t seed = 0;
    int workers = 0;  // OS threads; 0: as many as cores
    bool bank_conflicts = false;
    bool same_bits = false;  // see atomic_sum
    double patience = 10;  // seconds in which all threads of a block may do nothing but poll
};
Options& options();

// What all blocks of one launch share.
struct Launch {
    const Shape& shape;
    Module module;
    std::vector<Region> regions;
    Region own;  // the arguments
    FunctionRef<void()> call;
    GridRaces grid_races;
    BankTotals bank_totals;
    std::atomic<uint64_t> next_block = 0;
    std::atomic<bool> stopped = false;
};

enum class State : uint8_t { runnable, polling, meeting, waiting, exited };

struct Thread {
    Resume resume;
    uint3 index;
    State state = State::runnable;
    int quiet = 0;
    // What it waits for, where.
    const char* key = nullptr;
    std::string what;
    Site site;
    const void* pc = nullptr;
    FunctionRef<bool()> ready;
};

struct Meeting {
    int first, count, arrived = 0;
    uint32_t mask;
    const char* key;
    Site site;
    bool order, body;
    int opener;
    std::vector<void*> operands;
    std::vector<bool> here;

    bool member(int thread) const {
        const int i = thread - first;
        return i >= 0 && i < count && (count > kWarpSize || (mask >> i & 1));
    }
};

class Block {
public:
    Block();
    ~Block();

    Context context;  // first: its address is the block's, for bigops_simt_context
    // Runs one block of the launch to its end, or until a fatal finding.
    void run(Launch& launch, uint3 index);

    static Block* current();
    Thread& thread() { return threads_[static_cast<size_t>(now_)]; }
    int now() const { return now_; }
    int size() const { return size_; }
    bool exited(int thread) const { return threads_[static_cast<size_t>(thread)].state == State::exited; }
    Launch& launch() { return *launch_; }
    uint64_t number() const;  // in the grid
    Races& races() { return races_; }
    Banks& banks() { return banks_; }

    void meet(int first, int count, uint32_t mask, const char* key, void* operand,
              FunctionRef<void(void* const*)> body, bool order, Site site);
    void wait_until(FunctionRef<bool()> ready, std::string_view what, Site site);
    void yield();
    // At an atomic access: a thread that makes nothing but these may be waiting for another.
    void maybe_yield() {
        if (on_fiber_ && !in_body_ && ++atomics_ % kAtomicsInARow == 0) yield();
    }
    [[noreturn]] void stop();

    std::vector<std::function<bool()>> idle_hooks;
    std::vector<std::function<void()>> done_hooks;
    void* object(std::type_index type, void* (*make)(), void (*destroy)(void*));

    // Memory.
    char* dynamic() const { return dynamic_; }
    uint32_t shared_address(const void* pointer) const;
    void* shared_pointer(uint32_t address) const;
    // What an access is to: of nobody's interest (stacks, arguments), shared, global, or forbidden.
    enum class Space { own, shared, global, forbidden };
    Space space(uintptr_t address, size_t bytes);
    std::string describe(uintptr_t address) const;
    // The return address nearest to here that lies in the kernel's shared object.
    const void* kernel_pc() const;

private:
    struct Stopped {};

    static void entry();
    void resume(int thread);
    void leave();  // the running thread's fiber, until resumed
    void run_threads();
    bool poll();
    void deadlock();
    void lose_patience();
    void exit_thread();
    void finish(size_t meeting, FunctionRef<void(void* const*)> body);
    void make_ready(int thread);
    int next_thread();
    void check_members(Meeting& meeting);
    [[noreturn]] void disagree(const std::string& message);
    std::string where(const Thread& thread) const;

    Launch* launch_ = nullptr;
    int size_ = 0, now_ = -1, alive_ = 0;
    bool on_fiber_ = false, in_body_ = false;
    std::vector<Thread> threads_;
    std::vector<Meeting> meetings_;
    std::deque<int> ready_;
    std::minstd_rand random_;
    static constexpr int kAtomicsInARow = 64;
    unsigned atomics_ = 0;
    int polls_ = 0;  // since anything else has happened
    std::chrono::steady_clock::time_point first_poll_;
    Resume scheduler_;
    Stacks stacks_;
    struct Object {
        void* object;
        void (*destroy)(void*);
    };
    std::map<std::type_index, Object> objects_;

    char* dynamic_ = nullptr;
    char* static_ = nullptr;
    size_t dynamic_bytes_ = 0, static_bytes_ = 0;
    uint32_t static_window_ = 0, dynamic_window_ = 0;
    const Region* last_region_ = nullptr;
    Races races_;
    Banks banks_;
};

}  // namespace bigops::simt
