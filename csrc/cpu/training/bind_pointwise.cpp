// What Python sees of the training passes. Tensors come as they are (array.hpp), and are checked against each other.
#include <pybind11/pybind11.h>

#include "cpu/array.hpp"
#include "cpu/training/dense_attention.hpp"
#include "cpu/forks.hpp"
#include "cpu/training/pointwise.hpp"
#include "cpu/training/omp_threads.hpp"

namespace py = pybind11;

namespace warploom {

namespace {

using Address = uintptr_t;
using Tensor = const Array&;

// The sizes of a pass are ints.
int size_of(int64_t n) {
    if (n > INT32_MAX) throw py::value_error("a tensor has " + std::to_string(n) + " rows or columns: more than 2^31");
    return int(n);
}

template <class Pass>
void run(const Pass& pass) {
    py::gil_scoped_release unlocked;
    pass.run();
}

void norm_forward(float eps, Tensor x, Tensor residual, Tensor weight, Tensor y, Tensor sum, Tensor inverse) {
    const int N = size_of(x.size(0)), D = size_of(x.size(1));
    in_format(x, [&](auto number) {
        using T = decltype(number);
        run(NormForward<T>{N, D, eps, x.rows<const T>("x", N, D), residual.rows_or_none<const T>("residual", N, D),
                           weight.numbers<const T>("weight", D), y.rows<T>("y", N, D), residual.given() ? sum.rows<T>("sum", N, D) : Rows<T>{},
                           inverse.numbers<float>("inverse", N)});
    });
}

void norm_backward(Tensor x, Tensor dy, Tensor dsum, Tensor weight, Tensor inverse, Tensor dx, Tensor partial,
                   Tensor dweight) {
    const int N = size_of(x.size(0)), D = size_of(x.size(1));
    in_format(x, [&](auto number) {
        using T = decltype(number);
        constexpr int chunk = NormBackward<T>::kChunk;
        run(NormBackward<T>{N, D, x.rows<const T>("x", N, D), dy.rows<const T>("dy", N, D),
                            dsum.rows_or_none<const T>("dsum", N, D), weight.numbers<const T>("weight", D),
                            inverse.numbers<const float>("inverse", N), dx.rows<T>("dx", N, D), {},
                            partial.numbers<float>("partial", int64_t(N + chunk - 1) / chunk * D),
                            dweight.numbers<T>("dweight", D)});
    });
}

Gate gate_of(int kind) {
    if (kind < 0 || kind > int(Gate::clamped) || Gate(kind) == Gate::gelu_erf) throw py::value_error("no such gate: " + std::to_string(kind));
    return Gate(kind);
}

void gate_forward(int kind, Tensor gate, Tensor up, Tensor y) {
    const int N = size_of(gate.size(0)), D = size_of(gate.size(1));
    in_format(gate, [&](auto number) {
        using T = decltype(number);
        run(Gating<T>{gate_of(kind), N, D, gate.rows<const T>("gate", N, D), up.rows<const T>("up", N, D), {},
                      y.rows<T>("y", N, D), {}, {}});
    });
}

void gate_backward(int kind, Tensor gate, Tensor up, Tensor dy, Tensor dgate, Tensor dup) {
    const int N = size_of(gate.size(0)), D = size_of(gate.size(1));
    in_format(gate, [&](auto number) {
        using T = decltype(number);
        run(Gating<T>{gate_of(kind), N, D, gate.rows<const T>("gate", N, D), up.rows<const T>("up", N, D),
                      dy.rows<const T>("dy", N, D), {}, dgate.rows<T>("dgate", N, D), dup.rows<T>("dup", N, D)});
    });
}

void rope(float sign, Tensor x, Tensor cos, Tensor sin, Tensor positions, Tensor y) {
    const int64_t B = x.size(0), time = x.size(1), heads = x.size(2), width = x.size(3);
    const int64_t most = cos.size(0), half = cos.size(1);
    if (2 * half > width)
        throw py::value_error("cos has " + std::to_string(half) + " columns: more than half a head of " +
                              std::to_string(width));
    size_of(B * time), size_of(heads * width);
    const Rows<const float> cosines = cos.rows<const float>("cos", most, half), sines = sin.rows<const float>("sin", most, half);
    if (cosines.stride != sines.stride) throw py::value_error("cos and sin must have the same strides");
    in_format(x, [&](auto number) {
        using T = decltype(number);
        const T* from = x.heads<const T>("x", {B, time, heads, width});
        run(Rope<T>{int(B), int(time), int(heads), int(width), int(half), sign, from, x.stride(0), x.stride(1), x.stride(2),
                    cosines.at, sines.at, cosines.stride, most,
                    positions.numbers_or_none<const int64_t>("positions", B * time),
                    y.rows<T>("y", B * time, heads * width)});
    });
}

void cross_entropy(int64_t ignore, float smoothing, float z, Tensor logits, Tensor targets, Tensor upstream, Tensor losses,
                   Tensor log_sums, Tensor gradient) {
    if (!losses.given() && !log_sums.given()) throw py::value_error("a gradient without losses takes log_sums");
    const int N = size_of(logits.size(0)), V = size_of(logits.size(1));
    in_format(logits, [&](auto number) {
        using T = decltype(number);
        run(CrossEntropy<T>{N, V, ignore, smoothing, z, logits.numbers<T>("logits", int64_t(N) * V),
                            targets.numbers<const int64_t>("targets", N),
                            upstream.numbers_or_none<const float>("upstream", N), losses.numbers_or_none<float>("losses", N),
                            log_sums.numbers_or_none<float>("log_sums", N),
                            gradient.numbers_or_none<T>("gradient", int64_t(N) * V)});
    });
}

template <class T>
HeadsOf<T> heads_of(const char* name, const Array& x, int64_t B, int64_t time, int64_t heads, int64_t D) {
    T* at = x.heads<T>(name, {B, time, heads, D});
    return {at, x.stride(0), x.stride(1), x.stride(2)};
}

// Forward with q, k, v and out; backward with q, k, v and the gradients of out, q, k and v.
template <class T>
void attention_of(float scale, Tensor stats, Tensor q, Tensor k, Tensor v, Tensor out, Tensor dq, Tensor dk, Tensor dv) {
    const int64_t B = q.size(0), time = q.size(1), H = q.size(2), D = q.size(3), K = k.size(2);
    size_of(B), size_of(time), size_of(H), size_of(D);
    if (D % 16 || K < 1 || H % K)
        throw py::value_error("heads must have a multiple of 16 numbers and share key heads evenly, got " +
                              std::to_string(H) + " and " + std::to_string(K) + " heads of " + std::to_string(D));
    const DenseAttention<T> task{int(B), int(time), int(H), int(K), int(D), scale,
                              heads_of<const T>("q", q, B, time, H, D), heads_of<const T>("k", k, B, time, K, D),
                              heads_of<const T>("v", v, B, time, K, D), stats.numbers<float>("stats", 2 * B * H * time)};
    if (!dq.given()) {
        const auto o = heads_of<T>("out", out, B, time, H, D);
        py::gil_scoped_release unlocked;
        return task.forward(o);
    }
    const auto d_out = heads_of<const T>("d_out", out, B, time, H, D);
    const auto to_q = heads_of<T>("dq", dq, B, time, H, D), to_k = heads_of<T>("dk", dk, B, time, K, D),
               to_v = heads_of<T>("dv", dv, B, time, K, D);
    py::gil_scoped_release unlocked;
    task.backward(d_out, to_q, to_k, to_v);
}

void attention(float scale, Tensor stats, Tensor q, Tensor k, Tensor v, Tensor out, Tensor dq, Tensor dk, Tensor dv) {
    in_format(q, [&](auto number) { attention_of<decltype(number)>(scale, stats, q, k, v, out, dq, dk, dv); });
}

void use_openmp(Address parallel, Address number, Address size) {
    openmp = {reinterpret_cast<decltype(OpenMP::parallel)>(parallel), reinterpret_cast<decltype(OpenMP::number)>(number),
            reinterpret_cast<decltype(OpenMP::size)>(size)};
    in_forked_children([] { openmp = {}; });
}

}  // namespace

void bind_passes(py::module_& module) {
    module.def("use_openmp", &use_openmp);
    module.def("norm_forward", &norm_forward);
    module.def("norm_backward", &norm_backward);
    module.def("gate_forward", &gate_forward);
    module.def("gate_backward", &gate_backward);
    module.def("rope", &rope);
    module.def("cross_entropy", &cross_entropy, py::arg("ignore"), py::arg("smoothing"), py::arg("z"), py::arg("logits"),
               py::arg("targets"), py::arg("upstream"), py::arg("losses"), py::arg("log_sums") = py::none(),
               py::arg("gradient") = py::none());
    module.def("attention", &attention, py::arg("scale"), py::arg("stats"), py::arg("q"), py::arg("k"), py::arg("v"),
               py::arg("out"), py::arg("dq") = py::none(), py::arg("dk") = py::none(),
               py::arg("dv") = py::none());
}

}  // namespace warploom
