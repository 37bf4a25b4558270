// Stochastic gradient descent with momentum or Nesterov's (the rule is csrc/sgd_rule.h, the walk
// step_walk.h) over a list of tensors. With momentum a step reads three streams and writes two; the
// first one, whose buffers hold nothing yet, does not read them.
#include "sgd.h"

#include "step_walk.h"

namespace bigops::cuda {
namespace {

template <bool kMomentum>
struct SgdLanes {
    static constexpr int kRoles = kMomentum ? kFirstState + 1 : kFirstState;
    SgdNumbers<float> numbers;

    __device__ void operator()(float (&lanes)[kRoles]) const {
        float none = 0;
        float& buffer = kMomentum ? lanes[kRoles - 1] : none;
        sgd_rule<kMomentum, Math>(numbers, lanes[kGrad], lanes[kParam], buffer);
    }
};

template <class C, bool kMomentum>
using Row = StepRow<C, SgdLanes<kMomentum>::kRoles>;

template <class T, class C, bool kMomentum, int kRows>
__global__ void __launch_bounds__(kThreads)
    sgd_kernel(const __grid_constant__ Table<Row<C, kMomentum>, kRows> table,
               SgdNumbers<float> numbers, double lr, float max_grad_norm, bool maximize,
               StepScalars scalars) {
    using Rule = SgdLanes<kMomentum>;
    const int read = numbers.is_first_step ? int{kFirstState} : Rule::kRoles;
    update_chunk<T, Rule>(table.rows[row_of(table, static_cast<int>(blockIdx.x))], read,
                          scalars.found_inf, [&] {
                              Rule rule = {numbers};
                              rule.numbers.factor = factor_of(scalars, max_grad_norm, maximize);
                              rule.numbers.minus_lr = static_cast<float>(-rate_of(scalars, lr));
                              return rule;
                          });
}

template <class T, class C, bool kMomentum>
void step(const std::vector<StepTensor>& tensors, const SgdOptions& options,
          const StepScalars& scalars, void* stream) {
    const SgdNumbers<float> numbers(options);
    const auto max_grad_norm = static_cast<float>(options.max_grad_norm);
    const std::vector<Row<C, kMomentum>> rows(tensors.begin(), tensors.end());
    for_tables(rows, [&]<int kRows>(Table<Row<C, kMomentum>, kRows>& table, size_t) {
        const int chunks = number_chunks(table, [](const auto&) { return kChunk<T>; });
        launch("sgd_kernel", sgd_kernel<T, C, kMomentum, kRows>, blocks(chunks, stream), table,
               numbers, options.lr, max_grad_norm, options.maximize, scalars);
    });
}

}  // namespace

void sgd(const std::vector<StepTensor>& tensors, DType dtype, std::optional<DType> copies,
         const SgdOptions& options, const StepScalars& scalars, void* stream) {
    with_types(dtype, copies, [&]<class T, class C>() {
        if (options.momentum != 0) step<T, C, true>(tensors, options, scalars, stream);
        else step<T, C, false>(tensors, options, scalars, stream);
    });
}

}  // namespace bigops::cuda
