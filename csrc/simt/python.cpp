#include "python.h"

#include <exception>
#include <string>

#include "block.h"
#include "findings.h"

using namespace bigops::simt;

const char* bigops_simt_run(const BigopsSimtLaunch* launch) {
    static std::string error;
    options() = {static_cast<Order>(launch->order), launch->seed,
                 static_cast<int>(launch->workers), launch->bank_conflicts != 0,
                 launch->same_bits != 0, launch->patience};
    try {
        auto call = [&] { invoke(launch->function, launch->registers); };
        if (launch->kernel == 0) {
            call();
        } else {
            const Shape shape = {dim3(launch->grid[0], launch->grid[1], launch->grid[2]),
                                 dim3(launch->block[0], launch->block[1], launch->block[2]),
                                 launch->shared_bytes};
            run(launch->function, shape, launch, sizeof *launch, call);
        }
    } catch (const std::exception& thrown) {
        error = thrown.what();
        return error.c_str();
    }
    return nullptr;
}

void bigops_simt_add_region(const void* low, size_t bytes, const char* name) {
    add_region(low, bytes, name);
}

void bigops_simt_remove_region(const void* low) { remove_region(low); }

const char* bigops_simt_take_findings() {
    static std::string text;
    text.clear();
    for (const Found& found : take_findings()) {
        for (const uint64_t field :
             {static_cast<uint64_t>(found.kind), uint64_t{found.block.x}, uint64_t{found.block.y},
              uint64_t{found.block.z}, uint64_t{found.thread.x}, uint64_t{found.thread.y},
              uint64_t{found.thread.z}, found.times})
            text += std::to_string(field) + '\x1f';
        text += found.message + '\x1e';
    }
    return text.c_str();
}
