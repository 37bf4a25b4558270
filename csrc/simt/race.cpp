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
    read_.assign(static_cast<size_t>(threads), {});
    told_.clear();
    heard_.assign(1, {});
    knows_.assign(width_, 0);
    both_.clear();
    origins_.assign(width_, nullptr);
    busy_.assign(kAgents, false);
    next_agent_ = 0;
    ++generation_;
    if (pages_.size() > kKeptPages) pages_.clear();
    last_ = nullptr;
    more_.clear();
    free_more_.clear();
}

// ---- Clocks

void Races::acquire(const Clock& clock, Agent agent) {
    if (!kRaces || clock.seen.empty()) return;
    join(seen(agent), clock.seen.data(), width_);
    join(async(agent), clock.async.data(), width_);
    uint32_t& knows = knows_[static_cast<size_t>(agent)];
    knows = both(knows, clock.heard);
}

void Races::release(Clock& clock, Agent agent) {
    if constexpr (!kRaces) return;
    clock.seen.resize(width_);
    clock.async.resize(width_);
    join(clock.seen.data(), seen(agent), width_);
    join(clock.async.data(), async(agent), width_);
    clock.heard = both(clock.heard, knows_[static_cast<size_t>(agent)]);
    ++seen(agent)[agent];
}

void Races::barrier(const std::vector<int>& members) {
    if constexpr (!kRaces) return;
    Clock all;
    std::vector<uintptr_t> read;
    for (const int member : members) {
        release(all, member);
        const auto& theirs = read_[static_cast<size_t>(member)];
        read.insert(read.end(), theirs.begin(), theirs.end());
    }
    std::sort(read.begin(), read.end());
    read.erase(std::unique(read.begin(), read.end()), read.end());
    for (const int member : members) {
        const uint32_t epoch = seen(member)[member];
        std::copy(all.seen.begin(), all.seen.end(), seen(member));
        std::copy(all.async.begin(), all.async.end(), async(member));
        seen(member)[member] = epoch;
        knows_[static_cast<size_t>(member)] = all.heard;
        if (!read.empty()) read_[static_cast<size_t>(member)] = read;
    }
}

void Races::proxy_fence(Agent agent) {
    if constexpr (!kRaces) return;
    join(async(agent), seen(agent), width_);
    ++seen(agent)[agent];
}

void Races::fence(Agent agent) {
    if constexpr (!kRaces) return;
    BlockClocks heard;
    for (const uintptr_t address : read_[static_cast<size_t>(agent)]) {
        if (const auto it = told_.find(address); it != told_.end()) acquire(it->second, agent);
        block_->launch().grid_races.hear(address, heard);
    }
    if (!heard.empty()) {
        heard_.push_back(std::move(heard));
        uint32_t& knows = knows_[static_cast<size_t>(agent)];
        knows = both(knows, static_cast<uint32_t>(heard_.size() - 1));
    }
    read_[static_cast<size_t>(agent)].clear();
    fenced_[static_cast<size_t>(agent)] = {};
    release(fenced_[static_cast<size_t>(agent)], agent);
}

void Races::atomic(uintptr_t address, Agent agent, bool writes, bool global) {
    if constexpr (!kRaces) return;
    if (agent >= threads_) return;
    auto& read = read_[static_cast<size_t>(agent)];
    if (std::find(read.begin(), read.end(), address) == read.end()) read.push_back(address);
    const Clock& fenced = fenced_[static_cast<size_t>(agent)];
    if (!writes || fenced.seen.empty()) return;
    Clock& told = told_[address];
    join(told.seen, fenced.seen);
    join(told.async, fenced.async);
    told.heard = both(told.heard, fenced.heard);
    if (global)
        block_->launch().grid_races.tell(address, block_->number(), fenced.seen,
                                         heard_[fenced.heard]);
}

uint32_t Races::both(uint32_t a, uint32_t b) {
    if (a == b || b == 0) return a;
    if (a == 0) return b;
    const auto [it, added] = both_.try_emplace(std::minmax(a, b), 0);
    if (added) {
        BlockClocks all = heard_[a];
        for (const auto& [block, clock] : heard_[b]) join(all[block], clock);
        heard_.push_back(std::move(all));
        it->second = static_cast<uint32_t>(heard_.size() - 1);
    }
    return it->second;
}

void Races::tell(GridRaces& grid) {
    if constexpr (!kRaces) return;
    grid.begin(block_->number(), heard_);
    for (const auto& [number, page] : pages_) {
        if (page.generation != generation_ || !page.global) continue;
        for (size_t i = 0; i < kPage; ++i) {
            const Cell& cell = page.cells[i];
            const auto* pointer = reinterpret_cast<const char*>(number * kPage + i);
            if (cell.generation != generation_ || block_->shared_address(pointer) != 0) continue;
            const auto tell = [&](const Record& record, bool write) {
                if (record.epoch == kNobody) return;
                grid.touch(number * kPage + i,
                           {block_->number(), record.epoch, record.agent, record.atomic, write,
                            record.pc, record.heard});
            };
            tell(cell.write, true);
            tell(cell.read, false);
        }
    }
    grid.end();
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
    knows_[static_cast<size_t>(agent)] = knows_[static_cast<size_t>(parent)];
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

Races::Cell* Races::page(uintptr_t address, bool shared) {
    const uintptr_t number = address / kPage;
    if (!last_ || number != last_page_) {
        last_ = &pages_[number];
        last_page_ = number;
        if (!last_->cells) last_->cells = std::make_unique<Cell[]>(kPage);
        if (last_->generation != generation_) last_->global = false;
        last_->generation = generation_;
    }
    last_->global |= !shared;
    return last_->cells.get();
}

void Races::access(const Access& access, bool shared) {
    if constexpr (!kRaces) return;
    Record mine = {seen(access.agent)[access.agent], static_cast<uint16_t>(access.agent),
                   access.atomic, access.proxy == Proxy::async, 0,
                   knows_[static_cast<size_t>(access.agent)]};
    if (access.pc)
        mine.pc = static_cast<uint32_t>(reinterpret_cast<uintptr_t>(access.pc) -
                                        block_->launch().module.low);
    // Neighbouring bytes mostly have the same history: then what was found out for one holds.
    Cell before = {}, after = {};
    bool known = false;
    for (size_t i = 0; i < access.bytes; ++i) {
        const uintptr_t address = access.address + i;
        Cell& cell = page(address, shared)[address % kPage];
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
        // An atomic access does not make up for a plain one just before it.
        const bool plain = written.agent == mine.agent && written.epoch == mine.epoch &&
                           !written.atomic;
        if (!plain) cell.write = mine;
        return;
    }
    // Readers that this one has seen need not be remembered: who comes after it comes after them.
    const auto passed = [&](const Record& record) {
        const bool covered = record.agent == mine.agent || known[record.agent] >= record.epoch;
        return record.epoch == kNobody || (covered && (record.atomic || !mine.atomic));
    };
    if (passed(cell.read) && cell.more == 0) {
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
    // Sorted by agent, and looked through seldom: a table may be read by all threads many times.
    std::vector<Record>& readers = more_[cell.more - 1];
    const auto at = std::lower_bound(readers.begin(), readers.end(), mine, [](auto& a, auto& b) {
        return a.agent < b.agent;
    });
    if (at != readers.end() && at->agent == mine.agent) {
        if (passed(*at)) *at = mine;
        return;
    }
    const bool look = (readers.size() & (readers.size() + 1)) == 0;
    readers.insert(at, mine);
    if (!look) return;
    std::erase_if(readers, [&](const Record& r) { return r.agent != mine.agent && passed(r); });
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
