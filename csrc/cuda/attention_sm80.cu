// The launcher of attention's forward pass by mma.sync, and its tiles.
#include "attention_forward_sm80.h"
#include "attention_host.h"

namespace bigops::cuda {
namespace {

template <class Tiles>
void launch_tiles(const View& query, const View& key, const View& value, const View& out,
                  const View& lse, const AttentionSizes& sizes, void* stream) {
    using T = typename Tiles::T;
    const int64_t row_blocks = (sizes.query_len + Tiles::kBlockRows - 1) / Tiles::kBlockRows;
    const int64_t blocks = row_blocks * sizes.heads * sizes.batch;
    if (blocks == 0) return;
    require(blocks <= std::numeric_limits<int32_t>::max() / 2, "more tiles than a kernel can count");
    const sm80::ForwardArguments<T> arguments = {
        sm80::rows_of<const T>(query), sm80::rows_of<const T>(key), sm80::rows_of<const T>(value),
        sm80::rows_of<T>(out),         sm80::rows_of<float>(lse),   sizes};
    launch("attention_forward_sm80_kernel", sm80::attention_forward_sm80_kernel<Tiles>,
           {dim3(static_cast<unsigned>(blocks)), dim3(Tiles::kThreads), Tiles::kSharedBytes, stream},
           arguments);
}

// Two blocks share a multiprocessor, so that one's products run beside the other's softmax: a
// `large` one has 164 KB of shared memory or more (data-centre parts from Ampere on), the others
// have 100. Of head size 256 it is eight warps of one block, or the four that there is room for.
template <class T>
void launch_type(const View& query, const View& key, const View& value, const View& out,
                 const View& lse, const AttentionSizes& sizes, bool large, void* stream) {
    const auto with = [&]<class Tiles>(Tiles) {
        launch_tiles<Tiles>(query, key, value, out, lse, sizes, stream);
    };
    switch (query.shape[3]) {
        case 64: return with(sm80::ForwardTiles<T, 64, 4, 2, 64, 3>{});
        case 96: return with(sm80::ForwardTiles<T, 96, 4, 2, 64, 2>{});
        case 128:
            if (large) return with(sm80::ForwardTiles<T, 128, 4, 2, 64, 3>{});
            return with(sm80::ForwardTiles<T, 128, 4, 2, 32, 2>{});
        case 256:
            if (large) return with(sm80::ForwardTiles<T, 256, 8, 1, 64, 2>{});
            return with(sm80::ForwardTiles<T, 256, 4, 1, 64, 2>{});
        default: require(false, "attention on sm_80 takes head sizes 64, 96, 128 and 256");
    }
}

void forward(const View& query, const View& key, const View& value, const View& out, const View& lse,
             const AttentionOptions& options, const Packed* packed, bool large, void* stream) {
    const AttentionSizes sizes = attention_sizes(query, key, options, packed);
    if (query.dtype == DType::bf16)
        launch_type<device::bf16>(query, key, value, out, lse, sizes, large, stream);
    else
        launch_type<device::f16>(query, key, value, out, lse, sizes, large, stream);
}

}  // namespace

void attention_forward_sm80(const View& query, const View& key, const View& value, const View& out,
                            const View& lse, const AttentionOptions& options, const Packed* packed,
                            const View& /*workspace*/, void* stream) {
    forward(query, key, value, out, lse, options, packed, shared_memory() >= 164 << 10, stream);
}

}  // namespace bigops::cuda
