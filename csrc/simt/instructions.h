// What the wrappers of csrc/cuda/device/ call in the model (warp.h, async_copy.h, mbarrier.h, tma.h, mma.h,
// wgmma.h of this folder); each group is the .cpp of its name.
#pragma once

#include <initializer_list>

#include "core.h"
#include "tensor_map.h"

namespace bigops::simt {

// Fatal unless this is shared memory at a multiple of `alignment` bytes.
void require_shared(const void* pointer, size_t alignment, const char* instruction);

// The line of the kernel that is running, as findings name it.
std::string here();

// ---- warp.cpp
void named_barrier(int id, int threads, bool wait, Site site);
void set_registers(int registers, bool increase, Site site);
bool elect(Site site);

// ---- async_copy.cpp
void cp_async_16(void* shared, const void* global, bool valid);
void cp_async_commit();
void cp_async_wait(int pending);

// ---- mbarrier.cpp
void mbarrier_init(uint64_t* barrier, uint32_t count);
void fence_mbarrier_init();
void fence_proxy_async();
void mbarrier_arrive(uint64_t* barrier, uint32_t expected_bytes);
void mbarrier_wait(uint64_t* barrier, uint32_t parity, Site site);
// For asynchronous work: whether it may complete on this barrier, when it is issued; and that it has.
void check_mbarrier(uint64_t* barrier);
void mbarrier_complete_bytes(uint64_t* barrier, uint32_t bytes, Agent agent);

// ---- tma.cpp
using Coordinates = std::initializer_list<int>;
void tma_prefetch(const TensorMap* map);
void tma_load(void* shared, const TensorMap* map, uint64_t* barrier, Coordinates at);
void tma_load_im2col(void* shared, const TensorMap* map, uint64_t* barrier, Coordinates at,
                     int offset_w, int offset_h);
void bulk_load(void* shared, const void* global, uint64_t* barrier, uint32_t bytes);
void tma_store(const TensorMap* map, const void* shared, Coordinates at, bool add);
void bulk_reduce_add(float* global, const float* shared, uint32_t bytes);
void bulk_commit();
void bulk_wait(int pending, bool read_only);
bool tma_loads_pending();

// ---- mma.cpp
enum class Operand16 : uint8_t { bf16, f16 };
void mma_m16n8k16(Operand16 type, float* d, const uint32_t* a, uint32_t b0, uint32_t b1, Site site);
void mma_m16n8k8_tf32(float* d, const uint32_t* a, uint32_t b0, uint32_t b1, Site site);
void ldmatrix_x4(uint32_t* r, const void* row, bool transposed, Site site);
void stmatrix_x4(void* row, const uint32_t* r, bool transposed, Site site);

// ---- wgmma.cpp
// What one thread brings: N / 2 accumulators; A by descriptor, or by registers where there are any.
struct Product {
    Operand16 type;
    int columns;
    float* d;
    uint64_t a, b;
    const uint32_t* a_registers;
    bool a_transposed, b_transposed, add;
};
void wgmma(const Product& product, Site site);
void wgmma_fence(Site site);
void wgmma_commit(Site site);
void wgmma_wait(int pending, Site site);

}  // namespace bigops::simt
