// A launch: its blocks on as many OS threads as there are cores.
#include <sched.h>

#include <algorithm>
#include <stdexcept>
#include <thread>

#include "block.h"

namespace bigops::simt {
namespace {

// Stacks, shared memory and clocks are large: blocks are kept for the next launch.
std::mutex mutex;
std::vector<std::unique_ptr<Block>> idle;

std::unique_ptr<Block> take_block() {
    const std::lock_guard lock(mutex);
    if (idle.empty()) return std::make_unique<Block>();
    auto block = std::move(idle.back());
    idle.pop_back();
    return block;
}

void give_back(std::unique_ptr<Block> block) {
    const std::lock_guard lock(mutex);
    idle.push_back(std::move(block));
}

int cores() {
    cpu_set_t set;
    return sched_getaffinity(0, sizeof set, &set) == 0 ? CPU_COUNT(&set) : 1;
}

void require(bool condition, const std::string& message) {
    if (!condition) throw std::invalid_argument("launch: " + message);
}

void run_blocks(Launch& launch) {
    auto block = take_block();
    const dim3 grid = launch.shape.grid;
    const uint64_t plane = static_cast<uint64_t>(grid.x) * grid.y;
    const uint64_t count = plane * grid.z;
    while (!launch.stopped) {
        const uint64_t i = launch.next_block++;
        if (i >= count) break;
        block->run(launch, {static_cast<unsigned>(i % grid.x),
                            static_cast<unsigned>(i % plane / grid.x),
                            static_cast<unsigned>(i / plane)});
    }
    give_back(std::move(block));
}

}  // namespace

void run(const void* kernel, const Shape& shape, const void* own, size_t own_bytes,
         FunctionRef<void()> call) {
    require(!in_kernel(), "a kernel cannot launch another");
    const uint64_t threads = static_cast<uint64_t>(shape.block.x) * shape.block.y * shape.block.z;
    const uint64_t blocks = static_cast<uint64_t>(shape.grid.x) * shape.grid.y * shape.grid.z;
    require(threads >= 1 && threads <= kMaxThreads,
            "a block has 1 to 1024 threads, not " + std::to_string(threads));
    require(blocks >= 1 && shape.grid.y <= 65535 && shape.grid.z <= 65535 &&
                shape.grid.x <= 2147483647,
            "a grid has at least one block, at most 2147483647 x 65535 x 65535");
    const Module module = module_of(kernel);
    Launch launch = {shape, module, regions(), {}, call, GridRaces(module.low, shape.grid), {}};
    require(shape.shared_bytes + launch.module.tls_bytes <= kMaxShared,
            "a block has at most " + std::to_string(kMaxShared) + " bytes of shared memory, not " +
                std::to_string(shape.shared_bytes + launch.module.tls_bytes));
    launch.own.low = reinterpret_cast<uintptr_t>(own);
    launch.own.high = launch.own.low + own_bytes;
    const int wanted = options().workers > 0 ? options().workers : cores();
    const auto workers = static_cast<int>(std::min<uint64_t>(static_cast<uint64_t>(wanted), blocks));
    std::vector<std::thread> others;
    for (int i = 1; i < workers; ++i) others.emplace_back(run_blocks, std::ref(launch));
    run_blocks(launch);
    for (std::thread& other : others) other.join();
    launch.bank_totals.report(module.low);
}

}  // namespace bigops::simt
