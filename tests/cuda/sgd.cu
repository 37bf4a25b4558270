// The launcher of SGD as Python can call it: lists of tensors are arrays of views.
#include "../../csrc/cuda/sgd.cu"

using bigops::View;

// copies: null, or what gets parameters rounded. lr: null, or one number that the kernel reads.
void step(const View* params, const View* grads, const View* momentum_buffers, int count,
          const bigops::SgdOptions& options, const float* total_norm, const float* grad_scale,
          const float* found_inf, const View* lr, const View* copies) {
    if (count == 0) return;
    const View* const lists[] = {params, grads, momentum_buffers};
    std::vector<bigops::cuda::StepTensor> tensors(static_cast<size_t>(count));
    for (int i = 0; i < count; ++i) {
        auto& tensor = tensors[static_cast<size_t>(i)];
        for (int role = 0; role < 3; ++role)
            if (lists[role]) tensor.data[role] = lists[role][i].data;
        if (copies) tensor.copy = copies[i].data;
        tensor.numel = grads[i].numel();
    }
    bigops::cuda::StepScalars scalars = {total_norm, grad_scale, found_inf, {}};
    if (lr) scalars.lr = {lr->data, lr->dtype == bigops::DType::f64};
    const auto copied = copies ? std::optional(copies[0].dtype) : std::nullopt;
    bigops::cuda::sgd(tensors, params[0].dtype, copied, options, scalars, nullptr);
}
