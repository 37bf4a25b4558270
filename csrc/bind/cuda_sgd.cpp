// Stochastic gradient descent over lists of CUDA tensors.
#include "../cuda/sgd.h"

#include "cuda_lists.h"

namespace bigops {
namespace {

// The numbers of those tensors that have gaps or do not lie alike; only if there are none, the step
// is done.
std::vector<size_t> sgd_lists(const py::list& params, const py::list& grads,
                              const py::list& momentum_buffers,
                              const std::optional<py::list>& copies, const py::object& lr,
                              double momentum, double dampening, double weight_decay,
                              bool nesterov, bool maximize, bool is_first_step,
                              std::optional<double> max_grad_norm,
                              const std::optional<View>& total_norm,
                              const std::optional<View>& grad_scale,
                              const std::optional<View>& found_inf) {
    const std::array<const py::list*, 3> lists = {&params, &grads,
                                                  momentum != 0 ? &momentum_buffers : nullptr};
    for (const py::list* list : lists)
        require(!list || list->size() == params.size(), "lists differ in length");
    require(!copies || copies->size() == params.size(), "lists differ in length");
    if (params.empty()) return {};
    const View first = dlpack::to_view(item(params, 0));
    const dlpack::Device device = {first.device_type, first.device_id};

    std::array<std::vector<cuda::StepTensor>, std::size(kKinds)> by_kind;
    std::vector<size_t> unlike;
    for (size_t i = 0; i < params.size(); ++i) {
        std::array<py::handle, cuda::kMostRoles> objects = {};
        for (size_t role = 0; role < lists.size(); ++role) {
            if (!lists[role]) continue;
            look_ahead(*lists[role], i);
            objects[role] = item(*lists[role], i);
        }
        cuda::StepTensor entry;
        Kind kind;
        if (!read_entry(entry, kind, objects, copies ? item(*copies, i) : py::handle(), device))
            unlike.push_back(i);
        by_kind[kind_index(kind)].push_back(entry);
    }
    if (!unlike.empty()) return unlike;

    cuda::StepScalars scalars;
    SgdOptions options = {read_rate(lr, device, scalars), momentum, dampening, weight_decay,
                          nesterov, maximize, is_first_step};
    require(!max_grad_norm == !total_norm, "max_grad_norm goes with total_norm");
    if (max_grad_norm) options.max_grad_norm = *max_grad_norm;
    scalars.total_norm = scalar(total_norm, device);
    scalars.grad_scale = scalar(grad_scale, device);
    scalars.found_inf = scalar(found_inf, device);

    const cuda::OnDevice guard(first);
    for (size_t i = 0; i < by_kind.size(); ++i)
        if (!by_kind[i].empty())
            cuda::sgd(by_kind[i], kKinds[i].dtype, kKinds[i].copies, options, scalars,
                      first.stream);
    return {};
}

}  // namespace

void bind_cuda_sgd(py::module_& m) {
    m.def("sgd", &sgd_lists, py::arg("params"), py::arg("grads"), py::arg("momentum_buffers"),
          py::arg("copies"), py::arg("lr"), py::arg("momentum"), py::arg("dampening"), py::arg("weight_decay"),
          py::arg("nesterov"), py::arg("maximize"), py::arg("is_first_step"),
          py::arg("max_grad_norm"), py::arg("total_norm"), py::arg("grad_scale"),
          py::arg("found_inf"));
}

}  // namespace bigops
