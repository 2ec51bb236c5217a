#include "cpu/serving/float_pages.hpp"

#include <algorithm>
#include <cmath>
#include <vector>

#include "cpu/register_tile.hpp"
#include "cpu/serving/online_softmax.hpp"

namespace warploom {

namespace {

constexpr int kSpan = 32;      // numbers read together; heads are padded to whole spans
constexpr int kTile = 4;       // queries that share the reading of keys and values
constexpr int kLanes = 32;     // keys that lie in the lanes of a tile

#define WARPLOOM_EVENS(a, b) WARPLOOM_SHUFFLE(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30)
#define WARPLOOM_ODDS(a, b) WARPLOOM_SHUFFLE(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31)

// Keys and values as they are read: spans of 32 as two vectors. In bfloat16 these hold the even and the odd places, so
// queries are laid out the same way, and outputs laid back.
template <class V>
WARPLOOM_INLINE void load_span(const float* p, V& a, V& b) {
    load_as(p, a), load_as(p + 16, b);
}
template <class V>
WARPLOOM_INLINE void load_span(const bfloat16* p, V& a, V& b) {
    widen_pairs(p, a, b);
}

// A row of D numbers, times a factor, as `load_span` would give it; and back.
template <class T>
WARPLOOM_INLINE void lay_out(const float* row, int D, float factor, float* to) {
    for (int d = 0; d < D; d += kSpan) {
        float span[kSpan] = {};
        std::copy(row + d, row + std::min(D, d + kSpan), span);
        const f16 a = load(span) * factor, b = load(span + 16) * factor;
        constexpr bool apart = sizeof(T) == 2;
        store(to + d, apart ? WARPLOOM_EVENS(a, b) : a);
        store(to + d + 16, apart ? WARPLOOM_ODDS(a, b) : b);
    }
}

template <class T>
WARPLOOM_INLINE void lay_back(const float* from, int D, float factor, float* row) {
    for (int d = 0; d < D; d += kSpan) {
        const f16 a = load(from + d) * factor, b = load(from + d + 16) * factor;
        constexpr bool apart = sizeof(T) == 2;
        float span[kSpan];
        store(span, apart ? WARPLOOM_ZIP(a, b, 0) : a);
        store(span + 16, apart ? WARPLOOM_ZIP(a, b, 8) : b);
        std::copy(span, span + std::min(kSpan, D - d), row + d);
    }
}

// Scratch of one thread; D padded to whole spans.
struct Scratch : Round {
    Floats queries;     // (queries, D)
    Floats rows, over;  // (row, D), (D, row): of a round, widened
};

// The scores of a query with `count` keys, sixteen at a time; what is stored beyond them means nothing.
template <class V, class T>
WARPLOOM_INLINE void dot_keys(const float* query, const T* keys, int64_t stride, int count, int D, float* scores) {
    for (int j = 0; j < count; j += 16) {
        V four[4];
        for (int i = 0; i < 4; ++i) {
            const T* key[4];
            for (int n = 0; n < 4; ++n) key[n] = keys + std::min(j + 4 * i + n, count - 1) * stride;
            V total[4] = {};
            for (int d = 0; d < D; d += kSpan) {
                const V first = load_as<V>(query + d), second = load_as<V>(query + d + 16);
                for (int n = 0; n < 4; ++n) {
                    V a, b;
                    load_span(key[n] + d, a, b);
                    total[n] += first * a;
                    total[n] += second * b;
                }
            }
            four[i] = fold_four(total, Add());
        }
        fold_sixteen(four, Add(), scores + j);
    }
}

// The scores of QUERIES queries with VECTORS vectors of keys, which lie in the lanes: `over` is (D, keys). The sums of `dot_keys`
// in their order: what is a lane there is a vector here, and the tree that adds lanes adds vectors.
template <class V, int QUERIES, int VECTORS>
WARPLOOM_INLINE void dot_tile(const float* queries, ptrdiff_t D, const float* over, ptrdiff_t keys, float* scores, ptrdiff_t row) {
    typedef V Sums[QUERIES][VECTORS];
    const auto add = [](Sums& to, const Sums& from) __attribute__((always_inline)) {
        for (int q = 0; q < QUERIES; ++q)
            for (int v = 0; v < VECTORS; ++v) to[q][v] += from[q][v];
    };
    const auto two_lanes = [&](int n, Sums& sums) __attribute__((always_inline)) {  // n and n + 2
        const float *query = queries + n, *key = over + n * keys;
        Sums more;
        for (int q = 0; q < QUERIES; ++q)
            for (int v = 0; v < VECTORS; ++v) sums[q][v] = more[q][v] = V{};
        for (ptrdiff_t d = 0; d < D; d += 16, query += 16, key += 16 * keys) {
            V x[VECTORS], y[VECTORS];
            for (int v = 0; v < VECTORS; ++v) load_as(key + v * lanes_of<V>, x[v]), load_as(key + 2 * keys + v * lanes_of<V>, y[v]);
            for (int q = 0; q < QUERIES; ++q)
                for (int v = 0; v < VECTORS; ++v) sums[q][v] += x[v] * query[q * D], more[q][v] += y[v] * query[q * D + 2];
        }
        add(sums, more);
    };
    const auto four_lanes = [&](int n, Sums& sums) __attribute__((always_inline)) {
        Sums part;
        two_lanes(n, sums), two_lanes(n + 1, part), add(sums, part);
    };
    const auto eight_lanes = [&](int n, Sums& sums) __attribute__((always_inline)) {
        Sums part;
        four_lanes(n, sums), four_lanes(n + 4, part), add(sums, part);
    };
    Sums total, half;
    eight_lanes(0, total), eight_lanes(8, half), add(total, half);
    for (int q = 0; q < QUERIES; ++q)
        for (int v = 0; v < VECTORS; ++v) store_as(scores + q * row + v * lanes_of<V>, total[q][v]);
}

// Adds weighted values to N spans of an output, which stay in registers over the whole page.
template <class V, int N, class T>
WARPLOOM_INLINE void add_values(const T* values, int64_t stride, const float* weights, int from, int to, float* out) {
    V total[2 * N];
    for (int i = 0; i < 2 * N; ++i) load_as(out + 16 * i, total[i]);
    for (int j = from; j < to; ++j)
        for (int i = 0; i < N; ++i) {
            V a, b;
            load_span(values + j * stride + kSpan * i, a, b);
            total[2 * i] += a * weights[j];
            total[2 * i + 1] += b * weights[j];
        }
    for (int i = 0; i < 2 * N; ++i) store_as(out + 16 * i, total[i]);
}
template <class V, class T>
WARPLOOM_INLINE void add_values(const T* values, int64_t stride, const float* weights, int from, int to, int D, float* out) {
    int d = 0;
    for (; d + 2 * kSpan <= D; d += 2 * kSpan) add_values<V, 2>(values + d, stride, weights, from, to, out + d);
    for (; d < D; d += kSpan) add_values<V, 1>(values + d, stride, weights, from, to, out + d);
}

// The same of kTile queries and COLUMNS columns.
template <class V, int COLUMNS>
WARPLOOM_INLINE void add_values_tile(const float* values, int count, ptrdiff_t D, const float* weights, ptrdiff_t row, float* out) {
    V sums[kTile][COLUMNS / lanes_of<V>];
    load_tile(sums, out, D);
    multiply_tile(sums, {weights, row, 1}, {values, 16, D}, count);
    store_tile(sums, out, D);
}

// A function of its own: inlined into all of attention, GCC keeps two of the sums in memory (128 for 158 GFLOP/s).
__attribute__((noinline)) void add_wide_tile(const float* values, int count, ptrdiff_t D, const float* weights, ptrdiff_t row,
                                                           float* out) {
    add_values_tile<f16, 64>(values, count, D, weights, row, out);
}
// Asks memory for numbers that are needed soon.
template <class T>
WARPLOOM_INLINE void fetch(const T* numbers, int64_t count) {
    for (int64_t i = 0; i < count; i += 64 / int(sizeof(T))) __builtin_prefetch(numbers + i);
}

// Rows of one page, widened and padded, laid out as `load_span` reads them.
template <class V, class T>
WARPLOOM_INLINE void widen_rows(const T* rows, int64_t stride, int count, int D, int padded, float* to) {
    for (int j = 0; j < count; ++j, rows += stride, to += padded) {
        int d = 0;
        for (; d + kSpan <= D; d += kSpan) {
            V a, b;
            load_span(rows + d, a, b);
            store_as(to + d, a), store_as(to + d + 16, b);
        }
        if (d == D) continue;
        float rest[kSpan];
        for (int i = 0; d + i < D; ++i) rest[i] = widen(rows[d + i]);
        lay_out<T>(rest, D - d, 1, to + d);
    }
}

// Rows become columns.
template <class R>
WARPLOOM_INLINE void transpose_keys(Scratch& s, int keys, int D) {
    for (int j = 0; j < keys; j += 16)
        for (int d = 0; d < D; d += 16) transpose_16x16<R>(&s.rows[j * D + d], D, &s.over[d * s.row + j], s.row);
}

// The scores of queries `first` to `last` with a round's keys, transposed: (D, keys). What a query does not see of them, `weigh`
// leaves out. `between(i)` is called before each tile.
template <class R, class Between>
WARPLOOM_INLINE void dot_round(int first, int last, int keys, int D, Scratch& s, const Between& between) {
    constexpr int some = lanes_of<R> == 16 ? kTile : 2, lanes = 2 * lanes_of<R>;  // of a tile that registers hold
    for (int q = first, i = 0, tile; q < last; q += tile, ++i) {
        between(i);
        tile = last - q < kTile ? 1 : kTile;
        for (int j = s.from[q] / lanes * lanes, end = std::min(keys, s.to[q + tile - 1]); j < end; j += lanes) {
            const float *queries = &s.queries[q * D], *over = &s.over[j];
            float* scores = &s.scores[q * s.row + j];
            if (tile == 1) dot_tile<R, 1, 2>(queries, D, over, s.row, scores, s.row);
            for (int n = 0; tile > 1 && n < tile; n += some)
                dot_tile<R, some, 2>(queries + n * D, D, over, s.row, scores + n * s.row, s.row);
        }
    }
}

// The values of a round, likewise: of a tile's queries, all add what all of them see together.
template <class R, class Between>
WARPLOOM_INLINE void add_round(int first, int last, int D, Scratch& s, const Between& between) {
    const float* values = s.rows.data();
    const auto alone = [&](int q, int from, int to) __attribute__((always_inline)) {
        if (from < to) add_values<SixteenIn<R>>(values, D, &s.scores[q * s.row], from, to, D, &s.outputs[q * D]);
    };
    for (int tile = first, i = 0; tile < last; tile += kTile, ++i) {
        between(i);
        const int end = std::min(tile + kTile, last);
        const int from = s.from[end - 1], to = s.to[tile];  // later queries see less before them, and more up to them
        const bool together = end - tile == kTile && from < to;
        for (int q = tile; q < end; ++q) alone(q, s.from[q], together ? from : s.to[q]);
        if (!together) continue;
        const float *rows = values + from * D, *weights = &s.scores[tile * s.row + from];
        float* out = &s.outputs[tile * D];
        constexpr int columns = lanes_of<R> == 16 ? 32 : 16;
        int d = 0;
        for (; columns == 32 && d + 64 <= D; d += 64) add_wide_tile(rows + d, to - from, D, weights, s.row, out + d);
        for (; d < D; d += columns) add_values_tile<R, columns>(rows + d, to - from, D, weights, s.row, out + d);
        for (int q = tile; q < end; ++q) alone(q, to, s.to[q]);
    }
}

template <class T, class R>
void attend(const Pages& pages, const Step& step, const AttentionOptions& options, const float* q,
                            int64_t q_stride, const QueryBlock& block, Scratch& s, float* out) {
    using V = SixteenIn<R>;
    const int size = pages.page_size, shared = options.heads / pages.kv_heads, Q = block.tokens * shared, G = block.groups;
    const int D = pages.head_dim, padded = (D + kSpan - 1) / kSpan * kSpan, all = Q * G;
    const int round = size * std::max(1, kRound / size);
    const auto place = [&](int i) {  // (token, head) of a query
        return std::pair<int64_t, int64_t>(block.first + i % Q / shared, (block.group + i / Q) * shared + i % shared);
    };
    s.begin(all, padded, (round + kLanes - 1) / kLanes * kLanes + 16);
    s.queries.resize(all * padded), s.rows.resize(s.row * padded), s.over.resize(s.row * padded);
    for (int i = 0; i < all; ++i) {
        const auto [token, head] = place(i);
        s.ends[i] = step.positions[token] + 1;
        if (options.sinks) s.peaks[i] = options.sinks[head] * kLog2e, s.totals[i * 16] = 1;
        lay_out<T>(q + token * q_stride + head * D, D, score_scale(options), &s.queries[i * padded]);
    }
    const int64_t end = s.ends[Q - 1], window = options.window > 0 ? options.window : end;
    const int64_t begin = std::max<int64_t>(0, s.ends[0] - window);
    const int32_t* table = step.table + int64_t(step.sequences[block.first]) * step.width;
    const int64_t stride = int64_t(pages.kv_heads) * D, whole = size * stride;
    const T *all_keys = static_cast<const T*>(pages.keys), *all_values = static_cast<const T*>(pages.values);
    const auto rows_of = [&](const T* side, int64_t key, int g) __attribute__((always_inline)) {
        return side + table[key / size] * whole + (block.group + g) * int64_t(D);
    };
    // A part of a page that is needed soon: in order, where all of the page is this block's; else the rows of its heads.
    const auto fetch_part = [&](const T* side, int64_t key, int g) __attribute__((always_inline)) {
        if (key >= end) return;
        const bool mine = G == pages.kv_heads;
        const T* page = mine ? side + table[key / size] * whole + int64_t(g) * size * D : rows_of(side, key, g);
        for (int j = 0; j < size; ++j) fetch(page + j * (mine ? D : stride), D);
    };
    const bool direct = Q <= kDirect && D == padded;
    for (int64_t at = begin / size * size / round * round; at < end; at += round) {
        const int keys = int(std::min<int64_t>(round, end - at)), skip = at < begin ? int(begin - at) / size * size : 0;
        s.at(at, round, window);
        // Few queries: page by page, each where it lies.
        const auto each_page = [&](const auto& work) __attribute__((always_inline)) {
            for (int start = skip; start < keys; start += size)
                for (int g = 0; g < G; ++g) {
                    work(start, g, -1, 0, 0);
                    for (int i = g * Q; i < (g + 1) * Q; ++i) {
                        const int from = std::max(0, s.from[i] - start), to = std::min(size, s.to[i] - start);
                        if (from < to) work(start, g, i, from, to);
                    }
                }
        };
        // Many: a head's rows of the whole round, widened; meanwhile a head's rows of what comes next, from key `next` on, are fetched,
        // some with each tile: of many prefetches in a row the CPU drops some.
        const auto widen_round = [&](const T* side, int g) __attribute__((always_inline)) {
            for (int start = skip; start < keys; start += size)
                widen_rows<V>(rows_of(side, at + start, g), stride, std::min(size, keys - start), D, padded, &s.rows[start * padded]);
        };
        const auto fetch_round = [&](const T* side, int64_t next, int g) __attribute__((always_inline)) {
            const int tiles = (Q + kTile - 1) / kTile;
            return [=](int tile) __attribute__((always_inline)) {
                for (int64_t key = next + tile * round / tiles; key < std::min(end, next + (tile + 1) * round / tiles); ++key)
                    fetch(rows_of(side, key, g) + key % size * stride, D);
            };
        };
        if (direct)
            each_page([&](int start, int g, int i, int, int to) __attribute__((always_inline)) {
                if (i < 0) return start + size < keys ? fetch_part(all_keys, at + start + size, g) : fetch_part(all_values, at + skip, g);
                dot_keys<V>(&s.queries[i * D], rows_of(all_keys, at + start, g), stride, to, D, &s.scores[i * s.row + start]);
            });
        for (int g = 0; g < G && !direct; ++g) {
            widen_round(all_keys, g);
            transpose_keys<R>(s, keys, padded);
            dot_round<R>(g * Q, (g + 1) * Q, keys, padded, s, fetch_round(all_values, at, g));
        }
        const auto keep = [](float* to, int, const V& weight) __attribute__((always_inline)) { store_as(to, weight); };
        weigh<V>(options.softcap, s, [&](int) { return keep; }, [](int, int) {});
        if (direct)
            each_page([&](int start, int g, int i, int from, int to) __attribute__((always_inline)) {
                if (i < 0) return fetch_part(start + size < keys ? all_values : all_keys, at + start + size, g);
                const float* weights = &s.scores[i * s.row + start];
                add_values<V>(rows_of(all_values, at + start, g), stride, weights, from, to, D, &s.outputs[i * D]);
            });
        for (int g = 0; g < G && !direct; ++g) {
            widen_round(all_values, g);
            add_round<R>(g * Q, (g + 1) * Q, padded, s, fetch_round(all_keys, at + round, g));
        }
    }
    for (int i = 0; i < all; ++i) {
        const auto [token, head] = place(i);
        const float share = 1 / sum(load(&s.totals[i * 16]));
        lay_back<T>(&s.outputs[i * padded], D, share, out + (token * options.heads + head) * D);
    }
}

}  // namespace

void attend_float_pages(const Pages& pages, const Step& step, const AttentionOptions& options, const float* q,
                        int64_t q_stride, const QueryBlock& block, float* out) {
    thread_local Scratch scratch;
    Scratch* mine = &scratch;
    asm("" : "+r"(mine));  // else GCC 12 asks for the address of a thread's own in the innermost loop
    const auto work = pages.format == Format::halves ? attend<bfloat16, Register> : attend<float, Register>;
    work(pages, step, options, q, q_stride, block, *mine, out);
}

}  // namespace warploom
