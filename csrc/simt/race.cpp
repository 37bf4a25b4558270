#include "race.h"

#include <algorithm>
#include <cstring>

#include "block.h"
#include "findings.h"

namespace bigops::simt {
namespace {

// More pages than these are given back between blocks.
constexpr size_t kKeptPages = 512;

void join(uint32_t* into, const uint32_t* from, size_t n) {
    for (size_t i = 0; i < n; ++i) into[i] = std::max(into[i], from[i]);
}

void join(std::vector<uint32_t>& into, const std::vector<uint32_t>& from) {
    if (from.empty()) return;
    into.resize(from.size());
    join(into.data(), from.data(), from.size());
}

}  // namespace

void Races::start(Block& block, int threads) {
    if constexpr (!kRaces) return;
    block_ = &block;
    threads_ = threads;
    width_ = static_cast<size_t>(threads + kAgents);
    seen_.assign(width_ * width_, 0);
    async_.assign(width_ * width_, 0);
    for (size_t i = 0; i < width_; ++i) seen_[i * width_ + i] = 1;
    fenced_.assign(static_cast<size_t>(threads), {});
    pending_.assign(static_cast<size_t>(threads), {});
    atomics_.clear();
    origins_.assign(width_, nullptr);
    busy_.assign(kAgents, false);
    next_agent_ = 0;
    ++generation_;
    if (pages_.size() > kKeptPages) pages_.clear();
    last_cells_ = nullptr;
    more_.clear();
    free_more_.clear();
}

// ---- Clocks

void Races::acquire(const Clock& clock, Agent agent) {
    if (!kRaces || clock.seen.empty()) return;
    join(seen(agent), clock.seen.data(), width_);
    join(async(agent), clock.async.data(), width_);
}

void Races::release(Clock& clock, Agent agent) {
    if constexpr (!kRaces) return;
    clock.seen.resize(width_);
    clock.async.resize(width_);
    join(clock.seen.data(), seen(agent), width_);
    join(clock.async.data(), async(agent), width_);
    ++seen(agent)[agent];
}

void Races::barrier(const std::vector<int>& members) {
    if constexpr (!kRaces) return;
    Clock all;
    Clock pending;
    for (const int member : members) {
        release(all, member);
        const Clock& theirs = pending_[static_cast<size_t>(member)];
        join(pending.seen, theirs.seen);
        join(pending.async, theirs.async);
    }
    for (const int member : members) {
        const uint32_t epoch = seen(member)[member];
        std::copy(all.seen.begin(), all.seen.end(), seen(member));
        std::copy(all.async.begin(), all.async.end(), async(member));
        seen(member)[member] = epoch;
        if (!pending.seen.empty()) pending_[static_cast<size_t>(member)] = pending;
    }
}

void Races::proxy_fence(Agent agent) {
    if constexpr (!kRaces) return;
    join(async(agent), seen(agent), width_);
    ++seen(agent)[agent];
}

void Races::fence(Agent agent) {
    if constexpr (!kRaces) return;
    Clock& pending = pending_[static_cast<size_t>(agent)];
    acquire(pending, agent);
    pending = {};
    fenced_[static_cast<size_t>(agent)] = {};
    release(fenced_[static_cast<size_t>(agent)], agent);
}

void Races::atomic(uintptr_t address, Agent agent) {
    if constexpr (!kRaces) return;
    if (agent >= threads_) return;
    Clock& clock = atomics_[address];
    Clock& pending = pending_[static_cast<size_t>(agent)];
    join(pending.seen, clock.seen);
    join(pending.async, clock.async);
    const Clock& fenced = fenced_[static_cast<size_t>(agent)];
    join(clock.seen, fenced.seen);
    join(clock.async, fenced.async);
}

Agent Races::fork(Agent parent, const void* pc) {
    if constexpr (!kRaces) return parent;
    // The next in turn that is done; if none is, one that is not: it loses its name, no more.
    int slot = next_agent_;
    for (int i = 0; i < kAgents; ++i, slot = (slot + 1) % kAgents)
        if (!busy_[static_cast<size_t>(slot)]) break;
    next_agent_ = (slot + 1) % kAgents;
    busy_[static_cast<size_t>(slot)] = true;
    const Agent agent = threads_ + slot;
    const uint32_t epoch = seen(agent)[agent] + 1;
    std::copy_n(seen(parent), width_, seen(agent));
    std::copy_n(async(parent), width_, async(agent));
    seen(agent)[agent] = epoch;
    ++seen(parent)[parent];
    origins_[static_cast<size_t>(agent)] = pc;
    return agent;
}

void Races::end(Agent agent) {
    if (kRaces && agent >= threads_) busy_[static_cast<size_t>(agent - threads_)] = false;
}

const void* Races::origin(Agent agent) const {
    return kRaces && agent >= threads_ ? origins_[static_cast<size_t>(agent)] : nullptr;
}

// ---- Accesses

Races::Cell* Races::page(uintptr_t address) {
    const uintptr_t number = address / kPage;
    if (!last_cells_ || number != last_page_) {
        Page& page = pages_[number];
        if (!page) page = std::make_unique<Cell[]>(kPage);
        last_cells_ = page.get();
        last_page_ = number;
    }
    return last_cells_;
}

void Races::access(const Access& access, bool shared) {
    if constexpr (!kRaces) return;
    Record mine = {seen(access.agent)[access.agent], static_cast<uint16_t>(access.agent),
                   access.atomic, access.proxy == Proxy::async, 0};
    if (access.pc)
        mine.pc = static_cast<uint32_t>(reinterpret_cast<uintptr_t>(access.pc) -
                                        block_->launch().module.low);
    // Neighbouring bytes mostly have the same history: then what was found out for one holds.
    Cell before = {}, after = {};
    bool known = false;
    for (size_t i = 0; i < access.bytes; ++i) {
        const uintptr_t address = access.address + i;
        Cell& cell = page(address)[address % kPage];
        if (cell.generation != generation_) cell = {.write = {}, .read = {}, .more = 0,
                                                    .generation = generation_};
        if (known && cell.more == 0 && !memcmp(&cell, &before, sizeof cell)) {
            cell = after;
            continue;
        }
        before = cell;
        touch(cell, address, access, mine, shared);
        after = cell;
        known = before.more == 0 && after.more == 0;
    }
}

void Races::touch(Cell& cell, uintptr_t address, const Access& access, const Record& mine,
                  bool shared) {
    const uint32_t* known = seen(access.agent);
    const auto unseen = [&](const Record& record) {
        return record.epoch != kNobody && known[record.agent] < record.epoch &&
               !(record.atomic && access.atomic);
    };
    const Record& written = cell.write;
    if (unseen(written)) {
        conflict(written, true, address, access, false);
    } else if (written.epoch != kNobody && mine.async && !written.async &&
               async(access.agent)[written.agent] < written.epoch) {
        conflict(written, true, address, access, true);
    } else if (!access.write && shared && written.epoch == kNobody) {
        const std::string at = place(access.pc, block_->launch().module.low);
        Found found = {Finding::never_written, block_->describe(address) + " is read by " +
                                                   who(access.agent) + " at " + at +
                                                   ", but nothing was written there"};
        found.block = block_->context.block;
        found.thread = block_->context.thread;
        add_finding(std::move(found), at);
    }
    if (access.write) {
        if (unseen(cell.read)) conflict(cell.read, false, address, access, false);
        if (cell.more != 0) {
            for (const Record& reader : more_[cell.more - 1])
                if (unseen(reader)) conflict(reader, false, address, access, false);
            more_[cell.more - 1].clear();
            free_more_.push_back(cell.more);
            cell.more = 0;
        }
        cell.read = {};
        cell.write = mine;
        return;
    }
    // Readers that this one has seen need not be remembered: who comes after it comes after them.
    const auto passed = [&](const Record& record) {
        return record.epoch == kNobody || record.agent == mine.agent ||
               (known[record.agent] >= record.epoch && record.atomic == mine.atomic);
    };
    if (cell.more != 0) std::erase_if(more_[cell.more - 1], passed);
    if (passed(cell.read)) {
        cell.read = mine;
        return;
    }
    if (cell.more == 0) {
        if (free_more_.empty()) {
            more_.emplace_back();
            cell.more = static_cast<uint32_t>(more_.size());
        } else {
            cell.more = free_more_.back();
            free_more_.pop_back();
        }
    }
    more_[cell.more - 1].push_back(mine);
}

std::string Races::who(Agent agent) const {
    if (agent < threads_) return "thread " + std::to_string(agent);
    return "asynchronous work";
}

void Races::conflict(const Record& other, bool other_writes, uintptr_t address,
                     const Access& access, bool fence) {
    const uintptr_t low = block_->launch().module.low;
    const std::string here = place(access.pc, low);
    const std::string there =
        place(other.pc ? reinterpret_cast<const void*>(low + other.pc) : nullptr, low);
    Found found = {fence ? Finding::missing_fence : Finding::race, block_->describe(address) + ": " +
                       who(other.agent) + (other_writes ? " writes" : " reads") + " at " + there +
                       ", " + who(access.agent) + (access.write ? " writes" : " reads") + " at " +
                       here +
                       (fence ? " through the async proxy, with no fence.proxy.async between"
                              : ", with nothing that orders them")};
    found.block = block_->context.block;
    found.thread = block_->context.thread;
    add_finding(std::move(found), there + here + (other_writes ? "w" : "r"));
}

}  // namespace bigops::simt
