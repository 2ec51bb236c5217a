// What Python sees of the passes over tiles of rows (token_rows.hpp): tensors come as addresses, in the structs' order.
#include <pybind11/pybind11.h>

#include <array>

#include "cpu/training/gemm.hpp"
#include "cpu/training/token_rows.hpp"

namespace py = pybind11;

namespace warploom {

namespace {

template <class T = float>
T* at(const py::handle& address) {
    return reinterpret_cast<T*>(address.cast<uintptr_t>());
}
int number(const py::handle& x) { return x.cast<int>(); }

NormQkvRope norm_qkv_rope(const py::tuple& t) {
    return {number(t[0]), number(t[1]), number(t[2]), number(t[3]),          number(t[4]),       number(t[5]), number(t[6]),
            t[7].cast<float>(), at(t[8]), at(t[9]), at(t[10]), at(t[11]), t[12].cast<int64_t>(), at<int64_t>(t[13]),
            at(t[14]),          at(t[15])};
}

OutProjMlp out_proj_mlp(const py::tuple& t) {
    return {number(t[0]), number(t[1]), number(t[2]), number(t[3]), t[4].cast<float>(), at(t[5]),
            at(t[6]),     at(t[7]),     at(t[8]),     at(t[9]),     at(t[10]),          at(t[11])};
}

// The backward pass of a task; its gradients are nine addresses.
template <class Task>
void bind_backward(py::module_& module, const char* name, Task (*make)(const py::tuple&)) {
    module.def(name, [make](const py::tuple& task, const py::tuple& d) {
        const Task rows = make(task);
        const typename Task::Gradients gradients{at(d[0]), at(d[1]), at(d[2]), at(d[3]), at(d[4]),
                                                 at(d[5]), at(d[6]), at(d[7]), at(d[8])};
        py::gil_scoped_release unlocked;
        rows.backward(gradients);
    });
}

}  // namespace

void bind_rows(py::module_& module) {
    using Tuple = const py::tuple&;
    module.def("has_panels", &has_panels);
    module.def("norm_qkv_rope", [](Tuple task, Tuple x) {
        const NormQkvRope rows = norm_qkv_rope(task);
        float *const delta = at(x[0]), *const stream = at(x[1]), *const q = at(x[2]), *const k = at(x[3]), *const v = at(x[4]);
        py::gil_scoped_release unlocked;
        rows.forward(delta, stream, q, k, v);
    });
    bind_backward(module, "norm_qkv_rope_backward", &norm_qkv_rope);
    module.def("out_proj_mlp", [](Tuple task, Tuple x) {
        const OutProjMlp rows = out_proj_mlp(task);
        float *const heads = at(x[0]), *const stream = at(x[1]), *const delta = at(x[2]);
        py::gil_scoped_release unlocked;
        rows.forward(heads, stream, delta);
    });
    bind_backward(module, "out_proj_mlp_backward", &out_proj_mlp);
}

}  // namespace warploom
