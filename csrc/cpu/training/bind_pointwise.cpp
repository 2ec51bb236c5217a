// What Python sees of the training passes. Tensors come as addresses: the Python side owns them and checks their shapes.
#include <pybind11/pybind11.h>

#include "cpu/training/dense_attention.hpp"
#include "cpu/training/pointwise.hpp"
#include "cpu/training/omp_threads.hpp"

namespace py = pybind11;

namespace warploom {

namespace {

using Address = uintptr_t;

template <class T>
T* at(Address address) {
    return reinterpret_cast<T*>(address);
}
template <class T>
Rows<T> rows_of(const py::tuple& x) {
    return {at<T>(x[0].cast<Address>()), x[1].cast<int64_t>()};
}

template <class T>
HeadsOf<T> heads_of(const py::handle& x) {
    const auto [at_, batch, time, head] = x.cast<std::tuple<Address, int64_t, int64_t, int64_t>>();
    return {at<T>(at_), batch, time, head};
}

// Forward with q, k, v and out; backward with q, k, v and the gradients of out, q, k and v.
void attention(int batch, int time, int heads, int key_heads, int width, float scale, Address stats,
               const py::args& tensors) {
    const auto in = [&](int i) { return heads_of<const float>(tensors[i]); };
    const auto out = [&](int i) { return heads_of<float>(tensors[i]); };
    const DenseAttention task{batch, time, heads, key_heads, width, scale, in(0), in(1), in(2), at<float>(stats)};
    if (tensors.size() == 4) {
        const auto o = out(3);
        py::gil_scoped_release unlocked;
        return task.forward(o);
    }
    const auto d_out = in(3);
    const auto dq = out(4), dk = out(5), dv = out(6);
    py::gil_scoped_release unlocked;
    task.backward(d_out, dq, dk, dv);
}

// Each function is bound once a number format: `norm_forward_float32` and `norm_forward_bfloat16`.
template <class T>
void bind_format(py::module_& module, const std::string& format) {
    using Tuple = const py::tuple&;
    module.def(("norm_forward_" + format).c_str(),
               [](int rows, int columns, float eps, Tuple x, Tuple residual, Address weight, Tuple y, Tuple sum,
                  Address inverse) {
                   const NormForward<T> task{rows, columns, eps, rows_of<const T>(x), rows_of<const T>(residual),
                                             at<T>(weight), rows_of<T>(y), rows_of<T>(sum), at<float>(inverse)};
                   py::gil_scoped_release unlocked;
                   task.run();
               });
    module.def(("norm_backward_" + format).c_str(),
               [](int rows, int columns, Tuple x, Tuple dy, Tuple dsum, Address weight, Address inverse, Tuple dx,
                  Address partial, Address dweight) {
                   const NormBackward<T> task{rows, columns, rows_of<const T>(x), rows_of<const T>(dy),
                                              rows_of<const T>(dsum), at<T>(weight), at<float>(inverse),
                                              rows_of<T>(dx), {}, at<float>(partial), at<T>(dweight)};
                   py::gil_scoped_release unlocked;
                   task.run();
               });
    module.def(("gate_forward_" + format).c_str(),
               [](int kind, int rows, int columns, Tuple gate, Tuple up, Tuple y) {
                   const Gating<T> task{Gate(kind), rows, columns, rows_of<const T>(gate), rows_of<const T>(up), {},
                                        rows_of<T>(y), {}, {}};
                   py::gil_scoped_release unlocked;
                   task.run();
               });
    module.def(("gate_backward_" + format).c_str(),
               [](int kind, int rows, int columns, Tuple gate, Tuple up, Tuple dy, Tuple dgate, Tuple dup) {
                   const Gating<T> task{Gate(kind), rows, columns, rows_of<const T>(gate), rows_of<const T>(up),
                                        rows_of<const T>(dy), {}, rows_of<T>(dgate), rows_of<T>(dup)};
                   py::gil_scoped_release unlocked;
                   task.run();
               });
    module.def(("turn_" + format).c_str(),
               [](int batch, int time, int heads, int width, int half, float sign, Address x, int64_t batch_stride,
                  int64_t time_stride, int64_t head_stride, Address cos, Address sin, int64_t table_stride,
                  Address positions, Address y) {
                   const Turn<T> task{batch, time, heads, width, half, sign, at<T>(x), batch_stride, time_stride,
                                      head_stride, at<float>(cos), at<float>(sin), table_stride,
                                      at<int64_t>(positions), {at<T>(y), int64_t(heads) * width}};
                   py::gil_scoped_release unlocked;
                   task.run();
               });
    module.def(("cross_entropy_" + format).c_str(),
               [](int rows, int classes, int64_t ignore, float smoothing, float z, Address logits, Address targets,
                  Address upstream, Address losses) {
                   const CrossEntropy<T> task{rows, classes, ignore, smoothing, z, at<T>(logits),
                                              at<int64_t>(targets), at<float>(upstream), at<float>(losses)};
                   py::gil_scoped_release unlocked;
                   task.run();
               });
    module.def(("attend_" + format).c_str(), [](int rows, int queries, int before, int keys, float scale,
                                                Address scores, Address weights, Address d_weights) {
        const Attend<T> task{rows, queries, before, keys, scale, at<float>(scores), at<T>(weights), at<T>(d_weights)};
        py::gil_scoped_release unlocked;
        task.run();
    });
}

}  // namespace

void bind_passes(py::module_& module) {
    module.def("borrow_team", [](Address parallel, Address number, Address size) {
        team = {reinterpret_cast<decltype(Team::parallel)>(parallel), reinterpret_cast<decltype(Team::number)>(number),
                reinterpret_cast<decltype(Team::size)>(size)};
    });
    module.def("attention", &attention);
    bind_format<float>(module, "float32");
    bind_format<bfloat16>(module, "bfloat16");
}

}  // namespace warploom
