// The launcher of attention's forward pass on Hopper, and its tiles.
#include "attention_forward_sm90.h"
#include "attention_host.h"

namespace bigops::cuda {
namespace {

template <class Tiles>
void launch_tiles(const View& query, const View& key, const View& value, const View& out,
                  const View& lse, const AttentionSizes& sizes, const View& workspace, void* stream) {
    AttentionForwardArguments arguments = {};
    arguments.query = map_of<typename Tiles::Query>(query);
    arguments.key = map_of<typename Tiles::Key>(key);
    arguments.value = map_of<typename Tiles::Value>(value);
    arguments.out = out.data;
    arguments.lse = lse.ptr<float>();
    arguments.out_batch = out.strides[0];
    arguments.out_head = out.strides[1];
    arguments.out_row = out.strides[2];
    arguments.lse_batch = lse.strides[0];
    arguments.lse_head = lse.strides[1];
    arguments.value_data = value.data;
    arguments.value_head = value.strides[1];
    arguments.value_row = value.strides[2];
    arguments.sizes = sizes;
    const int64_t row_blocks = (sizes.query_len + Tiles::kBlockRows - 1) / Tiles::kBlockRows;
    const int64_t tiles = row_blocks * sizes.heads * sizes.batch;
    if (tiles == 0) return;
    require(tiles <= std::numeric_limits<int32_t>::max() / 2, "more tiles than a kernel can count");
    const auto blocks = static_cast<unsigned>(std::min<int64_t>(tiles, multiprocessors()));
    arguments.tiles = static_cast<int>(tiles);
    if (tiles > blocks) {
        arguments.drawn = workspace.ptr<unsigned>();
        check(cudaMemsetAsync(arguments.drawn, 0, sizeof(unsigned), static_cast<cudaStream_t>(stream)),
              "attention_forward_sm90: clearing the counter");
    }
    launch("attention_forward_sm90_kernel", attention_forward_sm90_kernel<Tiles>,
           {dim3(blocks), dim3(Tiles::kThreads), Tiles::kSharedBytes, stream}, arguments);
}

// FlashAttention-3's tiles, but 128 keys at D 128 whatever is masked: as fast as 160 or 176 on long
// sequences, faster on short ones, and without spills.
template <class T>
void launch_type(const View& query, const View& key, const View& value, const View& out,
                 const View& lse, const AttentionSizes& sizes, const View& workspace, void* stream) {
    const auto with = [&]<class Tiles>(Tiles) {
        launch_tiles<Tiles>(query, key, value, out, lse, sizes, workspace, stream);
    };
    switch (query.shape[3]) {
        case 64: return with(ForwardTiles<T, 64, 128, 3, 2>{});
        case 96: return with(ForwardTiles<T, 96, 128, 2, 2>{});
        case 128: return with(ForwardTiles<T, 128, 128, 2, 2>{});
        case 256: return with(ForwardTiles<T, 256, 80, 2, 1>{});
        default: require(false, "attention on sm_90 takes head sizes 64, 96, 128 and 256");
    }
}

}  // namespace

void attention_forward_sm90(const View& query, const View& key, const View& value, const View& out,
                            const View& lse, const AttentionOptions& options, const Packed* packed,
                            const View& workspace, void* stream) {
    const AttentionSizes sizes = attention_sizes(query, key, options, packed);
    if (query.dtype == DType::bf16)
        launch_type<device::bf16>(query, key, value, out, lse, sizes, workspace, stream);
    else
        launch_type<device::f16>(query, key, value, out, lse, sizes, workspace, stream);
}

}  // namespace bigops::cuda
