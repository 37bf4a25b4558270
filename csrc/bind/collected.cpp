#include "collected.h"

#include <pybind11/stl.h>

#include <memory>
#include <string_view>

#include "module.h"
#include "tensor_memory.h"

namespace py = pybind11;

namespace bigops {
namespace {

constexpr size_t kTogether = 128;  // parameters whose objects are touched before they are asked

StateName::Kind kind_of(std::string_view list) {
    if (list == "state_steps") return StateName::kStep;
    if (list == "masters") return StateName::kMaster;
    return list.ends_with("_scales") ? StateName::kScale : StateName::kState;
}

PyObject* look_up(PyObject* dict, PyObject* key) {
    PyObject* const value = PyDict_GetItemWithError(dict, key);
    if (!value && PyErr_Occurred()) throw py::error_already_set();
    return value;
}

// Parameters in an optimizer's state. Their hash is a function in Python, so they are first expected
// where they usually are, in the group's order.
class InOrder {
   public:
    explicit InOrder(py::handle dict) : dict_(dict.ptr()) {}

    PyObject* find(PyObject* param) {
        constexpr int kTries = 8;
        PyObject *key, *value;
        for (int tries = 0; tries < kTries; ++tries) {
            if (!PyDict_Next(dict_, &position_, &key, &value)) {
                position_ = 0;
                break;
            }
            if (key == param) return value;
        }
        return look_up(dict_, param);
    }

   private:
    PyObject* dict_;
    Py_ssize_t position_ = 0;
};

const py::handle* items(const py::object& list) {
    static_assert(sizeof(py::handle) == sizeof(PyObject*));
    return reinterpret_cast<const py::handle*>(
        reinterpret_cast<PyListObject*>(list.ptr())->ob_item);
}

// PyObject_GetAttr without looking for the attribute in the class' bases.
py::object grad_of(py::handle param) {
    static PyObject* const grad =
        py::object(py::module_::import("torch").attr("Tensor").attr("grad")).release().ptr();
    auto* const type = reinterpret_cast<PyObject*>(Py_TYPE(param.ptr()));
    PyObject* const found = Py_TYPE(grad)->tp_descr_get(grad, param.ptr(), type);
    if (!found) throw py::error_already_set();
    return py::reinterpret_steal<py::object>(found);
}

}  // namespace

Collected::Collected(const py::dict& names) {
    for (const auto& [list, key] : names)
        names_.push_back({py::reinterpret_borrow<py::object>(list),
                          py::reinterpret_borrow<py::object>(key),
                          kind_of(py::cast<std::string_view>(list))});
}

py::dict Collected::lists() const {
    py::dict found;
    found["params"] = params;
    for (size_t k = 1; k < width(); ++k) {
        py::list list(size());
        for (size_t i = 0; i < size(); ++i) list[i] = object(i, k);
        found[k == 1 ? py::str("grads") : names_[k - 2].list] = list;
    }
    return found;
}

py::list Collected::masters() const {
    py::list found;
    if (const size_t k = written())
        for (size_t i = 0; i < size(); ++i) found.append(object(i, k));
    return found;
}

size_t Collected::written() const {
    const auto master = std::ranges::find(names_, StateName::kMaster, &StateName::kind);
    return master == names_.end() ? 0 : 2 + static_cast<size_t>(master - names_.begin());
}

void Collected::add_gradients(StepTensors& list) const {
    list.tensors.reserve(list.tensors.size() + size());
    for (size_t i = 0; i < size(); ++i) {
        if (tensors.tensors[i].layout < 0)
            list.tensors.push_back(tensors.tensors[i]);
        else  // the order of its own memory is another
            add_gradient(list, object(i, 1));
    }
}

void Collected::increment_versions() const {
    static PyObject* const increment = [] {
        const auto graph = py::module_::import("torch.autograd.graph");
        return py::object(graph.attr("increment_version")).release().ptr();
    }();
    const TensorMemory& memory = TensorMemory::get();
    for (const py::list& list : {params, masters()})
        for (size_t i = 0; i < list.size(); i += kTogether) {
            const auto first = static_cast<Py_ssize_t>(i);
            const auto some = py::reinterpret_steal<py::list>(
                PyList_GetSlice(list.ptr(), first, first + Py_ssize_t{kTogether}));
            memory.touch(items(some), some.size(), TensorMemory::kNothing);
            const auto done =
                py::reinterpret_steal<py::object>(PyObject_CallOneArg(increment, some.ptr()));
            if (!done) throw py::error_already_set();
        }
}

bool Collected::find(const py::list& group, const py::dict& state, const py::tuple& types) {
    const auto plain = [&](py::handle tensor) {
        return std::ranges::any_of(types, [&](py::handle type) {
            return reinterpret_cast<PyObject*>(Py_TYPE(tensor.ptr())) == type.ptr();
        });
    };
    const TensorMemory& memory = TensorMemory::get();
    held_.reserve(group.size() * width());
    InOrder states(state);
    for (size_t i = 0; i < group.size(); ++i) {
        if (i % kTogether == 0) {
            const py::handle* some = items(group) + i;
            const size_t count = std::min(kTogether, group.size() - i);
            if (!std::all_of(some, some + count, plain)) return false;
            memory.touch(some, count, TensorMemory::kGrads);
        }
        const py::handle param = item(group, i);
        py::object grad = grad_of(param);
        if (grad.is_none()) continue;
        if (!plain(grad)) return false;
        held_.push_back(py::reinterpret_borrow<py::object>(param));
        held_.push_back(std::move(grad));
        if (names_.empty()) continue;
        PyObject* const own = states.find(param.ptr());
        if (!own || !PyDict_CheckExact(own) || !find_states(own)) return false;
    }
    if (size() == group.size()) {
        params = group;
    } else {
        for (size_t i = 0; i < size(); ++i) params.append(object(i, 0));
    }
    return read_all();
}

// Into held_; false where one is not there. They are expected under the very names that they got.
bool Collected::find_states(PyObject* state) {
    const size_t begin = held_.size();
    held_.resize(begin + names_.size());
    PyObject *key, *value;
    for (Py_ssize_t position = 0; PyDict_Next(state, &position, &key, &value);)
        for (size_t k = 0; k < names_.size(); ++k)
            if (names_[k].key.ptr() == key)
                held_[begin + k] = py::reinterpret_borrow<py::object>(value);
    for (size_t k = 0; k < names_.size(); ++k) {
        py::object& found = held_[begin + k];
        if (!found)
            found = py::reinterpret_borrow<py::object>(look_up(state, names_[k].key.ptr()));
        if (!found || found.is_none()) return false;
    }
    return true;
}

// Whether parameters and gradients are on one device, and none is sparse or complex.
bool Collected::alike() const {
    constexpr uint8_t kComplex = 5;
    std::optional<dlpack::Device> device;
    for (size_t i = 0; i < size(); ++i)
        for (size_t k = 0; k < 2; ++k) {
            dlpack::Tensor tensor;
            PyObject* const of = object(i, k).ptr();
            if (dlpack::find_api(Py_TYPE(of))->tensor_from_object(of, &tensor) != 0) {
                PyErr_Clear();
                return false;
            }
            if (!device) device = tensor.device;
            if (tensor.dtype.code == kComplex || tensor.device.type != device->type ||
                tensor.device.id != device->id)
                return false;
        }
    return true;
}

bool Collected::read_all() {
    if (held_.empty()) return true;
    dlpack::Tensor first;
    PyObject* const param = object(0, 0).ptr();
    if (dlpack::find_api(Py_TYPE(param))->tensor_from_object(param, &first) != 0) {
        PyErr_Clear();
        return false;
    }
    if (first.device.type != dlpack::kCpu) return alike();
    const TensorMemory& memory = TensorMemory::get();
    const size_t param_at = written();
    tensors.tensors.reserve(size());
    try {
        for (size_t i = 0; i < size(); ++i) {
            if (i % kTogether == 0) {
                const size_t end = std::min(size(), i + kTogether);
                memory.touch(&held_[i * width()], (end - i) * width(), TensorMemory::kStorages);
            }
            StepObjects objects;
            objects.roles[kParam] = object(i, param_at);
            objects.roles[kGrad] = object(i, 1);
            if (param_at) objects.roles[kCopy] = object(i, 0);
            size_t states = 0, scales = 0;
            for (size_t k = 0; k < names_.size(); ++k) {
                const py::handle state = object(i, 2 + k);
                switch (names_[k].kind) {
                    case StateName::kState: objects.roles[kFirstState + states++] = state; break;
                    case StateName::kScale: objects.scales[scales++] = state; break;
                    case StateName::kStep: objects.step = state; break;
                    case StateName::kMaster: break;
                }
            }
            read_into(tensors, objects, true);
        }
    } catch (const std::exception&) {
        return false;  // what is wrong, the op says
    }
    return on_cpu = true;
}

void bind_collected(py::module_& m) {
    py::class_<Collected>(m, "Collected", py::module_local(), "the tensors of a group's step")
        .def("lists", &Collected::lists)
        .def("__len__", &Collected::size)
        .def_readonly("params", &Collected::params)
        .def_readonly("on_cpu", &Collected::on_cpu)
        .def_property_readonly("has_double", [](const Collected& found) {
            return std::ranges::any_of(found.tensors.tensors, [](const StepTensor& tensor) {
                return tensor.grad_dtype == DType::f64;
            });
        });
    m.def("tensor_memory", [] { return TensorMemory::get().known(); });
    m.def(
        "collect",
        [](const py::list& group, const py::dict& state, const py::dict& names,
           const py::tuple& types) {
            auto found = std::make_unique<Collected>(names);
            return found->find(group, state, types) ? std::move(found) : nullptr;
        },
        py::arg("group"), py::arg("state"), py::arg("names"), py::arg("types"),
        "The parameters of a group that have a gradient, with it and their states by name. None "
        "where the optimizer has more to do than to look them up: a state that is not there yet, a "
        "gradient that is sparse, a tensor that is complex, of another class than `types`, on another "
        "device or of a shape that does not fit.");
}

}  // namespace bigops
