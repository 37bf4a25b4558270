// A group's tensors as an optimizer knows them, found and read in one go: of a step over a thousand
// small tensors most of the time is what is asked of Python's objects, and the caches' misses there.
// Nothing is kept for the next step, in which any of them may be another or lie elsewhere.
#pragma once

#include "cpu_lists.h"

namespace bigops {

// What the op calls a state (exp_avgs, state_steps, masters, exp_avg_scales), what the optimizer's
// state dict does, and what it is to a kernel.
struct StateName {
    enum Kind { kState, kScale, kStep, kMaster };
    pybind11::object list, key;
    Kind kind;
};

// The parameters of a group that have a gradient. The objects are held, since another thread may drop
// them while a kernel runs.
class Collected {
   public:
    pybind11::list params;
    StepTensors tensors;  // where `on_cpu`
    bool on_cpu = false;

    explicit Collected(const pybind11::dict& names);

    size_t size() const { return held_.size() / width(); }

    // How many states a parameter has that are walked with it.
    int64_t states() const {
        return std::ranges::count(names_, StateName::kState, &StateName::kind);
    }

    // To tensors that have gradients alone.
    void add_gradients(StepTensors& list) const;

    // The op's lists by name.
    pybind11::dict lists() const;
    pybind11::list masters() const;

    // Autograd must notice that a parameter which it saved has changed.
    void increment_versions() const;

    // False where an optimizer has more to do than to look them up.
    bool find(const pybind11::list& group, const pybind11::dict& state,
              const pybind11::tuple& types);

   private:
    std::vector<StateName> names_;
    std::vector<pybind11::object> held_;  // of each parameter: itself, its gradient, its states

    size_t width() const { return 2 + names_.size(); }
    pybind11::handle object(size_t i, size_t k) const { return held_[i * width() + k]; }
    size_t written() const;  // which of a parameter's objects is updated: itself or its master
    bool find_states(PyObject* state);
    bool alike() const;
    bool read_all();
};

}  // namespace bigops
