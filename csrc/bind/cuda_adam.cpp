// Adam over lists of CUDA tensors, and the norm of gradients.
#include "../cuda/adam.h"

#include "cuda_lists.h"

namespace bigops {
namespace {

// A step count in the CPU's memory.
struct HostCount {
    void* at;
    bool wide;

    double next() const {
        return 1 + (wide ? *static_cast<double*>(at) : *static_cast<float*>(at));
    }
    void advance() const {
        if (wide) *static_cast<double*>(at) += 1;
        else *static_cast<float*>(at) += 1;
    }
};

bool capturing(void* stream) {
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    cuda::check_cuda(cudaStreamIsCapturing(static_cast<cudaStream_t>(stream), &status),
                     "cudaStreamIsCapturing");
    return status != cudaStreamCaptureStatusNone;
}

// The numbers of those tensors that have gaps or do not lie alike; only if there are none, the step
// is done.
std::vector<size_t> adam_lists(
    const py::list& params, const py::list& grads, const py::list& exp_avgs,
    const py::list& exp_avg_sqs, const py::list& max_exp_avg_sqs,
    const std::optional<py::list>& copies, const py::list& state_steps, const py::object& lr, double beta1, double beta2, double eps, double weight_decay,
    bool decoupled_weight_decay, bool amsgrad, bool maximize, std::optional<double> max_grad_norm,
    const std::optional<View>& total_norm, const std::optional<View>& grad_scale,
    const std::optional<View>& found_inf, const std::optional<View>& workspace) {
    const std::array<const py::list*, kAdamRoles> lists = {&params, &grads, &exp_avgs, &exp_avg_sqs,
                                                           amsgrad ? &max_exp_avg_sqs : nullptr};
    for (const py::list* list : lists)
        require(!list || list->size() == params.size(), "lists differ in length");
    require(state_steps.size() == params.size(), "lists differ in length");
    require(!copies || copies->size() == params.size(), "lists differ in length");
    if (params.empty()) return {};
    const View first = dlpack::to_view(item(params, 0));
    const dlpack::Device device = {first.device_type, first.device_id};

    std::array<std::vector<cuda::AdamTensor>, std::size(kKinds)> by_kind;
    std::vector<HostCount> counts;
    std::vector<size_t> unlike;
    bool device_numbers = false;
    size_t most = 0;
    for (size_t i = 0; i < params.size(); ++i) {
        for (const py::list* list : lists)
            if (list) look_ahead(*list, i);
        look_ahead(state_steps, i);
        std::array<py::handle, cuda::kMostRoles> objects = {};
        for (size_t role = 0; role < lists.size(); ++role)
            if (lists[role]) objects[role] = item(*lists[role], i);
        cuda::AdamTensor entry;
        Kind kind;
        const bool flat = read_entry(entry, kind, objects,
                                     copies ? item(*copies, i) : py::handle(), device);
        if (!flat) unlike.push_back(i);
        const dlpack::Tensor step = read(item(state_steps, i));
        require(step.ndim == 0, "a step is not one number");
        if (step.device.type == dlpack::kCpu) {
            counts.push_back({step.data, is_wide(step)});
            entry.step = counts.back().next();
        } else {
            require(step.device.type == device.type && step.device.id == device.id,
                    "a step is on another device");
            entry.count = {step.data, is_wide(step)};
            device_numbers = true;
        }
        auto& own = by_kind[kind_index(kind)];
        own.push_back(entry);
        most = std::max(most, own.size());
    }
    if (!unlike.empty()) return unlike;

    AdamOptions options = {0, beta1, beta2, eps, weight_decay, decoupled_weight_decay, amsgrad,
                           maximize};
    cuda::AdamScalars scalars;
    options.lr = read_rate(lr, device, scalars);
    device_numbers = device_numbers || scalars.lr.at;
    require(!max_grad_norm == !total_norm, "max_grad_norm goes with total_norm");
    if (max_grad_norm) options.max_grad_norm = *max_grad_norm;
    scalars.total_norm = scalar(total_norm, device);
    scalars.grad_scale = scalar(grad_scale, device);
    scalars.found_inf = scalar(found_inf, device);
    require(!device_numbers ||
                (workspace && workspace->device_type == kCuda &&
                 workspace->device_id == device.id &&
                 workspace->numel() >= cuda::adam_workspace(most)),
            "adam needs a workspace for steps or lr on the device");

    const cuda::OnDevice guard(first);
    if (!counts.empty() && capturing(first.stream))
        throw std::runtime_error(
            "adam: a CUDA graph captured with step counts on the CPU would repeat one step; "
            "capturable=True keeps them on the device");
    // One launch after the other on one stream, so that the workspace serves all.
    for (size_t i = 0; i < by_kind.size(); ++i)
        if (!by_kind[i].empty())
            cuda::adam(by_kind[i], kKinds[i].dtype, kKinds[i].copies, options, scalars,
                       workspace ? workspace->data : nullptr, first.stream);
    for (const HostCount& count : counts) count.advance();
    return {};
}

// The numbers of those gradients that have gaps; only if there are none, the norm is computed.
std::vector<size_t> norm_of_list(const py::list& grads, const View& out, const View& workspace) {
    const dlpack::Device device = {out.device_type, out.device_id};
    std::vector<cuda::AdamTensor> tensors(grads.size());
    std::vector<DType> dtypes(grads.size());
    std::vector<size_t> unlike;
    int64_t all = 0;
    for (size_t i = 0; i < grads.size(); ++i) {
        look_ahead(grads, i);
        const py::handle grad = item(grads, i);
        require(!dlpack::is_negative(grad), "a tensor is a negative view");
        const dlpack::Tensor view = read(grad);
        Roles roles = {};
        roles[kGrad] = &view;
        if (!fill(tensors[i], roles, device)) unlike.push_back(i);
        dtypes[i] = floating(view);
        all += tensors[i].numel;
    }
    if (!unlike.empty()) return unlike;
    require(out.dtype == DType::f32 && out.numel() == 1, "the norm is one float32");
    require(workspace.device_type == kCuda && workspace.device_id == device.id &&
                workspace.numel() >= cuda::grad_norm_workspace(grads.size(), all),
            "the workspace is too small");
    const cuda::OnDevice guard(out);
    cuda::grad_norm(tensors, dtypes, out.ptr<float>(), workspace.data, out.stream);
    return {};
}

}  // namespace

void bind_cuda_adam(py::module_& m) {
    m.def("adam_workspace", &cuda::adam_workspace, py::arg("tensors"));
    m.def("grad_norm_workspace", &cuda::grad_norm_workspace, py::arg("tensors"), py::arg("numel"));
    m.def("adam", &adam_lists, py::arg("params"), py::arg("grads"), py::arg("exp_avgs"),
          py::arg("exp_avg_sqs"), py::arg("max_exp_avg_sqs"), py::arg("copies"),
          py::arg("state_steps"), py::arg("lr"), py::arg("beta1"), py::arg("beta2"), py::arg("eps"),
          py::arg("weight_decay"), py::arg("decoupled_weight_decay"), py::arg("amsgrad"),
          py::arg("maximize"), py::arg("max_grad_norm"), py::arg("total_norm"),
          py::arg("grad_scale"), py::arg("found_inf"), py::arg("workspace"));
    m.def("grad_norm", &norm_of_list, py::arg("grads"), py::arg("out"), py::arg("workspace"));
}

}  // namespace bigops
