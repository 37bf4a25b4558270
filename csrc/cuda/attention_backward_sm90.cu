// The launchers of attention's backward pass on Hopper, and its tiles.
#include "attention_backward_sm90.h"

namespace bigops::cuda {
namespace {

// Query tiles as large as registers allow: a warpgroup's dK and dV, scores and their gradients take
// head size + tile rows of a thread's 240.
template <class T, bool kCapped>
auto with_tiles(int64_t head_size, auto with) {
    switch (head_size) {
        case 64: return with(BackwardTiles<T, 64, 128, kCapped>{});
        case 96: return with(BackwardTiles<T, 96, 64, kCapped>{});
        case 128: return with(BackwardTiles<T, 128, 64, kCapped>{});
        case 256: return with(BackwardTiles<T, 256, 64, kCapped>{});
        default:
            throw std::invalid_argument(
                "attention's backward on sm_90 takes head sizes 64, 96, 128 and 256");
    }
}
auto with_tiles(const View& query, bool capped, auto with) {
    const auto of_type = [&]<class T>(T) {
        return capped ? with_tiles<T, true>(query.shape[3], with)
                      : with_tiles<T, false>(query.shape[3], with);
    };
    return query.dtype == DType::bf16 ? of_type(device::bf16()) : of_type(device::f16());
}

Rows rows_of(const View& view) {
    return {view.data, view.strides[0], view.strides[1], view.strides[2]};
}

// Queries, grad_out and sums of this many bytes stay in L2 while the tiles of their keys are done.
int heads_together(const AttentionSizes& sizes, int64_t head_size) {
    const int64_t bytes = (2 + 2 + 4) * head_size * std::max(sizes.query_len, 1) *
                          (sizes.heads / sizes.kv_heads);
    return static_cast<int>(std::max<int64_t>(1, kCachedBytes / bytes));
}

template <class Tiles>
void launch_tiles(const View& query, const View& grad_out, const View& key, const View& value,
                  const View& grad_key, const View& grad_value, const AttentionSizes& sizes,
                  bool deterministic, const BackwardWorkspace& workspace, void* stream) {
    const int64_t key_blocks = (sizes.key_len + Tiles::kBlockKeys - 1) / Tiles::kBlockKeys;
    const int64_t tiles = key_blocks * sizes.kv_heads * sizes.batch;
    if (tiles == 0) return;
    require(tiles <= std::numeric_limits<int32_t>::max(), "more tiles than a kernel can count");
    AttentionBackwardArguments arguments = {
        .query = map_of<typename Tiles::Query>(query),
        .grad_out = map_of<typename Tiles::Query>(grad_out),
        .key = map_of<typename Tiles::Key>(key),
        .value = map_of<typename Tiles::Key>(value),
        .workspace = workspace,
        .sizes = sizes,
        .head_group = heads_together(sizes, Tiles::kHeadSize),
        .deterministic = deterministic && workspace.rows.total > 0,
        .query_data = rows_of(query),
        .grad_out_data = rows_of(grad_out),
        .key_data = rows_of(key),
        .value_data = rows_of(value),
        .grad_key = rows_of(grad_key),
        .grad_value = rows_of(grad_value),
    };
    launch("attention_backward_sm90_kernel", attention_backward_sm90_kernel<Tiles>,
           {dim3(static_cast<unsigned>(tiles)), dim3(Tiles::kThreads), Tiles::kSharedBytes, stream},
           arguments);
}

}  // namespace

int64_t attention_backward_sm90_workspace(const View& query, const View& key, const Packed* packed) {
    const AttentionSizes sizes = attention_sizes(query, key, {}, packed);
    return with_tiles(query, false, [&]<class Tiles>(Tiles) {
        return BackwardWorkspace::bytes(query, sizes, Tiles::kBlockQueries);
    });
}

void attention_backward_sm90(const View& grad_out, const View& query, const View& key,
                             const View& value, const View& out, const View& lse,
                             const View* grad_lse, const View& grad_query, const View& grad_key,
                             const View& grad_value, const AttentionOptions& options,
                             const Packed* packed, const View& workspace, void* stream) {
    const AttentionSizes sizes = attention_sizes(query, key, options, packed);
    with_tiles(query, sizes.softcap > 0.0f, [&]<class Tiles>(Tiles) {
        const BackwardWorkspace sums(query, sizes, Tiles::kBlockQueries, workspace.data);
        require(workspace.dtype == DType::u8 &&
                    workspace.numel() >=
                        BackwardWorkspace::bytes(query, sizes, Tiles::kBlockQueries),
                "the workspace must hold attention_backward_sm90_workspace bytes");
        attention_backward_prepare(out, lse, grad_out, grad_lse, sizes, sums, stream);
        launch_tiles<Tiles>(query, grad_out, key, value, grad_key, grad_value, sizes,
                            options.deterministic, sums, stream);
        attention_backward_convert<typename Tiles::T, FragmentSums<Tiles>>(grad_query, sizes, sums,
                                                                           stream);
    });
}

}  // namespace bigops::cuda
