#include "findings.h"

#include <cinttypes>
#include <cstdio>
#include <map>
#include <mutex>

#include "block.h"

namespace bigops::simt {
namespace {

std::mutex mutex;
std::vector<Found> all;
std::map<std::string, size_t> places;
uint64_t times = 0;

}  // namespace

void add_finding(Found found, const std::string& key) {
    const std::lock_guard lock(mutex);
    const auto [it, added] =
        places.try_emplace(std::to_string(static_cast<int>(found.kind)) + key, all.size());
    if (added) all.push_back(std::move(found));
    else ++all[it->second].times;
    Block* block = Block::current();
    if (++times >= kEnough && block) block->launch().stopped = true;
}

std::vector<Found> take_findings() {
    const std::lock_guard lock(mutex);
    places.clear();
    times = 0;
    return std::exchange(all, {});
}

std::string place(const void* pc, uintptr_t module_low) {
    if (!pc) return "an unknown line";
    char text[32];
    // A return address is that of the next instruction.
    snprintf(text, sizeof text, "{%" PRIxPTR "}", reinterpret_cast<uintptr_t>(pc) - module_low - 1);
    return text;
}

void report(Finding kind, const std::string& message) {
    Found found = {kind, message};
    if (Block* block = Block::current()) {
        const std::string at = place(block->kernel_pc(), block->launch().module.low);
        found.message += ", at " + at;
        found.block = block->context.block;
        found.thread = block->context.thread;
        add_finding(std::move(found), at);
    } else {
        add_finding(std::move(found), message);
    }
}

void fatal(Finding kind, const std::string& message) {
    report(kind, message);
    Block::current()->stop();
}

}  // namespace bigops::simt
