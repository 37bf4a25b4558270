#include "banks.h"

#include <algorithm>
#include <vector>

#include "findings.h"

namespace bigops::simt {
namespace {

constexpr size_t kBanks = 32, kWord = 4;

}  // namespace

void Banks::access(int thread, uintptr_t address, size_t bytes, const void* pc) {
    Place& place = open_[{pc, thread / kLanes}];
    const int lane = thread % kLanes;
    const uint64_t number = place.next[lane]++;
    while (place.first + place.requests.size() <= number) place.requests.emplace_back();
    Request& request = place.requests[number - place.first];
    request.lanes |= 1u << lane;
    request.bytes = static_cast<uint32_t>(bytes);
    request.addresses[lane] = address;
    while (!place.requests.empty() && place.requests.front().lanes == ~0u) {
        count(place.requests.front(), pc);
        place.requests.pop_front();
        ++place.first;
    }
}

void Banks::count(const Request& request, const void* pc) {
    Passes& passes = places_[pc];
    ++passes.requests;
    const size_t lanes = std::min<size_t>(kLanes, kBanks * kWord / std::max<size_t>(request.bytes, 1));
    for (size_t begin = 0; begin < kLanes; begin += lanes) {
        std::vector<uintptr_t> words[kBanks];
        size_t most = 0;
        for (size_t lane = begin; lane < begin + lanes; ++lane) {
            if (!(request.lanes >> lane & 1)) continue;
            const uintptr_t low = request.addresses[lane] / kWord;
            const uintptr_t high = (request.addresses[lane] + request.bytes - 1) / kWord;
            for (uintptr_t word = low; word <= high; ++word) {
                auto& bank = words[word % kBanks];
                if (std::find(bank.begin(), bank.end(), word) == bank.end()) bank.push_back(word);
                most = std::max(most, bank.size());
            }
        }
        passes.taken += most;
        passes.least += most > 0;
    }
}

void Banks::end(BankTotals& totals) {
    for (auto& [where, place] : open_)
        for (const Request& request : place.requests)
            if (request.lanes != 0) count(request, where.first);
    totals.add(places_);
    open_.clear();
    places_.clear();
}

void BankTotals::add(const std::unordered_map<const void*, Passes>& block) {
    const std::lock_guard lock(mutex_);
    for (const auto& [pc, passes] : block) {
        Passes& all = places_[pc];
        all.requests += passes.requests;
        all.taken += passes.taken;
        all.least += passes.least;
    }
}

void BankTotals::report(uintptr_t module_low) const {
    for (const auto& [pc, passes] : places_) {
        if (passes.taken == passes.least) continue;
        const std::string at = place(pc, module_low);
        add_finding({Finding::bank_conflict,
                     std::to_string(passes.requests) + " accesses of warps to shared memory at " + at +
                         " take " + std::to_string(passes.taken) + " passes instead of " +
                         std::to_string(passes.least)},
                    at);
    }
}

}  // namespace bigops::simt
