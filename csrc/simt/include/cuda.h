// The part of the driver API that TMA needs: the tensor map, opaque as on a GPU.
#pragma once

#include <cstdint>

struct alignas(64) CUtensorMap {
    uint64_t opaque[16];
};
