#include "cpu/training/pointwise.hpp"

#include <algorithm>
#include <cmath>

#include "cpu/elementwise.hpp"
#include "cpu/index.hpp"
#include "cpu/training/omp_threads.hpp"

namespace warploom {

namespace {

constexpr int kMostRows = 16;

template <class T>
WARPLOOM_INLINE void norm_rows(const NormForward<T>& t, int first, int last) {
    for (int row = first; row < last; ++row) {
        const T* x = t.x[row];
        if (t.residual.at) {
            const T* residual = t.residual[row];
            T* total = t.sum[row];
            across(t.columns, [&](int c, int n) __attribute__((always_inline)) {
                store(total + c, load(x + c, n) + load(residual + c, n), n);
            });
            x = total;  // as rounded: what the next layer will see
        }
        const float inverse = inverse_deviation(x, t.columns, t.eps);
        t.inverse[row] = inverse;
        T* y = t.y[row];
        across(t.columns, [&](int c, int n) __attribute__((always_inline)) {
            store(y + c, load(x + c, n) * inverse * load(t.weight + c, n), n);
        });
    }
}

// One chunk of rows: their dx, and their share of dweight.
template <class T>
WARPLOOM_INLINE void norm_chunk(const NormBackward<T>& t, int chunk) {
    using V = SixteenIn<Register>;
    const int first = chunk * t.kChunk, last = std::min(t.rows, first + t.kChunk);
    float* partial = t.partial + int64_t(chunk) * t.columns;
    std::fill(partial, partial + t.columns, 0.0f);
    for (int row = first; row < last; ++row) {
        const T *x = t.x[row], *dy = t.dy[row], *dsum = t.dsum.at ? t.dsum[row] : nullptr;
        T *dx = t.dx[row], *y = t.y.at ? t.y[row] : nullptr;
        const float inverse = t.inverse[row];
        V dots = {};
        f16 rest = {};
        across(t.columns, [&](int c, int n) __attribute__((always_inline)) {
            if (n == 16) {
                const V slope = load_as<V>(dy + c) * (load_as<V>(x + c) * inverse);
                store_as(partial + c, load_as<V>(partial + c) + slope);
                dots += slope * load_as<V>(t.weight + c);
                return;
            }
            const f16 slope = load(dy + c, n) * (load(x + c, n) * inverse);
            store(partial + c, load(partial + c, n) + slope, n);
            rest = slope * load(t.weight + c, n);
        });
        const float mean = sum(as_f16(dots) + rest) / float(t.columns) * inverse;
        across(t.columns, [&](int c, int n) __attribute__((always_inline)) {
            f16 d = (load(dy + c, n) * load(t.weight + c, n) - load(x + c, n) * mean) * inverse;
            if (dsum) d += load(dsum + c, n);
            if (y) store(y + c, load(x + c, n) * inverse * load(t.weight + c, n), n);
            store(dx + c, d, n);
        });
    }
}

template <class T>
WARPLOOM_INLINE void reduce_chunks(const NormBackward<T>& t, int chunks) {
    across(t.columns, [&](int c, int n) __attribute__((always_inline)) {
        f16 total = {};
        for (int chunk = 0; chunk < chunks; ++chunk) total += load(t.partial + int64_t(chunk) * t.columns + c, n);
        store(t.dweight + c, total, n);
    });
}

template <Gate kind, class T>
WARPLOOM_INLINE void gate_rows(const Gating<T>& t, int first, int last) {
    for (int row = first; row < last; ++row) {
        const T *gate = t.gate[row], *up = t.up[row];
        if (!t.dy.at) {
            T* y = t.y[row];
            across(t.columns, [&](int c, int n) __attribute__((always_inline)) {
                f16 value, slope;
                activate<kind>(load(gate + c, n), value, slope);
                store(y + c, value * other_half<kind>(load(up + c, n)), n);
            });
            continue;
        }
        const T* dy = t.dy[row];
        T *dgate = t.dgate[row], *dup = t.dup[row], *y = t.y.at ? t.y[row] : nullptr;
        across(t.columns, [&](int c, int n) __attribute__((always_inline)) {
            f16 value, slope;
            activate<kind>(load(gate + c, n), value, slope);
            const f16 d = load(dy + c, n), other = load(up + c, n), u = other_half<kind>(other);
            store(dgate + c, d * u * slope, n);
            store(dup + c, where_free<kind>(other, d * value), n);
            if (y) store(y + c, value * u, n);
        });
    }
}

template <class T>
WARPLOOM_INLINE void gate_rows(const Gating<T>& t, int first, int last) {
    with_gate(t.kind, [&](auto kind) __attribute__((always_inline)) { gate_rows<kind.value>(t, first, last); });
}

template <class T>
WARPLOOM_INLINE void rope_tokens(const Rope<T>& t, int first, int last) {
    for (int token = first; token < last; ++token) {
        const int64_t time = token % t.time, position = t.positions ? t.positions[token] : time;
        const float *cos = t.cos + position * t.table_stride, *sin = t.sin + position * t.table_stride;
        const T* x = t.x + token / t.time * t.batch_stride + time * t.time_stride;
        T* y = t.y[token];
        for (int head = 0; head < t.heads; ++head, x += t.head_stride, y += t.width) {
            rotate_head(x, y, t.half, cos, sin, t.sign);
            for (int c = 2 * t.half; c < t.width; ++c) y[c] = x[c];
        }
    }
}

// The exponentials of training's losses, and faster ones for logits that were given, in the last few columns too.
struct Exp {
    static constexpr bool in_tails = false;
    template <class V>
    WARPLOOM_INLINE V operator()(V x) const {
        return exp(x);
    }
};
struct ExpNegative {
    static constexpr bool in_tails = true;
    template <class V>
    WARPLOOM_INLINE V operator()(V x) const {
        return exp_negative(x);
    }
};

template <class T>
WARPLOOM_INLINE float row_maximum(const T* x, int classes) {
    using V = SixteenIn<Register>;
    const int whole = classes / 16 * 16;
    V top[4];  // one maximum would wait for itself
    for (V& each : top) each = V{} - INFINITY;
    int at = 0;
    for (; at + 64 <= whole; at += 64)
        for (int i = 0; i < 4; ++i) top[i] = Larger()(load_as<V>(x + at + 16 * i), top[i]);
    for (; at < whole; at += 16) top[0] = Larger()(load_as<V>(x + at), top[0]);
    if (whole && whole < classes) top[1] = Larger()(load_as<V>(x + classes - 16), top[1]);  // some of them once more
    float highest = largest(as_f16(Larger()(Larger()(top[0], top[1]), Larger()(top[2], top[3]))));
    for (int c = 0; c < classes && !whole; ++c) highest = std::max(highest, widen(x[c]));
    return highest;
}

// The sum of a row's exponentials.
template <class Exponential, class T>
WARPLOOM_INLINE float row_weight(const T* x, int classes, float highest) {
    using V = SixteenIn<Register>;
    static const float others[32] = {-INFINITY, -INFINITY, -INFINITY, -INFINITY, -INFINITY, -INFINITY, -INFINITY, -INFINITY,
                                     -INFINITY, -INFINITY, -INFINITY, -INFINITY, -INFINITY, -INFINITY, -INFINITY, -INFINITY};
    const Exponential exponential;
    const int whole = classes / 16 * 16, rest = classes - whole;
    V sums = {};
    for (int c = 0; c < whole; c += 16) sums += exponential(load_as<V>(x + c) - highest);
    const bool overlap = Exponential::in_tails && whole && rest;  // the last sixteen, without those that were added
    if (overlap) sums += exponential(load_as<V>(x + classes - 16) + load_as<V>(others + rest) - highest);
    float weight = sum(as_f16(sums));
    for (int c = whole; c < classes && !overlap; ++c) weight += std::exp(widen(x[c]) - highest);
    return weight;
}

template <class T>
WARPLOOM_INLINE float row_total(const T* x, int classes) {
    using V = SixteenIn<Register>;
    const int whole = classes / 16 * 16;
    V sums = {};
    for (int c = 0; c < whole; c += 16) sums += load_as<V>(x + c);
    float total = sum(as_f16(sums));
    for (int c = whole; c < classes; ++c) total += widen(x[c]);
    return total;
}

// Losses of a few rows, and the logarithms of their sums of exponentials. Each step for all of them, since the steps of one row wait
// for each other.
template <class Exponential, class T>
WARPLOOM_INLINE void block_losses(const CrossEntropy<T>& t, int first, int count, float* log_sums) {
    float weights[kMostRows];
    const auto each_counted = [&](auto&& step) __attribute__((always_inline)) {
        for (int i = 0; i < count; ++i)
            if (t.targets[first + i] != t.ignore) step(i, t.logits + int64_t(first + i) * t.classes);
    };
    std::fill(t.losses + first, t.losses + first + count, 0.0f);
    each_counted([&](int i, const T* x) __attribute__((always_inline)) { log_sums[i] = row_maximum(x, t.classes); });
    each_counted([&](int i, const T* x) __attribute__((always_inline)) {
        weights[i] = row_weight<Exponential>(x, t.classes, log_sums[i]);
    });
    each_counted([&](int i, const T* x) __attribute__((always_inline)) {
        const float log_sum = log_sums[i] += std::log(weights[i]);
        float& loss = t.losses[first + i];
        loss = log_sum - (1.0f - t.smoothing) * widen(x[t.targets[first + i]]) + t.z * log_sum * log_sum;
        if (t.smoothing != 0) loss -= t.smoothing / t.classes * row_total(x, t.classes);
    });
}

template <class Exponential, class T>
WARPLOOM_INLINE void row_gradient(const CrossEntropy<T>& t, int row, float log_sum) {
    using V = SixteenIn<Register>;
    const T* x = t.logits + int64_t(row) * t.classes;
    T* dx = (t.gradient ? t.gradient : t.logits) + int64_t(row) * t.classes;
    const int64_t target = t.targets[row];
    if (target == t.ignore) {
        std::fill(dx, dx + t.classes, T{});
        return;
    }
    const float hard = 1.0f - t.smoothing, soft = t.smoothing / t.classes;
    const float scale = t.upstream[row], factor = scale * (1.0f + 2.0f * t.z * log_sum);
    const float at_target = factor * std::exp(widen(x[target]) - log_sum) - scale * (soft + hard);
    const int whole = t.classes / 16 * 16, n = t.classes - whole;
    const auto sixteen = [&](int c) __attribute__((always_inline)) {
        store_as(dx + c, Exponential()(load_as<V>(x + c) - log_sum) * factor - scale * soft);
    };
    for (int c = 0; c < whole; c += 16) sixteen(c);
    if (Exponential::in_tails && whole && n && dx != x) sixteen(t.classes - 16);
    else if (n) store(dx + whole, exp(load(x + whole, n) - log_sum) * factor - scale * soft, n);
    narrow(at_target, dx[target]);
}

template <class Exponential, class T>
WARPLOOM_INLINE void entropy_rows(const CrossEntropy<T>& t, int first, int last) {
    const int most = std::min(kMostRows, std::max(1, 4096 / std::max(1, t.classes)));  // which the first cache holds
    for (int row = first; row < last; row += most) {
        const int count = std::min(most, last - row);
        float own[kMostRows], *log_sums = t.log_sums ? t.log_sums + row : own;
        if (t.losses) block_losses<Exponential>(t, row, count, log_sums);
        if (!t.upstream) continue;
        for (int i = 0; i < count; ++i) row_gradient<Exponential>(t, row + i, log_sums[i]);
    }
}

template <class T>
WARPLOOM_INLINE void entropy_rows(const CrossEntropy<T>& t, int first, int last) {
    // Only logits that were given come with log_sums; the head's tiles (HeadLoss) have none and keep training's bits.
    if (t.log_sums) return entropy_rows<ExpNegative>(t, first, last);
    entropy_rows<Exp>(t, first, last);
}

// One compiled version a CPU and a number format.
#define WARPLOOM_FORMATS(name, Pass)                                                                           \
    void name##_of(const Pass<float>& t, int first, int last) { name(t, first, last); }        \
    void name##_of(const Pass<bfloat16>& t, int first, int last) { name(t, first, last); }

WARPLOOM_FORMATS(norm_rows, NormForward)
WARPLOOM_FORMATS(gate_rows, Gating)
WARPLOOM_FORMATS(rope_tokens, Rope)
WARPLOOM_FORMATS(entropy_rows, CrossEntropy)

void norm_chunk_of(const NormBackward<float>& t, int chunk) { norm_chunk(t, chunk); }
void norm_chunk_of(const NormBackward<bfloat16>& t, int chunk) { norm_chunk(t, chunk); }
void reduce_chunks_of(const NormBackward<float>& t, int chunks) { reduce_chunks(t, chunks); }
void reduce_chunks_of(const NormBackward<bfloat16>& t, int chunks) { reduce_chunks(t, chunks); }

}  // namespace

template <class T>
void NormForward<T>::run_range(int first, int last) const {
    norm_rows_of(*this, first, last);
}

template <class T>
void NormForward<T>::run() const {
    parallel_for_rows(rows, columns, [&](int first, int last) { run_range(first, last); });
}

template <class T>
void NormBackward<T>::run_chunk(int chunk) const {
    norm_chunk_of(*this, chunk);
}

template <class T>
void NormBackward<T>::reduce() const {
    reduce_chunks_of(*this, (rows + kChunk - 1) / kChunk);
}

template <class T>
void NormBackward<T>::run() const {
    const int chunks = (rows + kChunk - 1) / kChunk;
    parallel_for(chunks, [&](int chunk) { run_chunk(chunk); });
    reduce();
}

template <class T>
void Gating<T>::run_range(int first, int last) const {
    gate_rows_of(*this, first, last);
}

template <class T>
void Gating<T>::run() const {
    parallel_for_rows(rows, columns, [&](int first, int last) { run_range(first, last); });
}

template <class T>
void Rope<T>::run_range(int first, int last) const {
    for (int token = first; token < last; ++token)
        within(positions ? positions[token] : token % time, table_rows, "position");
    rope_tokens_of(*this, first, last);
}

template <class T>
void Rope<T>::run() const {
    parallel_for_rows(batch * time, heads * width, [&](int first, int last) { run_range(first, last); });
}

template <class T>
void CrossEntropy<T>::run_range(int first, int last) const {
    for (int row = first; row < last; ++row)
        if (targets[row] != ignore) within(targets[row], classes, "target");
    entropy_rows_of(*this, first, last);
}

template <class T>
void CrossEntropy<T>::run() const {
    parallel_for_rows(rows, classes, [&](int first, int last) { run_range(first, last); });
}

#define WARPLOOM_TYPES(Pass)    \
    template struct Pass<float>; \
    template struct Pass<bfloat16>;
WARPLOOM_TYPES(NormForward)
WARPLOOM_TYPES(NormBackward)
WARPLOOM_TYPES(Gating)
WARPLOOM_TYPES(Rope)
WARPLOOM_TYPES(CrossEntropy)

}  // namespace warploom
