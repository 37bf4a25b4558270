#include "memory.h"

#include <link.h>

#include <algorithm>
#include <mutex>

extern "C" void* __tls_get_addr(void*);

namespace bigops::simt {
namespace {

std::mutex mutex;
std::vector<Region> known;

}  // namespace

void add_region(const void* low, size_t bytes, std::string name) {
    const auto address = reinterpret_cast<uintptr_t>(low);
    const std::lock_guard lock(mutex);
    known.push_back({address, address + bytes, std::move(name)});
}

void remove_region(const void* low) {
    const std::lock_guard lock(mutex);
    const auto it = std::find_if(known.rbegin(), known.rend(), [&](const Region& region) {
        return region.low == reinterpret_cast<uintptr_t>(low);
    });
    if (it != known.rend()) known.erase(std::next(it).base());
}

std::vector<Region> regions() {
    std::vector<Region> sorted, joined;
    {
        const std::lock_guard lock(mutex);
        sorted = known;
    }
    std::stable_sort(sorted.begin(), sorted.end(),
                     [](const Region& a, const Region& b) { return a.low < b.low; });
    for (Region& region : sorted) {
        if (!joined.empty() && region.low < joined.back().high)
            joined.back().high = std::max(joined.back().high, region.high);
        else joined.push_back(std::move(region));
    }
    return joined;
}

Module module_of(const void* code) {
    struct Search {
        uintptr_t code;
        Module found;
    } search = {reinterpret_cast<uintptr_t>(code), {}};
    dl_iterate_phdr(
        [](dl_phdr_info* info, size_t, void* data) {
            auto& search = *static_cast<Search*>(data);
            Module module;
            module.low = UINTPTR_MAX;
            for (int i = 0; i < info->dlpi_phnum; ++i) {
                const ElfW(Phdr)& header = info->dlpi_phdr[i];
                if (header.p_type == PT_LOAD) {
                    const uintptr_t low = info->dlpi_addr + header.p_vaddr;
                    module.low = std::min<uintptr_t>(module.low, low);
                    module.high = std::max<uintptr_t>(module.high, low + header.p_memsz);
                } else if (header.p_type == PT_TLS) {
                    module.tls_id = info->dlpi_tls_modid;
                    module.tls_bytes = header.p_memsz;
                }
            }
            if (search.code < module.low || search.code >= module.high) return 0;
            search.found = module;
            return 1;
        },
        &search);
    return search.found;
}

char* tls_block(const Module& module) {
    if (module.tls_bytes == 0) return nullptr;
    size_t index[2] = {module.tls_id, 0};
    return static_cast<char*>(__tls_get_addr(index));
}

}  // namespace bigops::simt
