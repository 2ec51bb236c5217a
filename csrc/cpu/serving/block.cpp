#include "cpu/serving/block.hpp"

#include <algorithm>
#include <cmath>

#include "cpu/index.hpp"
#include "simd.hpp"
#include "cpu/serving/spin_pool.hpp"

namespace warploom {

namespace {

WARPLOOM_CLONES void normalize(const float* x, float* y, int n, NormKind kind, float eps, const float* weight,
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
    f16 squares = {};
    int i = 0;
    for (; i + 16 <= n; i += 16) squares += (load(x + i) - mean) * (load(x + i) - mean);
    float square = sum(squares);
    for (; i < n; ++i) square += (x[i] - mean) * (x[i] - mean);
    const float inverse = 1.0f / std::sqrt(square / float(n) + eps);
    for (i = 0; i < n; ++i) y[i] = (x[i] - mean) * inverse * weight[i] + (bias ? bias[i] : 0.0f);
}

void normalize(const Norm& norm, const float* x, float* y, int n) {
    normalize(x, y, n, norm.kind, norm.eps, norm.weight.data(), norm.bias.empty() ? nullptr : norm.bias.data());
}

WARPLOOM_CLONES void add(float* x, const float* y, int n) {
    for (int i = 0; i < n; ++i) x[i] += y[i];
}

WARPLOOM_INLINE f16 sigmoid(f16 x) { return 1.0f / (1.0f + exp(-x)); }

// 0.5 · (1 + tanh(u)) is sigmoid(2 u): GELU by its tanh formula without a tanh.
WARPLOOM_INLINE f16 gelu(f16 x) { return x * sigmoid(1.5957691216f * (x + 0.044715f * x * x * x)); }

WARPLOOM_INLINE f16 activate(Activation kind, f16 x) {
    if (kind == Activation::gelu) return gelu(x);
    const f16 positive = select(x > f16{}, x, f16{});
    return kind == Activation::relu ? positive : positive * positive;
}

// The hidden layer of a feed-forward in place; `up` holds gate and up when it is gated. The last lanes may be padding.
WARPLOOM_CLONES void activate(Activation kind, float* up, int hidden) {
    for (int i = 0; i < hidden; i += 16) {
        float x[16] = {}, y[16] = {};
        const int n = std::min(16, hidden - i);
        std::copy(up + i, up + i + n, x);
        if (kind == Activation::swiglu) {
            std::copy(up + hidden + i, up + hidden + i + n, y);
            const f16 gate = load(x);
            store(x, gate * sigmoid(gate) * load(y));
        } else {
            store(x, activate(kind, load(x)));
        }
        std::copy(x, x + n, up + i);
    }
}

// Half-split pairs: column i turns with column i + columns.
WARPLOOM_CLONES void rotate(float* x, int heads, int D, const float* cos, const float* sin, int columns) {
    for (int h = 0; h < heads; ++h, x += D)
        for (int i = 0; i < columns; ++i) {
            const float a = x[i], b = x[i + columns];
            x[i] = a * cos[i] - b * sin[i];
            x[i + columns] = b * cos[i] + a * sin[i];
        }
}

}  // namespace

void join_and_normalize(const Norm& norm, float* stream, const float* delta, int n, float* normed) {
    add(stream, delta, n);
    normalize(norm, stream, normed, n);
}

Block::Block(BlockShape shape, Norm attention_norm, Norm ffn_norm, std::vector<float> q_norm,
             std::vector<float> k_norm, std::shared_ptr<Matrix> qkv, std::shared_ptr<Matrix> output,
             std::shared_ptr<Matrix> up, std::shared_ptr<Matrix> down)
    : shape_(shape), attention_norm_(std::move(attention_norm)), ffn_norm_(std::move(ffn_norm)),
      q_norm_(std::move(q_norm)), k_norm_(std::move(k_norm)), qkv_(std::move(qkv)), output_(std::move(output)),
      up_(std::move(up)), down_(std::move(down)) {
    const auto agree = [](const char* what, bool right) {
        if (!right) throw std::invalid_argument(std::string("the parts of a block do not fit each other: ") + what);
    };
    const auto fits = [](const Matrix& matrix, int64_t outputs, int64_t columns) {
        return matrix.outputs() == outputs && matrix.columns() == columns;
    };
    const auto weighs = [&](const Norm& norm, int n) {
        return norm.kind == NormKind::none || (int(norm.weight.size()) == n && (norm.bias.empty() || int(norm.bias.size()) == n));
    };
    const auto none_or = [](const std::vector<float>& weight, int n) { return weight.empty() || int(weight.size()) == n; };
    const int64_t C = shape.width, H = shape.heads, K = shape.kv_heads, D = shape.head_dim, F = shape.hidden;
    agree("heads", H > 0 && K > 0 && D > 0 && H % K == 0);
    agree("norms", weighs(attention_norm_, shape.width) && weighs(ffn_norm_, shape.width));
    agree("norms of heads", none_or(q_norm_, shape.head_dim) && none_or(k_norm_, shape.head_dim) && q_norm_.empty() == k_norm_.empty());
    agree("attention", fits(*qkv_, (H + 2 * K) * D, C) && fits(*output_, C, H * D));
    agree("feed-forward", fits(*up_, shape.activation == Activation::swiglu ? 2 * F : F, C) && fits(*down_, C, F));
}

// Norms and rotation of one token's queries and keys.
void Block::rope(float* qkv, int64_t position, const Rotation& rotation) const {
    const int D = shape_.head_dim;
    for (int h = 0; h < shape_.heads + shape_.kv_heads && !q_norm_.empty(); ++h) {
        const auto& weight = h < shape_.heads ? q_norm_ : k_norm_;
        normalize(qkv + h * D, qkv + h * D, D, NormKind::rms, shape_.qk_eps, weight.data(), nullptr);
    }
    within(position, rotation.rows, "position");
    if (rotation.columns)
        rotate(qkv, shape_.heads + shape_.kv_heads, D, rotation.cos + position * rotation.columns,
               rotation.sin + position * rotation.columns, rotation.columns);
}

void Block::run(float* stream, float* delta, const Step& step, const Pages& pages, const Rotation& rotation) const {
    if (pages.kv_heads != shape_.kv_heads || pages.head_dim != shape_.head_dim || 2 * rotation.columns > shape_.head_dim)
        throw std::invalid_argument("pages or a rotation of another shape than the block's heads");
    thread_local Floats normed, qkv, gathered, hidden;
    thread_local Activations prepared;
    const int T = step.tokens, C = shape_.width, D = shape_.head_dim, wide = qkv_->outputs();
    const int H = shape_.heads, K = shape_.kv_heads, inner = up_->outputs();
    normed.resize(size_t(T) * C), qkv.resize(size_t(T) * wide), gathered.resize(size_t(T) * H * D);
    hidden.resize(size_t(T) * inner);
    auto& rows = prepared;  // the caller's, whichever thread works on it
    float *x = normed.data(), *q = qkv.data(), *o = gathered.data(), *f = hidden.data();

    // What each matrix is given, row by row: made by `make(row)`, then prepared in the matrix's format.
    const auto feed = [&](const Matrix& matrix, const float* values, int64_t stride, float* y, const auto& make) {
        const int n = matrix.columns();
        rows.point(values, stride, T, n, matrix.format());
        each_row(T, [&](int t) {
            make(t);
            rows.prepare(t, n);
        });
        matrix.multiply(rows, y);
    };
    const auto join = [&](const Norm& norm) {
        return [&](int t) {
            const size_t at = size_t(t) * C;
            join_and_normalize(norm, stream + at, delta + at, C, x + at);
        };
    };
    feed(*qkv_, x, C, q, join(attention_norm_));
    each_token(step, [&](int t) {
        float* mine = q + size_t(t) * wide;
        rope(mine, step.positions[t], rotation);
        write_page(pages, step.slots[t], mine + H * D, mine + (H + K) * D);
    });
    attend_pages(pages, step, AttentionOptions{H, shape_.window, shape_.softcap, shape_.scale}, q, wide, o);
    feed(*output_, o, H * D, delta, [](int) {});
    feed(*up_, x, C, f, join(ffn_norm_));
    feed(*down_, f, inner, delta, [&](int t) { activate(shape_.activation, f + size_t(t) * inner, shape_.hidden); });
}

}  // namespace warploom
