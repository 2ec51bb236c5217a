// What Python sees of the passes over tiles of rows (token_rows.hpp): tensors, in the structs' order.
#include <pybind11/pybind11.h>

#include <utility>

#include "cpu/array.hpp"
#include "cpu/training/gemm.hpp"
#include "cpu/training/token_rows.hpp"

namespace py = pybind11;

namespace warploom {

namespace {

using Tensor = const Array&;

int size_of(int64_t n) {
    if (n < 1 || n > INT32_MAX) throw py::value_error("a size is " + std::to_string(n) + ": it must be 1 to 2^31 - 1");
    return int(n);
}

// Sizes follow from the sum (B, T, C), the weight (J, C) and the tables; every other tensor is held to them.
NormQkvRope make_norm_qkv_rope(int heads, int key_heads, float eps, Tensor norm, Tensor qkv, Tensor cos, Tensor sin,
                      Tensor positions, Tensor sum, Tensor inverse) {
    const int B = size_of(sum.size(0)), T = size_of(sum.size(1)), C = size_of(sum.size(2)), J = size_of(qkv.size(0));
    const int64_t N = int64_t(B) * T, all = int64_t(heads) + 2 * int64_t(key_heads);
    if (heads < 1 || key_heads < 1 || J % all || C % 16 || J % 16)
        throw py::value_error("widths " + std::to_string(C) + " and " + std::to_string(J) + " must be multiples of 16, the latter of " +
                              std::to_string(all) + " heads");
    const int D = int(J / all);
    size_of(N * J);
    const int64_t most = cos.given() ? cos.size(0) : INT64_MAX, half = cos.given() ? cos.size(1) : 0;
    if (2 * half > D) throw py::value_error("cos has " + std::to_string(half) + " columns for heads of " + std::to_string(D));
    const Rows<const float> cosines = cos.rows_or_none<const float>("cos", most, half);
    const Rows<const float> sines = sin.rows_or_none<const float>("sin", most, half);
    if (cos.given() != sin.given() || cosines.stride != sines.stride)
        throw py::value_error("cos and sin must have the same strides");
    return {B, T, C, heads, key_heads, D, int(half), eps, norm.numbers<const float>("norm", C),
            qkv.numbers<const float>("qkv", int64_t(J) * C), cosines.at, sines.at, cosines.stride, most,
            positions.numbers_or_none<const int64_t>("positions", N), sum.numbers<float>("sum", N * C),
            inverse.numbers<float>("inverse", N)};
}

OutProjMlp make_out_proj_mlp(float eps, Tensor output, Tensor norm, Tensor gate_up, Tensor down, Tensor sum,
                          Tensor inverse, Tensor both) {
    const int C = size_of(norm.count()), J = size_of(output.size(1)), F = size_of(down.size(1));
    const int N = size_of(sum.count() / C);
    if (C % 16 || J % 16 || F % 16) throw py::value_error("widths must be multiples of 16");
    size_of(int64_t(C) * J), size_of(2 * int64_t(F) * C), size_of(2 * int64_t(F) * N);
    return {N, C, J, F, eps, output.numbers<const float>("output", int64_t(C) * J), norm.numbers<const float>("norm", C),
            gate_up.numbers<const float>("gate_up", int64_t(2) * F * C), down.numbers<const float>("down", int64_t(C) * F),
            sum.numbers<float>("sum", int64_t(N) * C), inverse.numbers<float>("inverse", N),
            both.numbers<float>("both", int64_t(N) * 2 * F)};
}

template <class Work>
void unlocked(const Work& work) {
    py::gil_scoped_release unlocked;
    work();
}

// A task keeps the tensors alive whose addresses it has.
template <class Task, class... Arguments, size_t... Numbers>
py::class_<Task> bind_task(py::module_& module, const char* name, Task (*make)(Arguments...), std::index_sequence<Numbers...>) {
    return py::class_<Task>(module, name).def(py::init(make), py::keep_alive<1, Numbers + 2>()...);
}
template <class Task, class... Arguments>
py::class_<Task> bind_task(py::module_& module, const char* name, Task (*make)(Arguments...)) {
    return bind_task(module, name, make, std::index_sequence_for<Arguments...>());
}

int64_t chunks(int64_t rows) { return (rows + NormBackward<float>::kChunk - 1) / NormBackward<float>::kChunk; }

}  // namespace

void bind_rows(py::module_& module) {
    module.def("has_panels", &has_panels);
    bind_task(module, "NormQkvRope", &make_norm_qkv_rope)
        .def("forward",
             [](const NormQkvRope& t, Tensor delta, Tensor stream, Tensor q, Tensor k, Tensor v) {
                 const int64_t N = int64_t(t.batch) * t.time, NC = N * t.channels, D = t.head_width;
                 const float *x = delta.numbers<const float>("delta", NC), *y = stream.numbers<const float>("stream", NC);
                 float *to_q = q.numbers<float>("q", N * t.heads * D), *to_k = k.numbers<float>("k", N * t.key_heads * D),
                       *to_v = v.numbers<float>("v", N * t.key_heads * D);
                 unlocked([&] { t.forward(x, y, to_q, to_k, to_v); });
             })
        .def("backward", [](const NormQkvRope& t, Tensor q, Tensor k, Tensor v, Tensor sum, Tensor stream, Tensor heads,
                            Tensor normed, Tensor partial, Tensor norm) {
            const int64_t N = int64_t(t.batch) * t.time, NC = N * t.channels, D = t.head_width;
            const NormQkvRope::Gradients d{
                q.numbers<const float>("q", N * t.heads * D), k.numbers<const float>("k", N * t.key_heads * D),
                v.numbers<const float>("v", N * t.key_heads * D), sum.numbers<const float>("sum", NC),
                stream.numbers<float>("stream", NC), heads.numbers<float>("heads", N * (t.heads + 2 * t.key_heads) * D),
                normed.numbers<float>("normed", NC), partial.numbers<float>("partial", chunks(N) * t.channels),
                norm.numbers<float>("norm", t.channels)};
            unlocked([&] { t.backward(d); });
        });
    bind_task(module, "OutProjMlp", &make_out_proj_mlp)
        .def("forward",
             [](const OutProjMlp& t, Tensor heads, Tensor stream, Tensor delta) {
                 const int64_t N = t.rows, NC = N * t.channels;
                 const float *x = heads.numbers<const float>("heads", N * t.gathered),
                             *y = stream.numbers<const float>("stream", NC);
                 float* to = delta.numbers<float>("delta", NC);
                 unlocked([&] { t.forward(x, y, to); });
             })
        .def("backward", [](const OutProjMlp& t, Tensor sum, Tensor delta, Tensor stream, Tensor heads, Tensor both,
                            Tensor middle, Tensor normed, Tensor partial, Tensor norm) {
            const int64_t N = t.rows, NC = N * t.channels;
            const OutProjMlp::Gradients d{
                sum.numbers<const float>("sum", NC), delta.numbers<const float>("delta", NC),
                stream.numbers<float>("stream", NC), heads.numbers<float>("heads", N * t.gathered),
                both.numbers<float>("both", N * 2 * t.hidden), middle.numbers<float>("middle", N * t.hidden),
                normed.numbers<float>("normed", NC), partial.numbers<float>("partial", chunks(N) * t.channels),
                norm.numbers<float>("norm", t.channels)};
            unlocked([&] { t.backward(d); });
        });
}

}  // namespace warploom
