#include "cpu/serving/block.hpp"

#include <algorithm>
#include <cmath>

#include "cpu/index.hpp"
#include "cpu/serving/spin_pool.hpp"

namespace warploom {

namespace {

void normalize(const float* x, float* y, int n, NormKind kind, float eps, const float* weight,
                               const float* bias) {
    float mean = 0;
    if (kind == NormKind::none) {
        std::copy(x, x + n, y);
        return;
    }
    if (kind == NormKind::layer) {
        f16 total = {};
        int i = 0;
        for (; i + 16 <= n; i += 16) total += load(x + i);
        mean = sum(total);
        for (; i < n; ++i) mean += x[i];
        mean /= float(n);
    }
    const float inverse = inverse_deviation(x, n, eps, mean);
    for (int i = 0; i < n; ++i) y[i] = (x[i] - mean) * inverse * weight[i] + (bias ? bias[i] : 0.0f);
}

void normalize(const Norm& norm, const float* x, float* y, int n) {
    normalize(x, y, n, norm.kind, norm.eps, norm.weight.data(), norm.bias.empty() ? nullptr : norm.bias.data());
}

void add(float* x, const float* y, int n) {
    for (int i = 0; i < n; ++i) x[i] += y[i];
}

void scale(float* x, float factor, int n) {
    for (int i = 0; i < n; ++i) x[i] *= factor;
}

void rotate(float* x, int heads, int D, const float* cos, const float* sin, int columns) {
    for (int h = 0; h < heads; ++h, x += D) rotate_head(x, x, columns, cos, sin);
}

}  // namespace

void gate_row(Gate gate, bool gated, float* up, int hidden) {
    with_gate(gate, [&](auto kind) __attribute__((always_inline)) {
        across(hidden, [&](int i, int n) __attribute__((always_inline)) {
            f16 value, slope;
            activate<kind.value>(load(up + i, n), value, slope);
            if (gated) value = value * other_half<kind.value>(load(up + hidden + i, n));
            store(up + i, value, n);
        });
    });
}

void join_and_normalize(const Norm& norm, float* stream, const float* delta, int n, float* normed) {
    add(stream, delta, n);
    normalize(norm, stream, normed, n);
}

Block::Block(BlockShape shape, BlockNorms norms, std::shared_ptr<Matrix> qkv, std::shared_ptr<Matrix> output,
             std::shared_ptr<Matrix> up, std::shared_ptr<Matrix> down, std::vector<LowRanks> adapters)
    : shape_(shape), norms_(std::move(norms)), qkv_(std::move(qkv)), output_(std::move(output)), up_(std::move(up)),
      down_(std::move(down)), adapters_(std::move(adapters)) {
    const auto agree = [](const char* what, bool right) {
        if (!right) throw std::invalid_argument(std::string("the parts of a block do not fit each other: ") + what);
    };
    const auto fits = [](const Matrix& matrix, int64_t outputs, int64_t columns) {
        return matrix.outputs() == outputs && matrix.columns() == columns;
    };
    const auto weighs = [&](const Norm& norm) {
        const size_t n = size_t(shape.width);
        return norm.kind == NormKind::none || (norm.weight.size() == n && (norm.bias.empty() || norm.bias.size() == n));
    };
    const int64_t C = shape.width, H = shape.heads, K = shape.kv_heads, D = shape.head_dim, F = shape.hidden;
    agree("heads", H > 0 && K > 0 && D > 0 && H % K == 0);
    agree("norms", weighs(norms_.attention) && weighs(norms_.attention_post) && weighs(norms_.ffn) && weighs(norms_.ffn_post));
    const bool whole = shape.qk_norm == QKNorm::whole;
    const int64_t q_size = norms_.q.size(), k_size = norms_.k.size();
    agree("norms of heads", (q_size == 0 && k_size == 0) || (q_size == (whole ? H * D : D) && k_size == (whole ? K * D : D)));
    agree("sinks", shape.sinks.empty() || int64_t(shape.sinks.size()) == H);
    agree("attention", fits(*qkv_, (H + 2 * K) * D, C) && fits(*output_, C, H * D));
    agree("feed-forward", fits(*up_, shape.gated ? 2 * F : F, C) && fits(*down_, C, F));
    const Matrix* matrices[] = {qkv_.get(), output_.get(), up_.get(), down_.get()};
    adapters_.resize(4);
    for (int m = 0; m < 4; ++m)
        agree("adapters", adapters_[m].size() == adapters_[0].size() &&
                              fit(adapters_[m], matrices[m]->outputs(), matrices[m]->columns()));
}

// Norms of one token's queries and keys.
void Block::normalize_heads(float* qkv) const {
    const int D = shape_.head_dim, H = shape_.heads, K = shape_.kv_heads;
    const auto rms = [&](float* x, int n, const std::vector<float>& weight) {
        normalize(x, x, n, NormKind::rms, shape_.qk_eps, weight.data(), nullptr);
    };
    if (norms_.q.empty()) return;
    if (shape_.qk_norm == QKNorm::whole) return rms(qkv, H * D, norms_.q), rms(qkv + H * D, K * D, norms_.k);
    for (int h = 0; h < H + K; ++h) rms(qkv + h * D, D, h < H ? norms_.q : norms_.k);
}

// Norms and rotation of one token's queries and keys.
void Block::rope(float* qkv, int64_t position, const Rotation& rotation) const {
    if (shape_.qk_norm != QKNorm::after) normalize_heads(qkv);
    within(position, rotation.rows, "position");
    if (rotation.growth) scale(qkv, rotation.growth[position], shape_.heads * shape_.head_dim);
    if (rotation.columns)
        rotate(qkv, shape_.heads + shape_.kv_heads, shape_.head_dim, rotation.cos + position * rotation.columns,
               rotation.sin + position * rotation.columns, rotation.columns);
    if (shape_.qk_norm == QKNorm::after) normalize_heads(qkv);
}

void Block::run(float* stream, float* delta, const Step& step, const Pages& pages, const Rotation& rotation,
                const AdapterTokens* adapted) const {
    if (pages.kv_heads != shape_.kv_heads || pages.head_dim != shape_.head_dim || 2 * rotation.columns > shape_.head_dim)
        throw std::invalid_argument("pages or a rotation of another shape than the block's heads");
    thread_local Floats normed, qkv, gathered, hidden, fed;
    thread_local Activations prepared;
    const int T = step.tokens, C = shape_.width, D = shape_.head_dim, wide = qkv_->outputs();
    const int H = shape_.heads, K = shape_.kv_heads, inner = up_->outputs();
    normed.resize(size_t(T) * C), qkv.resize(size_t(T) * wide), gathered.resize(size_t(T) * H * D);
    hidden.resize(size_t(T) * inner);
    auto& rows = prepared;  // the caller's, whichever thread works on it
    float *x = normed.data(), *q = qkv.data(), *o = gathered.data(), *f = hidden.data();

    // What each matrix is given, row by row: made by `make(row)`, then prepared in the matrix's format.
    int number = 0;
    const auto feed = [&](const Matrix& matrix, const float* values, int64_t stride, float* y, const auto& make) {
        const int n = matrix.columns();
        rows.point(values, stride, T, n, matrix.format());
        each_row(T, [&](int t) {
            make(t);
            rows.prepare(t, n);
        });
        matrix.multiply(rows, y);
        if (adapted) add_low_rank(adapters_[number], *adapted, values, stride, y, matrix.outputs());
        ++number;
    };
    const auto join = [&](const Norm& norm) {
        return [&](int t) {
            const size_t at = size_t(t) * C;
            join_and_normalize(norm, stream + at, delta + at, C, x + at);
        };
    };
    // The output of a sublayer as it joins the stream.
    const auto finish = [&](const Norm& post, float* y) {
        if (post.kind == NormKind::none && shape_.residual_scale == 1) return;
        each_row(T, [&](int t) {
            float* row = y + size_t(t) * C;
            if (post.kind != NormKind::none) normalize(post, row, row, C);
            if (shape_.residual_scale != 1) scale(row, shape_.residual_scale, C);
        });
    };
    feed(*qkv_, x, C, q, join(norms_.attention));
    each_token(step, [&](int t) {
        float* mine = q + size_t(t) * wide;
        rope(mine, step.positions[t], rotation);
        write_page(pages, step.slots[t], mine + H * D, mine + (H + K) * D);
    });
    const float* sinks = shape_.sinks.empty() ? nullptr : shape_.sinks.data();
    attend_pages(pages, step, AttentionOptions{H, shape_.window, shape_.softcap, shape_.scale, sinks}, q, wide, o);
    feed(*output_, o, H * D, delta, [](int) {});
    finish(norms_.attention_post, delta);
    const auto gate = [&](int t) { gate_row(shape_.activation, shape_.gated, f + size_t(t) * inner, shape_.hidden); };
    if (shape_.residual == Residual::serial) {
        feed(*up_, x, C, f, join(norms_.ffn));
        feed(*down_, f, inner, delta, gate);
        return finish(norms_.ffn_post, delta);
    }
    feed(*up_, x, C, f, [&](int t) {
        const size_t at = size_t(t) * C;
        if (shape_.residual == Residual::parallel) normalize(norms_.ffn, stream + at, x + at, C);
    });
    fed.resize(size_t(T) * C);
    feed(*down_, f, inner, fed.data(), gate);
    finish(norms_.ffn_post, fed.data());
    const float* more = fed.data();
    each_row(T, [&](int t) { add(delta + size_t(t) * C, more + size_t(t) * C, C); });
}

}  // namespace warploom
