// What Python sees of the serving kernels. Tensors come as they are (array.hpp); objects keep those alive that they read.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <map>

#include "cpu/array.hpp"
#include "cpu/serving/block.hpp"
#include "cpu/serving/dense_matrix.hpp"
#include "cpu/serving/experts.hpp"
#include "cpu/index.hpp"
#include "cpu/serving/int8_pages.hpp"
#include "cpu/serving/packed_matrix.hpp"
#include "cpu/serving/sample.hpp"
#include "cpu/serving/transformer.hpp"
#include "cpu/serving/spin_pool.hpp"

namespace py = pybind11;

namespace warploom {

namespace {

using Tensor = const Array&;

int size_of(const char* name, int64_t n) {
    if (n < 1 || n > INT32_MAX) throw py::value_error(std::string(name) + " is " + std::to_string(n) + ": it must be 1 to 2^31 - 1");
    return int(n);
}

Norm make_norm(const std::string& kind, float eps, std::vector<float> weight, std::vector<float> bias) {
    const NormKind kinds = kind == "rmsnorm" ? NormKind::rms : kind == "layernorm" ? NormKind::layer : NormKind::none;
    return Norm{kinds, eps, std::move(weight), std::move(bias)};
}

Format format_of(const std::string& name) {
    return name == "int8" ? Format::int8 : name == "bfloat16" ? Format::halves : Format::floats;
}

std::shared_ptr<Matrix> make_matrix(const std::string& format, Tensor weight, Tensor bias) {
    const int outputs = size_of("outputs", weight.size(0)), columns = size_of("columns", weight.size(1));
    const float* w = weight.numbers<const float>("weight", int64_t(outputs) * columns);
    const float* b = bias.numbers_or_none<const float>("bias", outputs);
    py::gil_scoped_release unlocked;
    const Format kind = format_of(format);
    if (kind == Format::int8) return std::make_shared<PackedMatrix>(w, outputs, columns, b, Layout(), false);
    if (kind == Format::halves) return std::make_shared<DenseMatrix<bfloat16>>(w, outputs, columns, b);
    return std::make_shared<DenseMatrix<float>>(w, outputs, columns, b);
}

std::shared_ptr<DenseMatrix<float>> make_factor(const char* name, Tensor x) {
    const int outputs = size_of(name, x.size(0)), columns = size_of(name, x.size(1));
    return std::make_shared<DenseMatrix<float>>(x.numbers<const float>(name, int64_t(outputs) * columns), outputs, columns, nullptr);
}

// A of all layers packed in a matrix, and for each its first row, its first rank and s·B.
std::shared_ptr<LowRank> make_low_rank(Tensor down, const std::vector<std::tuple<int, int, Array>>& ups) {
    auto factors = std::make_shared<LowRank>(LowRank{make_factor("down", down), {}});
    for (const auto& [row, rank, up] : ups) factors->ups.push_back({row, rank, make_factor("up", up)});
    return factors;
}

void multiply(const Matrix& matrix, Tensor x, Tensor y) {
    const int64_t rows = x.count() / matrix.columns();
    const float* from = x.numbers<const float>("x", rows * matrix.columns());
    float* to = y.numbers<float>("y", rows * matrix.outputs());
    py::gil_scoped_release unlocked;
    matrix.multiply(from, int(rows), to);
}

void run_experts(const Experts& experts, Tensor x, Tensor chosen, Tensor weights, Tensor y) {
    const int tokens = size_of("tokens", chosen.size(0)), each = size_of("experts of a token", chosen.size(1));
    const int64_t width = experts.width(), all = int64_t(tokens) * each;
    const float *from = x.numbers<const float>("x", tokens * width), *w = weights.numbers<const float>("weights", all);
    const int64_t* which = chosen.numbers<const int64_t>("chosen", all);
    float* to = y.numbers<float>("y", tokens * width);
    py::gil_scoped_release unlocked;
    experts.run(from, which, w, tokens, each, to);
}

Layout make_layout(int bits, int group, bool minimum, bool rotate, const std::vector<int>& table) {
    Layout layout{bits, group, minimum, rotate, !table.empty(), {}};
    if ((bits != 4 && bits != 8) || (group != 16 && group != 32 && group != 64) ||
        (!table.empty() && (table.size() != 16 || bits != 4 || minimum)))
        throw py::value_error("no such layout of packed weights");
    if (layout.has_table) std::copy_n(table.begin(), 16, layout.table);
    return layout;
}

// A byte a code; scales, minima and units as `quantize_row` gives them; `feedback` is what it takes, or None.
void quantize_rows(Tensor weight, const Layout& layout, Tensor codes, Tensor scales, Tensor minima, Tensor units,
                   Tensor feedback) {
    const int rows = size_of("rows", weight.size(0)), columns = size_of("columns", weight.size(1));
    const int64_t groups = groups_of(layout, columns), width = groups * layout.group;
    const float* from = weight.numbers<const float>("weight", int64_t(rows) * columns);
    uint8_t* to = codes.numbers<uint8_t>("codes", rows * width);
    uint16_t *scale = scales.numbers<uint16_t>("scales", rows * groups),
             *least = minima.numbers_or_none<uint16_t>("minima", rows * groups);
    float* unit = units.numbers<float>("units", rows);
    const float* back = feedback.numbers_or_none<const float>("feedback", width * width);
    py::gil_scoped_release unlocked;
    SpinPool::shared().run(rows, [&](int row) {
        unit[row] = quantize_row(from + int64_t(row) * columns, columns, layout, to + row * width, scale + row * groups,
                                 least ? least + row * groups : nullptr, back);
    });
}

std::shared_ptr<PackedMatrix> make_packed(Tensor weight, Tensor bias, const Layout& layout, bool wide) {
    const int outputs = size_of("outputs", weight.size(0)), columns = size_of("columns", weight.size(1));
    const float* w = weight.numbers<const float>("weight", int64_t(outputs) * columns);
    const float* b = bias.numbers_or_none<const float>("bias", outputs);
    py::gil_scoped_release unlocked;
    return std::make_shared<PackedMatrix>(w, outputs, columns, b, layout, wide);
}

// Segments of rows: layout, codes, scales, minima or None, units.
using Packed = std::tuple<Layout, Array, Array, Array, Array>;

std::shared_ptr<PackedMatrix> join_packed(const std::vector<Packed>& parts, int columns, Tensor bias, bool wide) {
    size_of("columns", columns);
    std::vector<Codes> segments;
    int64_t outputs = 0;
    for (const auto& [layout, codes, scales, minima, units] : parts) {
        const int rows = size_of("rows", units.count());
        const int64_t groups = rows * int64_t(groups_of(layout, columns));
        if (layout.minimum && !minima.given()) throw py::value_error("minima are None: the layout has minima");
        segments.push_back({layout, rows, codes.numbers<const uint8_t>("codes", groups * layout.group * layout.bits / 8),
                            scales.numbers<const uint16_t>("scales", groups),
                            minima.numbers_or_none<const uint16_t>("minima", groups), units.numbers<const float>("units", rows)});
        outputs += rows;
    }
    const float* b = bias.numbers_or_none<const float>("bias", size_of("outputs", outputs));
    py::gil_scoped_release unlocked;
    return std::make_shared<PackedMatrix>(segments, columns, b, wide);
}

Step make_step(Tensor positions, Tensor sequences, Tensor slots, Tensor table) {
    const int64_t T = positions.count(), N = table.size(0), width = table.size(1);
    return {int(T), positions.numbers<const int64_t>("positions", T), sequences.numbers<const int32_t>("sequences", T),
            slots.numbers<const int64_t>("slots", T), table.numbers<const int32_t>("table", N * width), int(N), int(width)};
}

template <class T>
Pages make_pages(Tensor keys, Tensor values, Format format, int page_size, int kv_heads, int head_dim, int64_t of_page) {
    if (keys.count() % of_page) throw py::value_error("keys are not whole pages of " + std::to_string(of_page));
    return {keys.numbers<T>("keys", keys.count()), values.numbers<T>("values", keys.count()), format, page_size, kv_heads,
            head_dim, keys.count() / of_page};
}

Pages pages_of(Tensor keys, Tensor values, const std::string& name, int page_size, int kv_heads, int head_dim) {
    const Format format = format_of(name);
    size_of("page_size", page_size), size_of("kv_heads", kv_heads), size_of("head_dim", head_dim);
    const int64_t numbers = int64_t(page_size) * kv_heads * head_dim;
    if (format == Format::halves) return make_pages<bfloat16>(keys, values, format, page_size, kv_heads, head_dim, numbers);
    if (format == Format::floats) return make_pages<float>(keys, values, format, page_size, kv_heads, head_dim, numbers);
    if (page_size % kTile) throw py::value_error("pages of 8 bits hold a multiple of 16 tokens, not " + std::to_string(page_size));
    return make_pages<uint8_t>(keys, values, format, page_size, kv_heads, head_dim, int64_t(page_size) * kv_heads * ((head_dim + 15) / 16 * 16 + 4));
}

// Rows (1, T, heads, D) whose heads lie side by side; T is the step's.
const float* side(const char* name, Tensor x, const Step& step, int64_t heads, int D) {
    const float* at = x.heads<const float>(name, {1, step.tokens, heads, D});
    if (x.stride(2) != D && heads > 1) throw py::value_error(std::string(name) + ": the heads of a token must lie side by side");
    return at;
}

void write_and_attend(const Pages& pages, const Step& step, Tensor q, Tensor k, Tensor v, Tensor out, int window,
                      float softcap, float scale, Tensor sinks) {
    const int K = pages.kv_heads, D = pages.head_dim, H = size_of("heads", q.size(2));
    if (H % K) throw py::value_error("heads must be a multiple of " + std::to_string(K) + ", got " + std::to_string(H));
    const float *from = side("q", q, step, H, D), *key = side("k", k, step, K, D), *value = side("v", v, step, K, D);
    float* to = out.numbers<float>("out", int64_t(step.tokens) * H * D);
    const float* sink = sinks.numbers_or_none<const float>("sinks", H);
    py::gil_scoped_release unlocked;
    each_token(step, [&](int t) { write_page(pages, step.slots[t], key + t * k.stride(1), value + t * v.stride(1)); });
    attend_pages(pages, step, AttentionOptions{H, window, softcap, scale, sink}, from, q.stride(1), to);
}

void sample(Tensor logits, Tensor rows, Tensor temperature, Tensor top_k, Tensor top_p, Tensor min_p, Tensor seeds,
            Tensor positions, Tensor out) {
    const int64_t count = logits.size(0), all = temperature.count();
    const int vocabulary = size_of("the vocabulary", logits.size(1));
    const float* x = logits.numbers<const float>("logits", count * vocabulary);
    const int64_t* row_of = rows.numbers<const int64_t>("rows", count);
    const float *t = temperature.numbers<const float>("temperature", all), *p = top_p.numbers<const float>("top_p", all),
                *least = min_p.numbers<const float>("min_p", all);
    const int32_t* k = top_k.numbers<const int32_t>("top_k", all);
    const int64_t *seed = seeds.numbers<const int64_t>("seeds", all),
                  *place = positions.numbers<const int64_t>("positions", count);
    int64_t* to = out.numbers<int64_t>("out", count);
    py::gil_scoped_release unlocked;
    SpinPool::shared().run(int(count), [&](int i) {
        const int64_t row = within(row_of[i], all, "row");
        to[i] = sample_row(x + int64_t(i) * vocabulary, vocabulary, Draw{t[row], k[row], p[row], least[row], seed[row], place[i]});
    });
}

Table table_of(const char* name, Tensor x, int width) {
    if (!x.given()) return {nullptr, false, 0};
    const int64_t rows = x.size(0);
    if (x.holds<bfloat16>()) return {x.numbers<const bfloat16>(name, rows * width), true, rows};
    return {x.numbers<const float>(name, rows * width), false, rows};
}

Gate activation_of(const std::string& name) {
    static const std::map<std::string, Gate> kinds = {{"swiglu", Gate::silu}, {"geglu", Gate::gelu}, {"gelu", Gate::gelu},
                                                      {"gelu_erf", Gate::gelu_erf}, {"relu", Gate::relu}, {"relu2", Gate::relu2},
                                                      {"silu", Gate::silu}, {"clamped", Gate::clamped}, {"clamped_swiglu", Gate::clamped}};
    if (!kinds.count(name)) throw py::value_error("no such activation: " + name);
    return kinds.at(name);
}

QKNorm qk_norm_of(const std::string& name) {
    return name == "whole" ? QKNorm::whole : name == "after" ? QKNorm::after : QKNorm::head;
}

Residual residual_of(const std::string& name) {
    return name == "parallel" ? Residual::parallel : name == "shared" ? Residual::shared : Residual::serial;
}

}  // namespace

void bind_serving(py::module_& module) {
    module.def(
        "set_threads", [](int threads) { SpinPool::shared().resize(std::min(size_of("threads", threads), 1024)); },
        py::call_guard<py::gil_scoped_release>(), py::arg("threads"));

    py::class_<Step>(module, "Step")
        .def(py::init(&make_step), py::keep_alive<1, 2>(), py::keep_alive<1, 3>(), py::keep_alive<1, 4>(), py::keep_alive<1, 5>());
    py::class_<Pages>(module, "Pages").def(py::init(&pages_of), py::keep_alive<1, 2>(), py::keep_alive<1, 3>());
    module.def("attend_pages", &write_and_attend);
    module.def("sample", &sample);

    module.def("use_packed_loops", &use_packed_loops, py::arg("name"));
    py::class_<Layout>(module, "Layout").def(py::init(&make_layout)).def("groups", &groups_of, py::arg("columns"));
    py::class_<Matrix, std::shared_ptr<Matrix>>(module, "Matrix").def(py::init(&make_matrix)).def("multiply", &multiply);
    module.def("quantize_rows", &quantize_rows);
    py::class_<PackedMatrix, Matrix, std::shared_ptr<PackedMatrix>>(module, "PackedMatrix")
        .def(py::init(&join_packed))
        .def(py::init(&make_packed))
        .def_property_readonly("bytes", &PackedMatrix::bytes);

    py::class_<Experts>(module, "Experts")
        .def(py::init([](std::vector<std::shared_ptr<Matrix>> gate_up, std::vector<std::shared_ptr<Matrix>> down, const std::string& activation) {
            return new Experts(std::move(gate_up), std::move(down), activation_of(activation));
        }))
        .def("run", &run_experts);

    py::class_<Norm>(module, "Norm").def(py::init(&make_norm));
    py::class_<BlockNorms>(module, "BlockNorms")
        .def(py::init([](Norm attention, Norm attention_post, Norm ffn, Norm ffn_post, std::vector<float> q, std::vector<float> k) {
            return BlockNorms{std::move(attention), std::move(attention_post), std::move(ffn), std::move(ffn_post),
                              std::move(q), std::move(k)};
        }));
    py::class_<LowRank, std::shared_ptr<LowRank>>(module, "LowRank").def(py::init(&make_low_rank));
    py::class_<Block, std::shared_ptr<Block>>(module, "Block")
        .def(py::init([](BlockNorms norms, std::shared_ptr<Matrix> qkv, std::shared_ptr<Matrix> output, std::shared_ptr<Matrix> up,
                         std::shared_ptr<Matrix> down, int width, int heads, int kv_heads, int head_dim, int hidden, int window,
                         float softcap, float scale, float qk_eps, const std::string& activation, bool gated,
                         const std::string& qk_norm, const std::string& residual, float residual_scale, int rotation,
                         std::vector<float> sinks, std::vector<LowRanks> adapters) {
                 const BlockShape shape{width, heads, kv_heads, head_dim, hidden, window, softcap, scale, qk_eps,
                                        activation_of(activation), gated, qk_norm_of(qk_norm), residual_of(residual),
                                        residual_scale, rotation, std::move(sinks)};
                 return new Block(shape, std::move(norms), std::move(qkv), std::move(output), std::move(up), std::move(down),
                                  std::move(adapters));
             }),
             py::arg("norms"), py::arg("qkv"), py::arg("output"), py::arg("up"), py::arg("down"), py::kw_only(), py::arg("width"),
             py::arg("heads"), py::arg("kv_heads"), py::arg("head_dim"), py::arg("hidden"), py::arg("window"),
             py::arg("softcap"), py::arg("scale"), py::arg("qk_eps"), py::arg("activation"), py::arg("gated"),
             py::arg("qk_norm"), py::arg("residual"), py::arg("residual_scale"), py::arg("rotation"),
             py::arg("sinks"), py::arg("adapters"));
    py::class_<Transformer>(module, "Transformer")
        .def(py::init([](int width, Tensor embedding, Tensor positions, float embedding_scale,
                         std::vector<std::shared_ptr<Block>> blocks, Norm norm) {
                 return new Transformer(size_of("width", width), table_of("embedding", embedding, width), embedding_scale,
                                        table_of("positions", positions, width), std::move(blocks), std::move(norm));
             }),
             py::keep_alive<1, 3>(), py::keep_alive<1, 4>())
        .def("run", [](const Transformer& self, Tensor tokens, const Step& step, const std::vector<Pages>& pages,
                       const std::vector<std::pair<Array, Array>>& tables, Tensor growth, Tensor hidden, Tensor adapters) {
            std::vector<Rotation> rotations;
            for (const auto& [cos, sin] : tables) {
                const int64_t most = cos.size(0), columns = cos.size(1);
                rotations.push_back({cos.numbers<const float>("cos", most * columns), sin.numbers<const float>("sin", most * columns),
                                     growth.numbers_or_none<const float>("growth", most), int(columns), most});
            }
            const int32_t* chosen = adapters.numbers_or_none<const int32_t>("adapters", step.tokens);
            const int64_t* ids = tokens.numbers<const int64_t>("tokens", step.tokens);
            float* to = hidden.numbers<float>("hidden", int64_t(step.tokens) * self.width());
            py::gil_scoped_release unlocked;
            self.run(ids, step, pages, rotations, chosen, to);
        }, py::arg("tokens"), py::arg("step"), py::arg("pages"), py::arg("rotations"), py::arg("growth"), py::arg("hidden"), py::arg("adapters") = py::none());
}

}  // namespace warploom
