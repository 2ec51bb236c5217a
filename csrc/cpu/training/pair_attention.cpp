#include "cpu/training/pair_attention.hpp"

#include <algorithm>
#include <cmath>

#include "cpu/register_tile.hpp"
#include "cpu/training/gemm.hpp"

namespace warploom {

#ifdef __AVX512F__

namespace {

constexpr int kLanes = 16;
constexpr int kQueries = 64;  // queries of a block: four vectors
constexpr int kVectors = kQueries / kLanes;
constexpr int kRows = 6;   // of a register tile: 6 × 4 sums, for an instruction's result takes some twelve cycles
constexpr int kAhead = 16;  // rows that memory is asked for before they are needed
constexpr int kKeys = 48;  // keys whose scores and slopes are made and used while they are in the first cache

using Pairs = std::vector<bfloat16, InLines<bfloat16>>;

// c (rows, columns) [+]= a (rows, pairs) · b (pairs, columns); columns by sixteens, rows and terms even.
struct Product {
    int columns;
    TileRows<bfloat16> a;
    const bfloat16* b;
    int64_t b_pair;
    float* c;
    bool add;
};

// What of a tile's rows is needed: columns from the first on, and sums over some of the terms.
struct Part {
    int column, from, to;
};

template <int ROWS, int VECTORS>
WARPLOOM_BF16 void tile(const Product& p, int row, int column, int from, int pairs) {
    float* c = p.c + row * p.columns + column;
    __m512 sums[ROWS][VECTORS];
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 8
        for (int v = 0; v < VECTORS; ++v)
            sums[r][v] = p.add ? _mm512_loadu_ps(c + r * p.columns + v * kLanes) : _mm512_setzero_ps();
    multiply_tile(sums, {p.a.at + row * p.a.row + from * p.a.term, p.a.row, p.a.term},
                  {p.b + 2 * column + from * p.b_pair, 2 * kLanes, p.b_pair}, pairs);
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 8
        for (int v = 0; v < VECTORS; ++v) _mm512_storeu_ps(c + r * p.columns + v * kLanes, sums[r][v]);
}

template <int ROWS>
void tiles(const Product& p, int row, Part part) {
    const int from = part.from / 2, pairs = (part.to + 1) / 2 - from;
    for (int column = part.column, left; (left = p.columns - column) > 0; column += std::min(left, kQueries)) {
        if (left >= 64)
            tile<ROWS, 4>(p, row, column, from, pairs);
        else if (left == 48)
            tile<ROWS, 3>(p, row, column, from, pairs);
        else if (left == 32)
            tile<ROWS, 2>(p, row, column, from, pairs);
        else
            tile<ROWS, 1>(p, row, column, from, pairs);
    }
}

// The rows from `row` to `last`; part_of(row, end) says what of those up to `end` is needed.
template <class PartOf>
void multiply(const Product& p, int row, int last, const PartOf& part_of) {
    for (; row + kRows <= last; row += kRows) tiles<kRows>(p, row, part_of(row, row + kRows));
    for (; row + 4 <= last; row += 4) tiles<4>(p, row, part_of(row, row + 4));
    for (; row < last; row += 2) tiles<2>(p, row, part_of(row, row + 2));
}

// Two vectors of floats, of neighboring terms, as sixteen pairs.
WARPLOOM_BF16 inline __m512i pairs_of(__m512 first, __m512 second) {
    const __m512i turns = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5, 20, 4,
                                           19, 3, 18, 2, 17, 1, 16, 0);
    return _mm512_permutexvar_epi16(turns, (__m512i)_mm512_cvtne2ps_pbh(second, first));
}

// `rows` rows of a head side by side, zeros up to `padded`.
WARPLOOM_BF16 void take_rows(const bfloat16* from, int64_t stride, int rows, int padded, int width, bfloat16* to) {
    for (int row = 0; row < rows; ++row, from += stride, to += width)
        for (int c = 0; c < width; c += 2 * kLanes) {
            __builtin_prefetch(from + c + kAhead * stride);
            _mm512_storeu_si512(to + c, _mm512_loadu_si512(from + c));
        }
    std::fill_n(to, int64_t(padded - rows) * width, bfloat16{0});
}

// Rows (rows, width), an even number of them, as pairs of neighboring rows (rows / 2, width).
WARPLOOM_BF16 void pair_rows(const bfloat16* from, int rows, int width, bfloat16* to) {
    for (int row = 0; row < rows; row += 2, from += 2 * width, to += 2 * width)
        for (int c = 0; c < width; c += kLanes) {
            const __m512i low = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(from + c)));
            const __m512i high = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(from + width + c)));
            _mm512_storeu_si512(to + 2 * c, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
        }
}

// A block of rows (kQueries, width) as pairs of neighboring columns (width / 2, kQueries).
void pair_columns(const bfloat16* from, int width, bfloat16* to) {
    const int words = width / 2;
    for (int row = 0; row < kQueries; row += kLanes)
        for (int word = 0; word < words; word += kLanes)
            transpose_16x16<f16>(reinterpret_cast<const float*>(from) + row * words + word, words,
                                 reinterpret_cast<float*>(to) + word * kQueries + row, kQueries);
}

WARPLOOM_BF16 void scatter(const float* from, int rows, int width, const float* factors, float factor, bfloat16* to,
                           int64_t stride) {
    for (int row = 0; row < rows; ++row, from += width, to += stride) {
        const __m512 by = _mm512_set1_ps(factors ? factors[row] : factor);
        for (int c = 0; c < width; c += kLanes) {
            __builtin_prefetch(to + c + kAhead * stride, 1);
            const __m256bh rounded = _mm512_cvtneps_pbh(_mm512_mul_ps(_mm512_loadu_ps(from + c), by));
            std::memcpy(to + c, &rounded, 32);
        }
    }
}

// 2ˣ, x ≤ 0, to about one unit in the last place.
WARPLOOM_BF16 inline __m512 exp2(__m512 x) {
    const __m512 n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), r = _mm512_sub_ps(x, n);
    __m512 p = _mm512_fmadd_ps(_mm512_set1_ps(1.3264727e-3f), r, _mm512_set1_ps(9.6715130e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.5507336e-2f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(2.4022242e-1f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(6.9314700e-1f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(p, n);
}

// Queries of vector v of a block that see a key, given the key's place from the block's first query on.
inline __mmask16 seeing(int key, int v) {
    const int hidden = key - v * kLanes;
    return hidden <= 0 ? 0xffff : hidden >= kLanes ? 0 : __mmask16(0xffff << hidden);
}

// Scores (keys, kQueries) of a block whose first query is key `first` become weights not yet divided by their totals, in pairs
// of keys.
WARPLOOM_BF16 void weigh(const float* scores, int keys, int first, float factor, bfloat16* weights, float* totals, float* peaks,
                         float* spreads) {
    const auto masked = [&](int key, int v, __m512 x) WARPLOOM_BF16 { return _mm512_maskz_mov_ps(seeing(key - first, v), x); };
    const __m512 by = _mm512_set1_ps(factor);
    __m512 top[kVectors], total[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) top[v] = _mm512_set1_ps(-INFINITY), total[v] = _mm512_setzero_ps();
    for (int key = 0; key < keys; ++key)
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) {
            const __m512 x = _mm512_mul_ps(_mm512_loadu_ps(scores + key * kQueries + v * kLanes), by);
            top[v] = _mm512_mask_max_ps(top[v], seeing(key - first, v), x, top[v]);
        }
    for (int key = 0; key < keys; key += 2, weights += 2 * kQueries)
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) {
            const float* at = scores + key * kQueries + v * kLanes;
            const __m512 x = masked(key, v, exp2(_mm512_fmsub_ps(_mm512_loadu_ps(at), by, top[v])));
            const __m512 y = masked(key + 1, v, exp2(_mm512_fmsub_ps(_mm512_loadu_ps(at + kQueries), by, top[v])));
            total[v] = _mm512_add_ps(total[v], _mm512_add_ps(x, y));
            _mm512_storeu_si512(weights + 2 * v * kLanes, pairs_of(x, y));
        }
    for (int v = 0; v < kVectors; ++v) {
        _mm512_storeu_ps(peaks + v * kLanes, top[v]);
        _mm512_storeu_ps(spreads + v * kLanes, total[v]);
    }
    for (int q = 0; q < kQueries; ++q) totals[q] = 1.0f / spreads[q], spreads[q] = std::log2(spreads[q]);
}

// Scores of some keys, the first of which is `key` from the block's first query on, become weights again, in float32 and rounded;
// each query's mean of its slopes, the gradients of weights, is added to.
WARPLOOM_BF16 void weigh_again(float* scores, const float* slopes, int keys, int key, float factor, const float* peaks,
                               const float* spreads, bfloat16* weights, float* means) {
    const __m512 by = _mm512_set1_ps(factor);
    __m512 top[kVectors], spread[kVectors], mean[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
        top[v] = _mm512_loadu_ps(peaks + v * kLanes), spread[v] = _mm512_loadu_ps(spreads + v * kLanes);
        mean[v] = _mm512_loadu_ps(means + v * kLanes);
    }
    for (int i = 0; i < keys; ++i, scores += kQueries, slopes += kQueries, weights += kQueries)
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) {
            const __mmask16 seen = seeing(key + i, v);
            const __m512 x = _mm512_sub_ps(_mm512_fmsub_ps(_mm512_loadu_ps(scores + v * kLanes), by, top[v]), spread[v]);
            const __m512 weight = _mm512_maskz_mov_ps(seen, exp2(x));
            mean[v] = _mm512_mask3_fmadd_ps(weight, _mm512_loadu_ps(slopes + v * kLanes), mean[v], seen);
            _mm512_storeu_ps(scores + v * kLanes, weight);
            const __m256bh rounded = _mm512_cvtneps_pbh(weight);
            std::memcpy(weights + v * kLanes, &rounded, 32);
        }
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) _mm512_storeu_ps(means + v * kLanes, mean[v]);
}

// The gradients of scores, as rows of a key's and in pairs of keys.
WARPLOOM_BF16 void unweigh(const float* weights, const float* slopes, int keys, int first, const float* means, bfloat16* rows,
                           bfloat16* pairs) {
    __m512 mean[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) mean[v] = _mm512_loadu_ps(means + v * kLanes);
    for (int key = 0; key < keys; key += 2, rows += 2 * kQueries, pairs += 2 * kQueries)
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) {
            const int at = key * kQueries + v * kLanes;
            const auto slope = [&](int one) WARPLOOM_BF16 {
                const __m512 centered = _mm512_sub_ps(_mm512_loadu_ps(slopes + at + one * kQueries), mean[v]);
                return _mm512_maskz_mul_ps(seeing(key + one - first, v), _mm512_loadu_ps(weights + at + one * kQueries), centered);
            };
            const __m512 x = slope(0), y = slope(1);
            _mm512_storeu_si512(pairs + 2 * v * kLanes, pairs_of(x, y));
            const __m256bh low = _mm512_cvtneps_pbh(x), high = _mm512_cvtneps_pbh(y);
            std::memcpy(rows + v * kLanes, &low, 32), std::memcpy(rows + kQueries + v * kLanes, &high, 32);
        }
}

struct Scratch {
    Pairs k, v, k_pairs, v_pairs;                                    // (time, width): a key head
    Pairs q, d_out, q_columns, d_out_columns, q_pairs, d_out_pairs;  // (kQueries, width): a block of queries
    Pairs weights, d_scores, d_score_pairs;                          // (time, kQueries)
    Floats scores, slopes, sums, dk, dv;
    float totals[kQueries], peaks[kQueries], spreads[kQueries], means[kQueries];
};
thread_local Scratch scratch;

int padded_to(int grain, int n) { return (n + grain - 1) / grain * grain; }

void take_keys(const HeadsOf<const bfloat16>& from, int time, int padded, int width, int b, int head, Pairs& rows, Pairs& pairs) {
    rows.resize(padded * width), pairs.resize(padded * width);
    take_rows(from(b, 0, head), from.time, time, padded, width, rows.data());
    pair_rows(rows.data(), padded, width, pairs.data());
}

void take_queries(const bfloat16* from, int64_t stride, int count, int width, Pairs& rows, Pairs& columns) {
    rows.resize(kQueries * width), columns.resize(kQueries * width);
    take_rows(from, stride, count, kQueries, width, rows.data());
    pair_columns(rows.data(), width, columns.data());
}

}  // namespace

bool has_pair_attention(int width) { return has_fast_pairs() && width % (2 * kLanes) == 0; }

void pair_attention_forward(const DenseAttention<bfloat16>& t, HeadsOf<bfloat16> out, int b, int head) {
    const int D = t.width, T = t.time, group = t.heads / t.key_heads, padded = padded_to(kLanes, T);
    Scratch& s = scratch;
    s.scores.resize(padded * kQueries), s.weights.resize(padded * kQueries), s.sums.resize(kQueries * D);
    take_keys(t.k, T, padded, D, b, head, s.k, s.k_pairs);
    take_keys(t.v, T, padded, D, b, head, s.v, s.v_pairs);
    for (int h = head * group; h < (head + 1) * group; ++h)
        for (int first = 0; first < T; first += kQueries) {
            const int count = std::min(kQueries, T - first), queries = padded_to(kLanes, count), keys = first + queries;
            take_queries(t.q(b, first, h), t.q.time, count, D, s.q, s.q_columns);
            multiply({kQueries, {s.k.data(), D, 2}, s.q_columns.data(), 2 * kQueries, s.scores.data(), false}, 0, keys,
                     [=](int key, int) { return Part{std::max(0, key - first) / kLanes * kLanes, 0, D}; });
            weigh(s.scores.data(), keys, first, t.scale * float(M_LOG2E), s.weights.data(), s.totals, s.peaks, s.spreads);
            multiply({D, {s.weights.data(), 2, 2 * kQueries}, s.v_pairs.data(), 2 * D, s.sums.data(), false}, 0, queries,
                     [=](int, int end) { return Part{0, 0, first + end}; });
            scatter(s.sums.data(), count, D, s.totals, 1, out(b, first, h), out.time);
            std::copy(s.peaks, s.peaks + count, t.peaks(b, first, h));
            std::copy(s.spreads, s.spreads + count, t.spreads(b, first, h));
        }
}

void pair_attention_backward(const DenseAttention<bfloat16>& t, HeadsOf<const bfloat16> d_out, HeadsOf<bfloat16> dq,
                             HeadsOf<bfloat16> dk, HeadsOf<bfloat16> dv, int b, int head) {
    const int D = t.width, T = t.time, group = t.heads / t.key_heads, padded = padded_to(kLanes, T);
    Scratch& s = scratch;
    s.dk.assign(padded * D, 0), s.dv.assign(padded * D, 0), s.sums.resize(kQueries * D);
    s.scores.resize(padded * kQueries), s.slopes.resize(padded * kQueries);
    for (Pairs* x : {&s.weights, &s.d_scores, &s.d_score_pairs}) x->resize(padded * kQueries);
    s.q_pairs.resize(kQueries * D), s.d_out_pairs.resize(kQueries * D);
    take_keys(t.k, T, padded, D, b, head, s.k, s.k_pairs);
    take_keys(t.v, T, padded, D, b, head, s.v, s.v_pairs);
    for (int h = head * group; h < (head + 1) * group; ++h)
        for (int first = 0; first < T; first += kQueries) {
            const int count = std::min(kQueries, T - first), queries = padded_to(kLanes, count), keys = first + queries;
            take_queries(t.q(b, first, h), t.q.time, count, D, s.q, s.q_columns);
            take_queries(d_out(b, first, h), d_out.time, count, D, s.d_out, s.d_out_columns);
            pair_rows(s.q.data(), kQueries, D, s.q_pairs.data());
            pair_rows(s.d_out.data(), kQueries, D, s.d_out_pairs.data());
            for (float* row : {s.peaks, s.spreads, s.means}) std::fill(row, row + kQueries, 0.0f);
            std::copy(t.peaks(b, first, h), t.peaks(b, first, h) + count, s.peaks);
            std::copy(t.spreads(b, first, h), t.spreads(b, first, h) + count, s.spreads);
            const auto columns = [=](int key, int) { return Part{std::max(0, key - first) / kLanes * kLanes, 0, D}; };
            const auto seeing = [=](int key, int) { return Part{0, std::max(0, key - first), queries}; };
            const Product scores{kQueries, {s.k.data(), D, 2}, s.q_columns.data(), 2 * kQueries, s.scores.data(), false},
                slopes{kQueries, {s.v.data(), D, 2}, s.d_out_columns.data(), 2 * kQueries, s.slopes.data(), false},
                to_v{D, {s.weights.data(), kQueries, 2}, s.d_out_pairs.data(), 2 * D, s.dv.data(), true},
                to_k{D, {s.d_scores.data(), kQueries, 2}, s.q_pairs.data(), 2 * D, s.dk.data(), true},
                to_q{D, {s.d_score_pairs.data(), 2, 2 * kQueries}, s.k_pairs.data(), 2 * D, s.sums.data(), false};
            for (int key = 0; key < keys; key += kKeys) {
                const int last = std::min(keys, key + kKeys), at = key * kQueries;
                multiply(scores, key, last, columns);
                multiply(slopes, key, last, columns);
                weigh_again(&s.scores[at], &s.slopes[at], last - key, key - first, t.scale * float(M_LOG2E), s.peaks, s.spreads,
                            &s.weights[at], s.means);
                multiply(to_v, key, last, seeing);
            }
            unweigh(s.scores.data(), s.slopes.data(), keys, first, s.means, s.d_scores.data(), s.d_score_pairs.data());
            multiply(to_k, 0, keys, seeing);
            multiply(to_q, 0, queries, [=](int, int end) { return Part{0, 0, first + end}; });
            scatter(s.sums.data(), count, D, nullptr, t.scale, dq(b, first, h), dq.time);
        }
    scatter(s.dk.data(), T, D, nullptr, t.scale, dk(b, 0, head), dk.time);
    scatter(s.dv.data(), T, D, nullptr, 1, dv(b, 0, head), dv.time);
}

#else

bool has_pair_attention(int) { return false; }
void pair_attention_forward(const DenseAttention<bfloat16>&, HeadsOf<bfloat16>, int, int) {}
void pair_attention_backward(const DenseAttention<bfloat16>&, HeadsOf<const bfloat16>, HeadsOf<bfloat16>, HeadsOf<bfloat16>,
                             HeadsOf<bfloat16>, int, int) {}

#endif

}  // namespace warploom
