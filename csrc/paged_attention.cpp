#include "paged_attention.hpp"

#include <algorithm>
#include <cmath>
#include <vector>

#include "workers.hpp"

namespace warploom {

namespace {

// Scratch of one thread: the scaled queries, a key widened, scores of one page, and running sums for the heads of a group.
struct Scratch {
    std::vector<float> query, row, scores, totals, peaks;
};

template <class T>
WARPLOOM_INLINE const float* widened(const T* from, int n, float* to) {
    int i = 0;
    for (; i + 16 <= n; i += 16) store(to + i, load(from + i));
    for (; i < n; ++i) to[i] = widen(from[i]);
    return to;
}
WARPLOOM_INLINE const float* widened(const float* from, int, float*) { return from; }

// Adds weighted values to sixteen times N sums, which stay in registers over the whole page.
template <class T, int N>
WARPLOOM_INLINE void gather(const T* values, int64_t stride, const float* weights, int count, float* out) {
    f16 total[N];
    for (int i = 0; i < N; ++i) total[i] = load(out + 16 * i);
    for (int j = 0; j < count; ++j)
        for (int i = 0; i < N; ++i) total[i] += load(values + j * stride + 16 * i) * weights[j];
    for (int i = 0; i < N; ++i) store(out + 16 * i, total[i]);
}

// One page of keys for all heads of a group: scores, then the running maximum, sum and weighted values.
template <class T>
WARPLOOM_INLINE void visit_page(const Pages& pages, const Look& look, const float* queries, int group, int64_t page,
                                int kv, int from, int to, Scratch& s, float* out) {
    const int D = pages.head_dim, count = to - from, padded = (count + 15) / 16 * 16;
    const int64_t stride = int64_t(pages.kv_heads) * D;
    const int64_t first = (page * pages.page_size + from) * stride + int64_t(kv) * D;
    const T* keys = static_cast<const T*>(pages.keys) + first;
    const T* values = static_cast<const T*>(pages.values) + first;
    float* scores = s.scores.data();
    for (int j = 0; j < count; ++j) {
        const float* key = widened(keys + j * stride, D, s.row.data());
        for (int g = 0; g < group; ++g) scores[g * padded + j] = dot(queries + g * D, key, D);
    }
    for (int g = 0; g < group; ++g) {
        float* mine = scores + g * padded;
        if (look.softcap > 0)
            for (int j = 0; j < count; ++j) mine[j] = look.softcap * std::tanh(mine[j] / look.softcap);
        float peak = s.peaks[g];
        for (int j = 0; j < count; ++j) peak = std::max(peak, mine[j]);
        for (int j = count; j < padded; ++j) mine[j] = -INFINITY;
        f16 total = {};
        for (int j = 0; j < padded; j += 16) {
            f16 weight = exp(load(mine + j) - peak);
            store(mine + j, weight);
            total += weight;
        }
        if (peak > s.peaks[g]) {
            const float shrink = std::exp(s.peaks[g] - peak);
            s.totals[g] *= shrink;
            for (int d = 0; d < D; ++d) out[g * D + d] *= shrink;
            s.peaks[g] = peak;
        }
        s.totals[g] += sum(total);
    }
    for (int g = 0; g < group; ++g) {
        const float* weights = scores + g * padded;
        float* mine = out + g * D;
        int d = 0;
        for (; d + 64 <= D; d += 64) gather<T, 4>(values + d, stride, weights, count, mine + d);
        for (; d + 16 <= D; d += 16) gather<T, 1>(values + d, stride, weights, count, mine + d);
        for (; d < D; ++d)
            for (int j = 0; j < count; ++j) mine[d] += widen(values[j * stride + d]) * weights[j];
    }
}

template <class T>
WARPLOOM_INLINE void attend_one(const Pages& pages, const Step& step, const Look& look, const float* q, int token,
                                int kv, Scratch& s, float* out) {
    const int D = pages.head_dim, group = look.heads / pages.kv_heads, size = pages.page_size;
    s.query.resize(group * D), s.row.resize(D + 16), s.scores.resize(group * (size + 16));
    s.totals.assign(group, 0.0f), s.peaks.assign(group, -INFINITY);
    for (int i = 0; i < group * D; ++i) s.query[i] = q[i] * look.scale;
    std::fill(out, out + group * D, 0.0f);
    const int64_t end = step.positions[token] + 1;
    const int64_t begin = look.window > 0 ? std::max<int64_t>(0, end - look.window) : 0;
    const int32_t* table = step.table + int64_t(step.sequences[token]) * step.width;
    for (int64_t at = begin; at < end; at = (at / size + 1) * size) {
        const int from = int(at % size), to = int(std::min<int64_t>(size, from + end - at));
        visit_page<T>(pages, look, s.query.data(), group, table[at / size], kv, from, to, s, out);
    }
    for (int g = 0; g < group; ++g)
        for (int d = 0; d < D; ++d) out[g * D + d] /= s.totals[g];
}

WARPLOOM_CLONES void attend_float(const Pages& p, const Step& t, const Look& l, const float* q, int i, int kv,
                                  Scratch& s, float* out) {
    attend_one<float>(p, t, l, q, i, kv, s, out);
}

WARPLOOM_CLONES void attend_half(const Pages& p, const Step& t, const Look& l, const float* q, int i, int kv,
                                 Scratch& s, float* out) {
    attend_one<bfloat16>(p, t, l, q, i, kv, s, out);
}

template <class T>
void write_rows(T* pages, const float* rows, const Step& step, int width, int64_t stride) {
    for (int t = 0; t < step.tokens; ++t) {
        if (step.slots[t] < 0) continue;
        T* to = pages + step.slots[t] * width;
        for (int i = 0; i < width; ++i) narrow(rows[t * stride + i], to[i]);
    }
}

}  // namespace

void write_pages(const Pages& pages, const Step& step, const float* k, const float* v, int64_t k_stride,
                 int64_t v_stride) {
    const int width = pages.kv_heads * pages.head_dim;
    if (pages.half) {
        write_rows(static_cast<bfloat16*>(pages.keys), k, step, width, k_stride);
        write_rows(static_cast<bfloat16*>(pages.values), v, step, width, v_stride);
    } else {
        write_rows(static_cast<float*>(pages.keys), k, step, width, k_stride);
        write_rows(static_cast<float*>(pages.values), v, step, width, v_stride);
    }
}

void attend_pages(const Pages& pages, const Step& step, const Look& look, const float* q, int64_t q_stride,
                  float* out) {
    const int D = pages.head_dim, K = pages.kv_heads, group = look.heads / K;
    Workers::shared().run(step.tokens * K, [&](int task) {
        thread_local Scratch scratch;
        const int token = task / K, kv = task % K;
        float* mine = out + (int64_t(token) * look.heads + kv * group) * D;
        if (step.slots[token] < 0) return;  // padding
        const float* queries = q + token * q_stride + kv * group * D;
        (pages.half ? attend_half : attend_float)(pages, step, look, queries, token, kv, scratch, mine);
    });
}

}  // namespace warploom
