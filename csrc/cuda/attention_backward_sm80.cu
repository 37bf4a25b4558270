// The launchers of attention's backward pass by mma.sync, and its tiles.
#include "attention_backward_sm80.h"

namespace bigops::cuda {
namespace {

// dK, dV, scores and their gradients take 192 of a thread's 255 registers; `large` multiprocessors
// have 164 KB of shared memory or more (data-centre parts from Ampere on), the others 100.
template <class T>
auto with_tiles(int64_t head_size, bool large, auto with) {
    switch (head_size) {
        case 64: return with(sm80::BackwardTiles<T, 64, 64, 128, 8, 2>{});
        case 96:
            if (large) return with(sm80::BackwardTiles<T, 96, 64, 128, 8, 2>{});
            return with(sm80::BackwardTiles<T, 96, 64, 64, 4, 2>{});
        case 128:
            if (large) return with(sm80::BackwardTiles<T, 128, 64, 128, 8, 2>{});
            return with(sm80::BackwardTiles<T, 128, 32, 64, 4, 2>{});
        case 256:
            if (large) return with(sm80::BackwardTiles<T, 256, 32, 64, 8, 2>{});
            return with(sm80::BackwardTiles<T, 256, 32, 32, 4, 1>{});
        default:
            throw std::invalid_argument(
                "attention's backward on sm_80 takes head sizes 64, 96, 128 and 256");
    }
}
auto with_tiles(const View& query, bool large, auto with) {
    if (query.dtype == DType::bf16)
        return with_tiles<device::bf16>(query.shape[3], large, with);
    return with_tiles<device::f16>(query.shape[3], large, with);
}

// Queries, grad_out and sums of this many bytes stay in L2 while the tiles of their keys are done.
int heads_together(const AttentionSizes& sizes, int64_t head_size) {
    const int64_t bytes = (2 + 2 + 4) * head_size * std::max(sizes.query_len, 1) *
                          (sizes.heads / sizes.kv_heads);
    return static_cast<int>(std::max<int64_t>(1, kCachedBytes / bytes));
}

template <class Tiles>
void launch_tiles(const sm80::BackwardArguments<typename Tiles::T>& arguments, void* stream) {
    const AttentionSizes& sizes = arguments.sizes;
    const int64_t key_blocks = (sizes.key_len + Tiles::kBlockKeys - 1) / Tiles::kBlockKeys;
    const int64_t tiles = key_blocks * sizes.kv_heads * sizes.batch;
    if (tiles == 0) return;
    require(tiles <= std::numeric_limits<int32_t>::max(), "more tiles than a kernel can count");
    const auto kernel = sizes.softcap > 0.0f ? sm80::attention_backward_sm80_kernel<Tiles, true>
                                             : sm80::attention_backward_sm80_kernel<Tiles, false>;
    launch("attention_backward_sm80_kernel", kernel,
           {dim3(static_cast<unsigned>(tiles)), dim3(Tiles::kThreads), Tiles::kSharedBytes, stream},
           arguments);
}

int64_t backward_workspace(const View& query, const View& key, const Packed* packed, bool large) {
    const AttentionSizes sizes = attention_sizes(query, key, {}, packed);
    return with_tiles(query, large, [&]<class Tiles>(Tiles) {
        return BackwardWorkspace::bytes(query, sizes, Tiles::kBlockQueries);
    });
}

void backward(const View& grad_out, const View& query, const View& key, const View& value,
              const View& out, const View& lse, const View* grad_lse, const View& grad_query,
              const View& grad_key, const View& grad_value, const AttentionOptions& options,
              const Packed* packed, const View& workspace, bool large, void* stream) {
    const AttentionSizes sizes = attention_sizes(query, key, options, packed);
    with_tiles(query, large, [&]<class Tiles>(Tiles) {
        using T = typename Tiles::T;
        require(workspace.numel() >= BackwardWorkspace::bytes(query, sizes, Tiles::kBlockQueries),
                "the workspace is too small");
        const BackwardWorkspace sums(query, sizes, Tiles::kBlockQueries, workspace.data);
        attention_backward_prepare(out, lse, grad_out, grad_lse, sizes, sums, stream);
        launch_tiles<Tiles>({.query = sm80::rows_of<const T>(query),
                             .key = sm80::rows_of<const T>(key),
                             .value = sm80::rows_of<const T>(value),
                             .grad_out = sm80::rows_of<const T>(grad_out),
                             .grad_key = sm80::rows_of<T>(grad_key),
                             .grad_value = sm80::rows_of<T>(grad_value),
                             .workspace = sums,
                             .sizes = sizes,
                             .head_group = heads_together(sizes, Tiles::kHeadSize),
                             // Without queries nobody has set the number that blocks draw from.
                             .deterministic = options.deterministic && sums.rows.total > 0},
                            stream);
        attention_backward_convert<T, sm80::LaneSums<Tiles>>(grad_query, sizes, sums, stream);
    });
}

bool large() { return shared_memory() >= 164 << 10; }

}  // namespace

int64_t attention_backward_sm80_workspace(const View& query, const View& key, const Packed* packed) {
    return backward_workspace(query, key, packed, large());
}

void attention_backward_sm80(const View& grad_out, const View& query, const View& key,
                             const View& value, const View& out, const View& lse,
                             const View* grad_lse, const View& grad_query, const View& grad_key,
                             const View& grad_value, const AttentionOptions& options,
                             const Packed* packed, const View& workspace, void* stream) {
    backward(grad_out, query, key, value, out, lse, grad_lse, grad_query, grad_key, grad_value,
             options, packed, workspace, large(), stream);
}

}  // namespace bigops::cuda
