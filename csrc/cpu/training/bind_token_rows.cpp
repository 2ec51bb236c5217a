// What Python sees of the passes over tiles of rows (token_rows.hpp): tensors, in the structs' order.
#include <pybind11/pybind11.h>

#include <utility>

#include "cpu/array.hpp"
#include "cpu/training/gemm.hpp"
#include "cpu/training/omp_threads.hpp"
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
// Terms of a product come by whole vectors of words.
template <class F>
constexpr int grain = 16 * kTogether<F>;

template <class F>
NormQkvRope<F> make_norm_qkv_rope(int heads, int key_heads, float eps, Tensor norm, Tensor qkv, Tensor cos, Tensor sin,
                      Tensor positions, Tensor sum, Tensor inverse) {
    const int B = size_of(sum.size(0)), T = size_of(sum.size(1)), C = size_of(sum.size(2)), J = size_of(qkv.size(0));
    const int64_t N = int64_t(B) * T, all = int64_t(heads) + 2 * int64_t(key_heads);
    if (heads < 1 || key_heads < 1 || J % all || C % grain<F> || J % grain<F>)
        throw py::value_error("widths " + std::to_string(C) + " and " + std::to_string(J) + " must be multiples of " + std::to_string(grain<F>) + ", the latter of " +
                              std::to_string(all) + " heads");
    const int D = int(J / all);
    size_of(N * J);
    const int64_t most = cos.given() ? cos.size(0) : INT64_MAX, half = cos.given() ? cos.size(1) : 0;
    if (2 * half > D) throw py::value_error("cos has " + std::to_string(half) + " columns for heads of " + std::to_string(D));
    const Rows<const float> cosines = cos.rows_or_none<const float>("cos", most, half);
    const Rows<const float> sines = sin.rows_or_none<const float>("sin", most, half);
    if (cos.given() != sin.given() || cosines.stride != sines.stride)
        throw py::value_error("cos and sin must have the same strides");
    return {B, T, C, heads, key_heads, D, int(half), eps, norm.numbers<const F>("norm", C),
            qkv.numbers<const F>("qkv", int64_t(J) * C), cosines.at, sines.at, cosines.stride, most,
            positions.numbers_or_none<const int64_t>("positions", N), sum.numbers<F>("sum", N * C),
            inverse.numbers<float>("inverse", N)};
}

template <class F>
OutProjMlp<F> make_out_proj_mlp(float eps, Tensor output, Tensor norm, Tensor gate_up, Tensor down, Tensor sum,
                          Tensor inverse, Tensor both) {
    const int C = size_of(norm.count()), J = size_of(output.size(1)), H = size_of(down.size(1));
    const int N = size_of(sum.count() / C);
    if (C % grain<F> || J % grain<F> || H % grain<F>)
        throw py::value_error("widths must be multiples of " + std::to_string(grain<F>));
    size_of(int64_t(C) * J), size_of(2 * int64_t(H) * C), size_of(2 * int64_t(H) * N);
    return {N, C, J, H, eps, output.numbers<const F>("output", int64_t(C) * J), norm.numbers<const F>("norm", C),
            gate_up.numbers<const F>("gate_up", int64_t(2) * H * C), down.numbers<const F>("down", int64_t(C) * H),
            sum.numbers<F>("sum", int64_t(N) * C), inverse.numbers<float>("inverse", N),
            both.numbers<F>("both", int64_t(N) * 2 * H)};
}

template <class Work>
void unlocked(const Work& work) {
    py::gil_scoped_release unlocked;
    work();
}

// A pass keeps the tensors alive whose addresses it has.
template <class Pass, class... Arguments, size_t... Numbers>
py::class_<Pass> bind_pass(py::module_& module, const char* name, Pass (*make)(Arguments...), std::index_sequence<Numbers...>) {
    return py::class_<Pass>(module, name).def(py::init(make), py::keep_alive<1, Numbers + 2>()...);
}
template <class Pass, class... Arguments>
py::class_<Pass> bind_pass(py::module_& module, const char* name, Pass (*make)(Arguments...)) {
    return bind_pass(module, name, make, std::index_sequence_for<Arguments...>());
}

int64_t chunks(int64_t rows) { return (rows + NormBackward<float>::kChunk - 1) / NormBackward<float>::kChunk; }

template <class F>
Panels<F> panels_of(const F* at, int64_t terms, int64_t columns) {
    if (terms % grain<F> || columns % 16)
        throw py::value_error("a product has " + std::to_string(terms) + " terms and " + std::to_string(columns) +
                              " columns: they must be multiples of " + std::to_string(grain<F>) + " and 16");
    return {size_of(terms), size_of(columns), at};
}

// Products of bfloat16 are written for one instruction.
template <class F>
void require_products() {
    if (sizeof(F) == 2 && !has_fast_pairs()) throw py::type_error("products of bfloat16 need a CPU of AMD with avx512_bf16");
}

// A weight matrix (outputs, inputs), or with `over` its transposed, as `multiply` reads it.
void pack_weight(Tensor w, bool over, Tensor to) {
    in_format(w, [&](auto number) {
        using F = decltype(number);
        const int64_t outputs = w.size(0), inputs = w.size(1), terms = over ? outputs : inputs, columns = over ? inputs : outputs;
        const F* from = w.numbers<const F>("w", outputs * inputs);
        F* at = to.numbers<F>("to", size_of(outputs * inputs));
        const Panels<F> p = panels_of<F>(at, terms, columns);
        unlocked([&] { pack(from, p.terms, p.columns, over, at); });
    });
}

void multiply_packed(Tensor x, Tensor w, Tensor y) {
    in_format(x, [&](auto number) {
        using F = decltype(number);
        require_products<F>();
        const int N = size_of(x.size(0));
        const int64_t terms = x.size(1), columns = y.size(1);
        const Panels<F> p = panels_of<F>(w.numbers<const F>("w", terms * columns), terms, columns);
        const Rows<const F> from = x.rows<const F>("x", N, terms);
        const Rows<F> to = y.rows<F>("y", N, columns);
        unlocked([&] { multiply(from, p, to, N); });
    });
}

void pack_tokens_of(Tensor x, bool left, Tensor to) {
    in_format(x, [&](auto number) {
        using F = decltype(number);
        const int N = size_of(x.size(0)), columns = size_of(x.size(1));
        if (columns % 16) throw py::value_error("x must have columns in multiples of 16");
        const Rows<const F> from = x.rows<const F>("x", N, columns);
        F* at = to.numbers<F>("to", room_of_tokens(N, columns));
        unlocked([&] {
            parallel_for((N + 63) / 64, [&](int tile) { pack_tokens(from, tile * 64, std::min(N, tile * 64 + 64), columns, left, at); });
        });
    });
}

void multiply_tokens_of(Tensor left, Tensor right, int64_t tokens, Tensor y, bool add, int threads) {
    const int N = size_of(tokens), outputs = size_of(y.size(0)), inputs = size_of(y.size(1));
    const int64_t count = int64_t(outputs) * inputs;
    if (outputs % 16 || inputs % 16) throw py::value_error("y must have rows and columns in multiples of 16");
    in_format(left, [&](auto number) {
        using F = decltype(number);
        require_products<F>();
        const F *a = left.numbers<const F>("left", room_of_tokens(N, outputs)), *b = right.numbers<const F>("right", room_of_tokens(N, inputs));
        const auto go = [&](auto* to) { unlocked([&] { multiply_tokens(a, b, N, outputs, inputs, to, add, threads); }); };
        if constexpr (sizeof(F) == 2)
            if (!add && y.holds<F>()) return go(y.numbers<F>("y", count));
        go(y.numbers<float>("y", count));
    });
}

void head_loss(int64_t ignore, float smoothing, float z, Tensor hidden, Tensor forth, Tensor back, Tensor targets, Tensor upstream,
               Tensor losses, Tensor d_hidden, Tensor left, Tensor right) {
    in_format(hidden, [&](auto number) {
        using F = decltype(number);
        require_products<F>();
        const int N = size_of(hidden.size(0)), C = size_of(hidden.size(1)), V = size_of(forth.count() / C);
        const int64_t count = int64_t(V) * C;
        const float* scale = upstream.numbers_or_none<const float>("upstream", N);
        if (!scale && (back.given() || left.given())) throw py::value_error("upstream is None: gradients need it");
        if (back.given() != d_hidden.given() || left.given() != right.given())
            throw py::value_error("back and d_hidden, and left and right, must be given together");
        const HeadLoss<F> pass{
            hidden.rows<const F>("hidden", N, C), panels_of(forth.numbers<const F>("forth", count), C, V),
            panels_of(back.numbers_or_none<const F>("back", count), V, C),
            {N, V, ignore, smoothing, z, nullptr, targets.numbers<const int64_t>("targets", N), scale, losses.numbers<float>("losses", N), nullptr,
             nullptr},
            d_hidden.rows_or_none<F>("d_hidden", N, C), left.numbers_or_none<F>("left", room_of_tokens(N, V)),
            right.numbers_or_none<F>("right", room_of_tokens(N, C))};
        unlocked([&] { pass.run(); });
    });
}

template <class F>
void bind_format(py::module_& module, const std::string& format) {
    bind_pass(module, ("NormQkvRope_" + format).c_str(), &make_norm_qkv_rope<F>)
        .def("forward",
             [](const NormQkvRope<F>& t, Tensor delta, Tensor stream, Tensor q, Tensor k, Tensor v) {
                 const int64_t N = int64_t(t.batch) * t.time, NC = N * t.channels, D = t.head_width;
                 const F *x = delta.numbers<const F>("delta", NC), *y = stream.numbers<const F>("stream", NC);
                 F *to_q = q.numbers<F>("q", N * t.heads * D), *to_k = k.numbers<F>("k", N * t.key_heads * D),
                       *to_v = v.numbers<F>("v", N * t.key_heads * D);
                 unlocked([&] { t.forward(x, y, to_q, to_k, to_v); });
             })
        .def("backward", [](const NormQkvRope<F>& t, Tensor q, Tensor k, Tensor v, Tensor sum, Tensor stream, Tensor heads,
                            Tensor normed, bool packed, Tensor partial, Tensor norm) {
            const auto room = [=](int64_t tokens, int64_t columns) { return packed ? room_of_tokens(tokens, columns) : tokens * columns; };
            const int64_t N = int64_t(t.batch) * t.time, NC = N * t.channels, D = t.head_width;
            const typename NormQkvRope<F>::Gradients d{
                q.numbers<const F>("q", N * t.heads * D), k.numbers<const F>("k", N * t.key_heads * D),
                v.numbers<const F>("v", N * t.key_heads * D), sum.numbers<const F>("sum", NC),
                stream.numbers<F>("stream", NC), heads.numbers<F>("heads", room(N, (t.heads + 2 * t.key_heads) * D)),
                normed.numbers<F>("normed", room(N, t.channels)), packed, partial.numbers<float>("partial", chunks(N) * t.channels),
                norm.numbers<F>("norm", t.channels)};
            unlocked([&] { t.backward(d); });
        });
    bind_pass(module, ("OutProjMlp_" + format).c_str(), &make_out_proj_mlp<F>)
        .def("forward",
             [](const OutProjMlp<F>& t, Tensor heads, Tensor stream, Tensor delta) {
                 const int64_t N = t.rows, NC = N * t.channels;
                 const F *x = heads.numbers<const F>("heads", N * t.gathered),
                             *y = stream.numbers<const F>("stream", NC);
                 F* to = delta.numbers<F>("delta", NC);
                 unlocked([&] { t.forward(x, y, to); });
             })
        .def("backward", [](const OutProjMlp<F>& t, Tensor sum, Tensor delta, Tensor stream, Tensor heads, Tensor both,
                            Tensor middle, Tensor normed, Tensor partial, Tensor norm, Tensor gathered, Tensor of_delta,
                            Tensor of_stream, Tensor of_gathered) {
            const bool packed = of_delta.given();
            const auto room = [=](int64_t tokens, int64_t columns) { return packed ? room_of_tokens(tokens, columns) : tokens * columns; };
            const auto panels = [&](const char* name, Tensor x, int columns) {
                return packed ? x.numbers<F>(name, room_of_tokens(t.rows, columns)) : nullptr;
            };
            const int64_t N = t.rows, NC = N * t.channels;
            const typename OutProjMlp<F>::Gradients d{
                sum.numbers<const F>("sum", NC), delta.numbers<const F>("delta", NC),
                stream.numbers<F>("stream", NC), heads.numbers<F>("heads", N * t.gathered),
                both.numbers<F>("both", room(N, 2 * t.hidden)), middle.numbers<F>("middle", room(N, t.hidden)),
                normed.numbers<F>("normed", room(N, t.channels)), partial.numbers<float>("partial", chunks(N) * t.channels),
                norm.numbers<F>("norm", t.channels), gathered.numbers<const F>("gathered", N * t.gathered),
                panels("of_delta", of_delta, t.channels), panels("of_stream", of_stream, t.channels),
                panels("of_gathered", of_gathered, t.gathered)};
            unlocked([&] { t.backward(d); });
        });
}

}  // namespace

void bind_rows(py::module_& module) {
    module.def("has_panels", &has_panels);
    module.def("has_fast_pairs", &has_fast_pairs);
    module.def("outruns_library", &outruns_library);
    module.def("pack", &pack_weight);
    module.def("multiply", &multiply_packed);
    module.def("pack_tokens", &pack_tokens_of);
    module.def("multiply_tokens", &multiply_tokens_of);
    module.def("head_loss", &head_loss);
    bind_format<float>(module, "float32");
    if (has_fast_pairs()) bind_format<bfloat16>(module, "bfloat16");
}

}  // namespace warploom
