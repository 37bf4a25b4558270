#include "grid_races.h"

#include <algorithm>

#include "findings.h"
#include "memory.h"

namespace bigops::simt {

namespace {

void join(std::vector<uint32_t>& into, const std::vector<uint32_t>& from) {
    if (into.size() < from.size()) into.resize(from.size());
    for (size_t i = 0; i < from.size(); ++i) into[i] = std::max(into[i], from[i]);
}

}  // namespace

void GridRaces::tell(uintptr_t address, uint64_t block, const std::vector<uint32_t>& fenced,
                     const BlockClocks& heard) {
    const std::lock_guard lock(mutex_);
    BlockClocks& told = told_[address];
    for (const auto& [other, clock] : heard) join(told[other], clock);
    join(told[block], fenced);
}

void GridRaces::hear(uintptr_t address, BlockClocks& heard) {
    const std::lock_guard lock(mutex_);
    const auto told = told_.find(address);
    if (told == told_.end()) return;
    for (const auto& [block, clock] : told->second) join(heard[block], clock);
}

void GridRaces::begin(uint64_t block, const std::vector<BlockClocks>& heard) {
    mutex_.lock();
    heard_[block] = heard;
}

void GridRaces::end() { mutex_.unlock(); }

uint32_t GridRaces::number(const Touch& touch) {
    if (!(touches_.back() == touch)) touches_.push_back(touch);
    return static_cast<uint32_t>(touches_.size() - 1);
}

// Whether b comes after its block had heard of a.
bool GridRaces::ordered(const Touch& a, const Touch& b) const {
    const BlockClocks& heard = heard_.at(b.block)[b.heard];
    const auto clock = heard.find(a.block);
    return clock != heard.end() && a.agent < clock->second.size() &&
           clock->second[a.agent] >= a.epoch;
}

void GridRaces::touch(uintptr_t address, const Touch& mine) {
    std::unique_ptr<Byte[]>& page = pages_[address / kPage];
    if (!page) page = std::make_unique<Byte[]>(kPage);
    Byte& byte = page[address % kPage];
    const auto meet = [&](uint32_t index) {
        const Touch& other = touches_[index];
        if (index == 0 || other.block == mine.block || (other.atomic && mine.atomic)) return;
        if (!ordered(other, mine) && !ordered(mine, other)) conflict(other, mine, address);
    };
    meet(byte.writer);
    if (mine.write) {
        meet(byte.readers[0]);
        meet(byte.readers[1]);
        byte.writer = number(mine);
        return;
    }
    for (uint32_t& reader : byte.readers) {
        if (reader != 0 && touches_[reader].block != mine.block) continue;
        reader = number(mine);
        return;
    }
}

uint3 GridRaces::index(uint64_t block) const {
    return {static_cast<unsigned>(block % grid_.x), static_cast<unsigned>(block / grid_.x % grid_.y),
            static_cast<unsigned>(block / grid_.x / grid_.y)};
}

void GridRaces::conflict(const Touch& a, const Touch& b, uintptr_t address) const {
    const auto text = [&](const Touch& touch) {
        const uint3 at = index(touch.block);
        return std::string("block (") + std::to_string(at.x) + ", " + std::to_string(at.y) + ", " +
               std::to_string(at.z) + ") " +
               (touch.write ? "writes" : "reads") + " at " +
               place(touch.pc ? reinterpret_cast<const void*>(low_ + touch.pc) : nullptr, low_);
    };
    std::string name = "global memory";
    for (const Region& region : regions())
        if (region.holds(address, 1))
            name = region.name + ", byte " + std::to_string(address - region.low) + " of " +
                   std::to_string(region.high - region.low);
    Found found = {Finding::race, name + ": " + text(a) + ", " + text(b) +
                                      ", with nothing that orders these blocks"};
    found.block = index(b.block);
    add_finding(std::move(found), "blocks" + std::to_string(a.pc) + ' ' + std::to_string(b.pc));
}

}  // namespace bigops::simt
