// The launchers of Adam as Python can call them: lists of tensors are arrays of views.
#include "../../csrc/cuda/adam.cu"

namespace {

using bigops::View;
using bigops::cuda::AdamTensor;

std::vector<AdamTensor> tensors_of(const View* const (&lists)[bigops::kAdamRoles], const double* steps,
                                   int count) {
    std::vector<AdamTensor> tensors(static_cast<size_t>(count));
    for (int i = 0; i < count; ++i) {
        AdamTensor& tensor = tensors[static_cast<size_t>(i)];
        for (int role = 0; role < bigops::kAdamRoles; ++role)
            if (lists[role]) tensor.data[role] = lists[role][i].data;
        tensor.numel = lists[bigops::kGrad][i].numel();
        if (steps) tensor.step = steps[i];
    }
    return tensors;
}

}  // namespace

void workspaces(int count, int64_t numel, int64_t* step, int64_t* norm) {
    *step = bigops::cuda::adam_workspace(static_cast<size_t>(count));
    *norm = bigops::cuda::grad_norm_workspace(static_cast<size_t>(count), numel);
}

void step(const View* params, const View* grads, const View* exp_avgs, const View* exp_avg_sqs,
          const View* max_exp_avg_sqs, const double* steps, int count,
          const bigops::AdamOptions& options, const float* total_norm, const float* grad_scale,
          const float* found_inf, const View& workspace) {
    if (count == 0) return;
    const auto tensors =
        tensors_of({params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs}, steps, count);
    bigops::cuda::adam(tensors, params[0].dtype, options, total_norm, grad_scale, found_inf, workspace,
                       nullptr);
}

void norm(const View* grads, int count, float* out, const View& workspace) {
    std::vector<bigops::DType> dtypes;
    for (int i = 0; i < count; ++i) dtypes.push_back(grads[i].dtype);
    bigops::cuda::grad_norm(tensors_of({nullptr, grads, nullptr, nullptr, nullptr}, nullptr, count),
                            dtypes, out, workspace, nullptr);
}
