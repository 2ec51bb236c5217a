// What Python sees of the serving kernels. Tensors come as addresses: the Python side owns them and checks their shapes.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cpu/serving/block.hpp"
#include "cpu/serving/dense_matrix.hpp"
#include "cpu/serving/int8_matrix.hpp"
#include "cpu/serving/sample.hpp"
#include "cpu/serving/transformer.hpp"
#include "cpu/serving/spin_pool.hpp"

namespace py = pybind11;

namespace warploom {

namespace {

template <class T>
T* at(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

Norm make_norm(const std::string& kind, float eps, std::vector<float> weight, std::vector<float> bias) {
    const NormKind kinds = kind == "rmsnorm" ? NormKind::rms : kind == "layernorm" ? NormKind::layer : NormKind::none;
    return Norm{kinds, eps, std::move(weight), std::move(bias)};
}

Format format_of(const std::string& name) {
    return name == "int8" ? Format::int8 : name == "bfloat16" ? Format::halves : Format::floats;
}

std::shared_ptr<Matrix> make_matrix(const std::string& format, uintptr_t weight, int outputs, int columns,
                                    uintptr_t bias) {
    const float *w = at<float>(weight), *b = at<float>(bias);
    const Format kind = format_of(format);
    if (kind == Format::int8) return std::make_shared<Int8Matrix>(w, outputs, columns, b);
    if (kind == Format::halves) return std::make_shared<DenseMatrix<bfloat16>>(w, outputs, columns, b);
    return std::make_shared<DenseMatrix<float>>(w, outputs, columns, b);
}

Activation activation_of(const std::string& name) {
    if (name == "swiglu") return Activation::swiglu;
    if (name == "gelu") return Activation::gelu;
    return name == "relu" ? Activation::relu : Activation::relu2;
}

}  // namespace

void bind_serving(py::module_& module) {
    using Release = py::call_guard<py::gil_scoped_release>;
    module.def("set_workers", [](int threads) { Workers::shared().resize(threads); }, Release(), py::arg("threads"));

    py::class_<Step>(module, "Step")
        .def(py::init([](int tokens, uintptr_t positions, uintptr_t sequences, uintptr_t slots, uintptr_t table,
                         int width) {
            return Step{tokens, at<int64_t>(positions), at<int32_t>(sequences), at<int64_t>(slots),
                        at<int32_t>(table), width};
        }));
    py::class_<Pages>(module, "Pages")
        .def(py::init([](uintptr_t keys, uintptr_t values, const std::string& format, int page_size, int kv_heads,
                         int head_dim) {
            return Pages{at<void>(keys), at<void>(values), format_of(format), page_size, kv_heads, head_dim};
        }));
    module.def(
        "attend_pages",
        [](const Pages& pages, const Step& step, uintptr_t q, int64_t q_stride, uintptr_t k, int64_t k_stride,
           uintptr_t v, int64_t v_stride, uintptr_t out, int heads, int window, float softcap, float scale) {
            each_token(step, [&](int t) {
                write_page(pages, step.slots[t], at<float>(k) + t * k_stride, at<float>(v) + t * v_stride);
            });
            attend_pages(pages, step, Look{heads, window, softcap, scale}, at<float>(q), q_stride, at<float>(out));
        },
        Release());

    module.def(
        "sample",
        [](uintptr_t logits, int count, int vocabulary, uintptr_t rows, uintptr_t temperature, uintptr_t top_k,
           uintptr_t top_p, uintptr_t min_p, uintptr_t seeds, uintptr_t positions, uintptr_t out) {
            Workers::shared().run(count, [&](int i) {
                const int64_t row = at<int64_t>(rows)[i];
                const Draw draw{at<float>(temperature)[row], at<int32_t>(top_k)[row], at<float>(top_p)[row],
                                at<float>(min_p)[row],       at<int64_t>(seeds)[row], at<int64_t>(positions)[i]};
                at<int64_t>(out)[i] = sample_row(at<float>(logits) + size_t(i) * vocabulary, vocabulary, draw);
            });
        },
        Release());

    module.def("use_byte_products", &use_byte_products, py::arg("vectors"));
    py::class_<Matrix, std::shared_ptr<Matrix>>(module, "Matrix")
        .def(py::init(&make_matrix), Release())
        .def("multiply",
             [](const Matrix& self, uintptr_t x, int rows, uintptr_t y) {
                 self.multiply(at<float>(x), rows, at<float>(y));
             },
             Release());

    py::class_<Norm>(module, "Norm").def(py::init(&make_norm));
    py::class_<Block, std::shared_ptr<Block>>(module, "Block")
        .def(py::init([](int width, int heads, int kv_heads, int head_dim, int hidden, int window, float softcap,
                         float scale, float qk_eps, const std::string& activation, Norm attention_norm, Norm ffn_norm,
                         std::vector<float> q_norm, std::vector<float> k_norm, std::shared_ptr<Matrix> qkv,
                         std::shared_ptr<Matrix> output, std::shared_ptr<Matrix> up,
                         std::shared_ptr<Matrix> down) {
            BlockShape shape{width,   heads, kv_heads, head_dim, hidden,
                             window,  softcap, scale,  qk_eps,   activation_of(activation)};
            return new Block(shape, std::move(attention_norm), std::move(ffn_norm), std::move(q_norm),
                             std::move(k_norm), std::move(qkv), std::move(output), std::move(up), std::move(down));
        }));
    py::class_<Transformer>(module, "Transformer")
        .def(py::init([](int width, uintptr_t embedding, bool half, uintptr_t positions, bool half_positions,
                         std::vector<std::shared_ptr<Block>> blocks, Norm norm) {
            return new Transformer(width, Table{at<void>(embedding), half}, Table{at<void>(positions), half_positions},
                                   std::move(blocks), std::move(norm));
        }))
        .def("run",
             [](const Transformer& self, uintptr_t tokens, const Step& step, const std::vector<Pages>& pages,
                uintptr_t cos, uintptr_t sin, int columns, uintptr_t hidden) {
                 self.run(at<int64_t>(tokens), step, pages, Rotation{at<float>(cos), at<float>(sin), columns},
                          at<float>(hidden));
             },
             Release());
}

}  // namespace warploom
