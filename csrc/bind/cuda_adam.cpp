// Adam over lists of CUDA tensors: views are read anew by each call, as csrc/bind/adam.cpp reads
// them, and everything is checked that would crash before anything is launched.
#include <cmath>
#include <optional>

#include "../cuda/adam.h"
#include "step_lists.h"
#include "cuda_module.h"

namespace py = pybind11;

namespace bigops {
namespace {

using cuda::DeviceNumber;

constexpr int kCuda = 2;  // DLPack's DLDeviceType
constexpr const char* kMismatch = "tensors of one parameter differ in shape or dtype";

bool is_tensor(py::handle object) {
    PyTypeObject* const type = Py_TYPE(object.ptr());
    return py::hasattr(reinterpret_cast<PyObject*>(type), "__dlpack_c_exchange_api__");
}

dlpack::Tensor read(py::handle object) {
    dlpack::Tensor tensor;
    const auto* api = dlpack::find_api(Py_TYPE(object.ptr()));
    if (api->tensor_from_object(object.ptr(), &tensor) != 0) throw py::error_already_set();
    require(tensor.ndim <= kMaxDims, "a tensor has more than 8 dimensions");
    tensor.data = static_cast<char*>(tensor.data) + tensor.byte_offset;
    return tensor;
}

int64_t numel(const dlpack::Tensor& tensor) {
    return std::accumulate(tensor.shape, tensor.shape + tensor.ndim, int64_t{1},
                           std::multiplies<int64_t>());
}

DType floating(const dlpack::Tensor& tensor) {
    const DType dtype = dlpack::to_dtype(tensor.dtype);
    require(dtype == DType::f32 || dtype == DType::bf16 || dtype == DType::f16,
            "a tensor is not of float32, bfloat16 or float16");
    return dtype;
}

// The tensors of one parameter; false where they have gaps or lie differently.
bool fill(cuda::AdamTensor& entry, const Roles& roles, dlpack::Device device) {
    const dlpack::Tensor& first = *(roles[kParam] ? roles[kParam] : roles[kGrad]);
    entry.numel = numel(first);
    bool flat = true;
    for (int role = 0; role < kAdamRoles; ++role) {
        const dlpack::Tensor* tensor = roles[role];
        if (!tensor) continue;
        require(tensor->device.type == device.type && tensor->device.id == device.id,
                "tensors are on different devices");
        require(tensor->ndim == first.ndim &&
                    std::equal(tensor->shape, tensor->shape + tensor->ndim, first.shape) &&
                    dlpack::to_dtype(tensor->dtype) == dlpack::to_dtype(first.dtype),
                kMismatch);
        require(tensor->data || entry.numel == 0, "a tensor has no memory (fake or meta)");
        entry.data[role] = tensor->data;
        flat = flat && contiguous(*tensor);
    }
    if (flat || entry.numel == 0) return true;
    const StepLayout layout = sorted_layout(roles, first);
    for (int role = 0; role < kAdamRoles; ++role)
        for (int d = 0; d < layout.ndim; ++d)
            require(!roles[role] || role == kGrad || layout.strides[role][d] != 0,
                    "an expanded tensor cannot be written");
    return dense_and_alike(layout, roles);
}

bool is_wide(const dlpack::Tensor& number) {
    const DType dtype = dlpack::to_dtype(number.dtype);
    require(number.data && numel(number) == 1 && (dtype == DType::f32 || dtype == DType::f64),
            "a number is not one float32 or float64");
    return dtype == DType::f64;
}

// A float32 on the device that the tensors are on.
const float* scalar(const std::optional<View>& view, dlpack::Device device) {
    if (!view) return nullptr;
    require(view->dtype == DType::f32 && view->numel() == 1 && view->device_type == device.type &&
                view->device_id == device.id,
            "total_norm, grad_scale and found_inf are one float32 each, on the tensors' device");
    return view->ptr<float>();
}

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

// Groups of tensors that one launch updates.
struct Kind {
    DType dtype;
    std::optional<DType> copies;

    bool operator==(const Kind&) const = default;
};
constexpr Kind kKinds[] = {{DType::f32, {}},
                           {DType::bf16, {}},
                           {DType::f16, {}},
                           {DType::f32, DType::bf16},
                           {DType::f32, DType::f16}};

// Whether the copy lies as the parameter, whose shape it has.
bool alike(const dlpack::Tensor& copy, const dlpack::Tensor& param) {
    require(copy.device.type == param.device.type && copy.device.id == param.device.id,
            "tensors are on different devices");
    require(copy.ndim == param.ndim && std::equal(copy.shape, copy.shape + copy.ndim, param.shape),
            kMismatch);
    require(copy.data || numel(copy) == 0, "a tensor has no memory (fake or meta)");
    for (int d = 0; d < copy.ndim; ++d) {
        require(copy.shape[d] <= 1 || copy.strides[d] != 0, "an expanded tensor cannot be written");
        if (copy.shape[d] > 1 && copy.strides[d] != param.strides[d]) return false;
    }
    return true;
}

// The numbers of those tensors that have gaps or do not lie alike; only if there are none, the step
// is done.
std::vector<size_t> adam_lists(
    const py::list& params, const py::list& grads, const py::list& exp_avgs,
    const py::list& exp_avg_sqs, const py::list& max_exp_avg_sqs, const py::list& state_steps,
    const py::object& lr, double beta1, double beta2, double eps, double weight_decay,
    bool decoupled_weight_decay, bool amsgrad, bool maximize, std::optional<double> max_grad_norm,
    const std::optional<View>& total_norm, const std::optional<View>& grad_scale,
    const std::optional<View>& found_inf, const std::optional<py::list>& copies,
    const std::optional<View>& workspace) {
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
        std::array<dlpack::Tensor, kAdamRoles> views;
        Roles roles = {};
        for (size_t role = 0; role < lists.size(); ++role) {
            if (!lists[role]) continue;
            const py::handle tensor = item(*lists[role], i);
            // The averages are the optimizer's own.
            require(role > kGrad || !dlpack::is_negative(tensor), "a tensor is a negative view");
            views[role] = read(tensor);
            roles[role] = &views[role];
        }
        cuda::AdamTensor entry;
        Kind kind = {floating(views[kParam]), {}};
        bool flat = fill(entry, roles, device);
        if (copies) {
            const py::handle tensor = item(*copies, i);
            require(!dlpack::is_negative(tensor), "a tensor is a negative view");
            const dlpack::Tensor copy = read(tensor);
            flat = alike(copy, views[kParam]) && flat;
            kind.copies = dlpack::to_dtype(copy.dtype);
            entry.copy = copy.data;
        }
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
        const auto* const found = std::find(std::begin(kKinds), std::end(kKinds), kind);
        require(found != std::end(kKinds), "copies are of float32, in bfloat16 or float16");
        auto& own = by_kind[static_cast<size_t>(found - kKinds)];
        own.push_back(entry);
        most = std::max(most, own.size());
    }
    if (!unlike.empty()) return unlike;

    AdamOptions options = {0, beta1, beta2, eps, weight_decay, decoupled_weight_decay, amsgrad,
                           maximize};
    cuda::AdamScalars scalars;
    if (!is_tensor(lr)) {
        options.lr = lr.cast<double>();
    } else {
        const dlpack::Tensor number = read(lr);
        require(number.device.type == device.type && number.device.id == device.id,
                "lr is on another device");
        scalars.lr = {number.data, is_wide(number)};
        device_numbers = true;
    }
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
          py::arg("exp_avg_sqs"), py::arg("max_exp_avg_sqs"), py::arg("state_steps"), py::arg("lr"),
          py::arg("beta1"), py::arg("beta2"), py::arg("eps"), py::arg("weight_decay"),
          py::arg("decoupled_weight_decay"), py::arg("amsgrad"), py::arg("maximize"),
          py::arg("max_grad_norm"), py::arg("total_norm"), py::arg("grad_scale"),
          py::arg("found_inf"), py::arg("copies"), py::arg("workspace"));
    m.def("grad_norm", &norm_of_list, py::arg("grads"), py::arg("out"), py::arg("workspace"));
}

}  // namespace bigops
