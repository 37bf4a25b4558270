// The launchers of Adam as Python can call them: lists of tensors are arrays of views.
#include "../../csrc/cuda/adam.cu"

namespace {

using bigops::View;
using bigops::cuda::AdamTensor;
using bigops::cuda::DeviceNumber;

std::vector<AdamTensor> tensors_of(const View* const (&lists)[bigops::kAdamRoles], int count) {
    std::vector<AdamTensor> tensors(static_cast<size_t>(count));
    for (int i = 0; i < count; ++i) {
        AdamTensor& tensor = tensors[static_cast<size_t>(i)];
        for (int role = 0; role < bigops::kAdamRoles; ++role)
            if (lists[role]) tensor.data[role] = lists[role][i].data;
        tensor.numel = lists[bigops::kGrad][i].numel();
    }
    return tensors;
}

DeviceNumber number_of(const View& view) { return {view.data, view.dtype == bigops::DType::f64}; }

}  // namespace

void workspaces(int count, int64_t numel, int64_t* step, int64_t* norm) {
    *step = bigops::cuda::adam_workspace(static_cast<size_t>(count));
    *norm = bigops::cuda::grad_norm_workspace(static_cast<size_t>(count), numel);
}

// After `steps`, or else one after `counts`, which the kernel advances. copies: null, or what gets
// parameters rounded.
void step(const View* params, const View* grads, const View* exp_avgs, const View* exp_avg_sqs,
          const View* max_exp_avg_sqs, const double* steps, const View* counts, int count,
          const bigops::AdamOptions& options, const float* total_norm, const float* grad_scale,
          const float* found_inf, const View* lr, const View* copies, void* workspace) {
    if (count == 0) return;
    auto tensors = tensors_of({params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs}, count);
    for (size_t i = 0; i < tensors.size(); ++i) {
        if (steps) tensors[i].step = steps[i];
        if (counts) tensors[i].count = number_of(counts[i]);
        if (copies) tensors[i].copy = copies[i].data;
    }
    bigops::cuda::AdamScalars scalars = {total_norm, grad_scale, found_inf, {}};
    if (lr) scalars.lr = number_of(*lr);
    const auto copied = copies ? std::optional(copies[0].dtype) : std::nullopt;
    bigops::cuda::adam(tensors, params[0].dtype, copied, options, scalars, workspace, nullptr);
}

void norm(const View* grads, int count, float* out, void* workspace) {
    std::vector<bigops::DType> dtypes;
    for (int i = 0; i < count; ++i) dtypes.push_back(grads[i].dtype);
    bigops::cuda::grad_norm(tensors_of({nullptr, grads, nullptr, nullptr, nullptr}, count), dtypes, out,
                            workspace, nullptr);
}
