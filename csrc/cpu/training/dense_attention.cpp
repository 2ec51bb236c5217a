#include "cpu/training/dense_attention.hpp"

#include <algorithm>
#include <cmath>

#include "simd.hpp"
#include "cpu/register_tile.hpp"
#include "cpu/training/omp_threads.hpp"
#include "cpu/training/pair_attention.hpp"

namespace warploom {

namespace {

constexpr int kLanes = 16;
constexpr int kQueries = 64;  // queries of a block: four vectors
constexpr int kKeys = 64;     // keys of a block
constexpr int kRows = 8;      // rows of a product come in multiples of this
constexpr int kAhead = 16;    // rows that memory is asked for before they are needed

// Which sums of a product are needed where a block of queries meets the keys of the same tokens.
enum class Part {
    all,
    late_columns,  // rows are keys, columns are queries: those from the row on
    early_terms,   // rows are queries, sums run over keys: those up to the row
    late_terms,    // rows are keys, sums run over queries: those from the row on
};

// c (rows, columns) [+]= a (rows, terms) · b (terms, columns); rows by eights, columns by sixteens.
struct Product {
    int rows, terms, columns;
    const float* a;
    int64_t a_row, a_term;
    const float* b;
    int64_t b_term;
    float* c;
    int64_t c_row;
    bool add;
};

// ROWS × COLUMNS sums, in registers of V's size.
template <class V, int ROWS, int COLUMNS>
WARPLOOM_INLINE void tile(const Product& p, int row, int column, int from, int to) {
    float* c = p.c + row * p.c_row + column;
    V sums[ROWS][COLUMNS / lanes_of<V>];
    p.add ? load_tile(sums, c, p.c_row) : clear_tile(sums);
    multiply_tile(sums, {p.a + row * p.a_row + from * p.a_term, p.a_row, p.a_term}, {p.b + column + from * p.b_term, kLanes, p.b_term}, to - from);
    store_tile(sums, c, p.c_row);
}

void multiply(const Product& p, Part part) {
    for (int row = 0; row < p.rows; row += kRows) {
        const int from = part == Part::late_terms ? row : 0;
        const int to = part == Part::early_terms ? std::min(p.terms, row + kRows) : p.terms;
        int column = part == Part::late_columns ? row / kLanes * kLanes : 0;
        while (column < p.columns) {
            const int left = p.columns - column;
            if (!has_avx512) {
                tile<Register, 4, 16>(p, row, column, from, to), tile<Register, 4, 16>(p, row + 4, column, from, to), column += 16;
            } else if (left >= 64) {
                tile<f16, 4, 64>(p, row, column, from, to), tile<f16, 4, 64>(p, row + 4, column, from, to), column += 64;
            } else if (left == 48) {
                tile<f16, 8, 48>(p, row, column, from, to), column += 48;
            } else if (left == 32) {
                tile<f16, 8, 32>(p, row, column, from, to), column += 32;
            } else {
                tile<f16, 8, 16>(p, row, column, from, to), column += 16;
            }
        }
    }
}

// (kQueries, width) → (width, kQueries).
void turn_over(const float* from, int width, float* to) {
    for (int row = 0; row < kQueries; row += kLanes)
        for (int column = 0; column < width; column += kLanes)
            transpose_16x16(from + row * width + column, width, to + column * kQueries + row, kQueries);
}

// `rows` rows of a head, times a factor, side by side; zeros up to `padded`.
template <class T>
WARPLOOM_INLINE void gather_rows(const T* from, int64_t stride, int rows, int padded, int width, float factor, float* to) {
    for (int row = 0; row < rows; ++row, from += stride, to += width)
        for (int c = 0; c < width; c += kLanes) {
            __builtin_prefetch(from + c + kAhead * stride);
            store(to + c, load(from + c) * factor);
        }
    std::fill(to, to + (padded - rows) * width, 0.0f);
}

template <class T>
WARPLOOM_INLINE void scatter_rows(const float* from, int rows, int width, const float* factors, float factor, T* to,
                                  int64_t stride) {
    for (int row = 0; row < rows; ++row, from += width, to += stride) {
        const float by = factors ? factors[row] : factor;
        for (int c = 0; c < width; c += kLanes) {
            __builtin_prefetch(to + c + kAhead * stride, 1);
            store(to + c, load(from + c) * by);
        }
    }
}

#define WARPLOOM_FORMAT(T)                                                                                                \
    void gather(const T* from, int64_t stride, int rows, int padded, int width, float factor, float* to) { \
        gather_rows(from, stride, rows, padded, width, factor, to);                                                       \
    }                                                                                                                     \
    void scatter(const float* from, int rows, int width, const float* factors, float factor, T* to,       \
                                 int64_t stride) {                                                                        \
        scatter_rows(from, rows, width, factors, factor, to, stride);                                                     \
    }
WARPLOOM_FORMAT(float)
WARPLOOM_FORMAT(bfloat16)

constexpr float kNumbers[kLanes] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

// Lanes whose query comes before key `key` of their own square of 16 see nothing of it.
WARPLOOM_INLINE f16 seen(f16 x, int key, float hidden) { return select(load(kNumbers) < float(key), f16{} + hidden, x); }

// Scores (keys, kQueries) of a block whose first query is key `first` become weights, not yet divided by their totals.
void weigh(float* scores, int first, int queries, float* totals, float* peaks, float* spreads) {
    for (int q = 0; q < queries; q += kLanes) {
        const int square = first + q;
        float* column = scores + q;
        for (int key = 1; key < kLanes; ++key) {
            float* at = column + (square + key) * kQueries;
            store(at, seen(load(at), key, -INFINITY));
        }
        f16 top = load(column), total = {};
        for (int key = 1; key < square + kLanes; ++key) {
            const f16 x = load(column + key * kQueries);
            top = larger(x, top);
        }
        for (int key = 0; key < square + kLanes; ++key) {
            const f16 weight = exp(load(column + key * kQueries) - top);
            store(column + key * kQueries, weight);
            total += weight;
        }
        store(totals + q, 1.0f / total);
        store(peaks + q, top);
        for (int i = 0; i < kLanes; ++i) spreads[q + i] = std::log(total[i]);
    }
}

// Scores become weights again; each query's mean of its slopes, the gradients of weights, is added to.
void weigh_again(float* scores, const float* slopes, int keys, int queries, bool diagonal,
                                 const float* peaks, const float* spreads, float* means) {
    for (int key = 0; key < keys; ++key)
        for (int q = diagonal ? key / kLanes * kLanes : 0; q < queries; q += kLanes) {
            float* score = scores + key * kQueries + q;
            f16 weight = exp(load(score) - load(peaks + q) - load(spreads + q));
            if (diagonal && q <= key) weight = seen(weight, key - q, 0);
            store(score, weight);
            store(means + q, load(means + q) + weight * load(slopes + key * kQueries + q));
        }
}

// The gradients of weights become those of scores.
void unweigh(const float* weights, float* slopes, int keys, int queries, bool diagonal,
                             const float* means) {
    for (int key = 0; key < keys; ++key)
        for (int q = diagonal ? key / kLanes * kLanes : 0; q < queries; q += kLanes) {
            float* slope = slopes + key * kQueries + q;
            store(slope, load(weights + key * kQueries + q) * (load(slope) - load(means + q)));
        }
}

int padded_to(int grain, int n) { return (n + grain - 1) / grain * grain; }

struct Scratch {
    Floats k, v, dk, dv;                            // (time, width): a key head
    Floats q, q_over, d_out, d_out_over, sums;      // (kQueries, width) and turned over: a block of queries
    Floats scores, slopes;                          // (keys, kQueries)
    float totals[kQueries], peaks[kQueries], spreads[kQueries], means[kQueries];
};

template <class F>
void take_keys(const DenseAttention<F>& t, int b, int head, int padded, Scratch& s) {
    s.k.resize(padded * t.width), s.v.resize(padded * t.width);
    gather(t.k(b, 0, head), t.k.time, t.time, padded, t.width, 1, s.k.data());
    gather(t.v(b, 0, head), t.v.time, t.time, padded, t.width, 1, s.v.data());
}

// A block of queries, or of their gradients, as it lies and turned over.
template <class F>
void take_queries(const F* from, int64_t stride, int count, int width, float factor, Floats& x, Floats& over) {
    x.resize(kQueries * width), over.resize(kQueries * width);
    gather(from, stride, count, kQueries, width, factor, x.data());
    turn_over(x.data(), width, over.data());
}

template <class F>
void forward_task(const DenseAttention<F>& t, const HeadsOf<F>& out, int b, int head, Scratch& s) {
    const int D = t.width, T = t.time, group = t.heads / t.key_heads, padded = padded_to(kKeys, T);
    s.scores.resize(padded * kQueries), s.sums.resize(kQueries * D);
    take_keys(t, b, head, padded, s);
    for (int h = head * group; h < (head + 1) * group; ++h)
        for (int first = 0; first < T; first += kQueries) {
            const int count = std::min(kQueries, T - first), queries = padded_to(kLanes, count);
            take_queries(t.q(b, first, h), t.q.time, count, D, t.scale, s.q, s.q_over);
            for (int key = 0; key <= first; key += kKeys)
                multiply({key < first ? kKeys : queries, D, queries, &s.k[key * D], D, 1, s.q_over.data(), kQueries,
                          &s.scores[key * kQueries], kQueries, false},
                         key < first ? Part::all : Part::late_columns);
            weigh(s.scores.data(), first, queries, s.totals, s.peaks, s.spreads);
            for (int key = 0; key <= first; key += kKeys)
                multiply({queries, key < first ? kKeys : queries, D, &s.scores[key * kQueries], 1, kQueries, &s.v[key * D],
                          D, s.sums.data(), D, key > 0},
                         key < first ? Part::all : Part::early_terms);
            scatter(s.sums.data(), count, D, s.totals, 1, out(b, first, h), out.time);
            std::copy(s.peaks, s.peaks + count, t.peaks(b, first, h));
            std::copy(s.spreads, s.spreads + count, t.spreads(b, first, h));
        }
}

template <class F>
void backward_task(const DenseAttention<F>& t, const HeadsOf<const F>& d_out, const HeadsOf<F>& dq, const HeadsOf<F>& dk,
                   const HeadsOf<F>& dv, int b, int head, Scratch& s) {
    const int D = t.width, T = t.time, group = t.heads / t.key_heads, padded = padded_to(kKeys, T);
    s.dk.assign(padded * D, 0), s.dv.assign(padded * D, 0);
    s.scores.resize(padded * kQueries), s.slopes.resize(padded * kQueries), s.sums.resize(kQueries * D);
    take_keys(t, b, head, padded, s);
    for (int h = head * group; h < (head + 1) * group; ++h)
        for (int first = 0; first < T; first += kQueries) {
            const int count = std::min(kQueries, T - first), queries = padded_to(kLanes, count);
            take_queries(t.q(b, first, h), t.q.time, count, D, t.scale, s.q, s.q_over);
            take_queries(d_out(b, first, h), d_out.time, count, D, 1, s.d_out, s.d_out_over);
            for (float* row : {s.peaks, s.spreads, s.means}) std::fill(row, row + kQueries, 0.0f);
            std::copy(t.peaks(b, first, h), t.peaks(b, first, h) + count, s.peaks);
            std::copy(t.spreads(b, first, h), t.spreads(b, first, h) + count, s.spreads);
            for (int key = 0; key <= first; key += kKeys) {
                const bool own = key == first;
                const int keys = own ? queries : kKeys;
                const Part of_scores = own ? Part::late_columns : Part::all;
                float *scores = &s.scores[key * kQueries], *slopes = &s.slopes[key * kQueries];
                multiply({keys, D, queries, &s.k[key * D], D, 1, s.q_over.data(), kQueries, scores, kQueries, false},
                         of_scores);
                multiply({keys, D, queries, &s.v[key * D], D, 1, s.d_out_over.data(), kQueries, slopes, kQueries, false},
                         of_scores);
                weigh_again(scores, slopes, keys, queries, own, s.peaks, s.spreads, s.means);
            }
            for (int key = 0; key <= first; key += kKeys) {
                const bool own = key == first;
                const int keys = own ? queries : kKeys;
                const Part of_keys = own ? Part::late_terms : Part::all;
                float *weights = &s.scores[key * kQueries], *slopes = &s.slopes[key * kQueries];
                unweigh(weights, slopes, keys, queries, own, s.means);
                multiply({keys, queries, D, weights, kQueries, 1, s.d_out.data(), D, &s.dv[key * D], D, true}, of_keys);
                multiply({keys, queries, D, slopes, kQueries, 1, s.q.data(), D, &s.dk[key * D], D, true}, of_keys);
                multiply({queries, keys, D, slopes, 1, kQueries, &s.k[key * D], D, s.sums.data(), D, key > 0},
                         own ? Part::early_terms : Part::all);
            }
            scatter(s.sums.data(), count, D, nullptr, t.scale, dq(b, first, h), dq.time);
        }
    scatter(s.dk.data(), T, D, nullptr, 1, dk(b, 0, head), dk.time);
    scatter(s.dv.data(), T, D, nullptr, 1, dv(b, 0, head), dv.time);
}

thread_local Scratch scratch;

}  // namespace

template <class F>
void DenseAttention<F>::forward(HeadsOf<F> out) const {
    parallel_for(batch * key_heads, [&](int task) {
        const int b = task / key_heads, head = task % key_heads;
        if constexpr (sizeof(F) == 2)
            if (has_pair_attention(width)) return pair_attention_forward(*this, out, b, head);
        forward_task(*this, out, b, head, scratch);
    });
}

template <class F>
void DenseAttention<F>::backward(HeadsOf<const F> d_out, HeadsOf<F> dq, HeadsOf<F> dk, HeadsOf<F> dv) const {
    parallel_for(batch * key_heads, [&](int task) {
        const int b = task / key_heads, head = task % key_heads;
        if constexpr (sizeof(F) == 2)
            if (has_pair_attention(width)) return pair_attention_backward(*this, d_out, dq, dk, dv, b, head);
        backward_task(*this, d_out, dq, dk, dv, b, head, scratch);
    });
}

template struct DenseAttention<float>;
template struct DenseAttention<bfloat16>;

}  // namespace warploom
