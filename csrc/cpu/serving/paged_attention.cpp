#include "cpu/serving/paged_attention.hpp"

#include <algorithm>
#include <cmath>
#include <vector>

#include "cpu/index.hpp"
#include "cpu/serving/int8_pages.hpp"
#include "cpu/serving/spin_pool.hpp"

namespace warploom {

namespace {

constexpr int kQueries = 16;  // queries of one task: they share the pages that it reads
constexpr int kSpan = 32;     // numbers read together; heads are padded to whole spans
constexpr int kDirect = 4;    // queries that read a page where it lies; more of them share its widened rows

#define WARPLOOM_EVENS(a, b) WARPLOOM_SHUFFLE(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30)
#define WARPLOOM_ODDS(a, b) WARPLOOM_SHUFFLE(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31)

// Keys and values as they are read: spans of 32 as two vectors. In bfloat16 these hold the even and the odd places, so
// queries are laid out the same way, and outputs laid back.
WARPLOOM_INLINE void load_span(const float* p, f16& a, f16& b) { a = load(p), b = load(p + 16); }
WARPLOOM_INLINE void load_span(const bfloat16* p, f16& a, f16& b) { widen_pairs(p, a, b); }

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

// Scratch of one thread, for the queries of a task (Q) and one page; D padded to whole spans.
struct Scratch {
    Floats queries, outputs;   // (Q, D)
    Floats scores;             // (Q, page), padded to 16
    Floats totals, peaks;      // (Q, 16), (Q)
    Floats keys, values;       // (page, D), widened
    std::vector<int> from, to; // (Q): the keys of this page that a query sees
};

// Lane by lane sums of two vectors' halves, quarters, … : four dot products end side by side.
#define WARPLOOM_BY_FOUR(a, b, c, d) a, b, c, d, a + 4, b + 4, c + 4, d + 4, a + 8, b + 8, c + 8, d + 8, a + 12, b + 12, c + 12, d + 12
WARPLOOM_INLINE f16 add_halves(f16 x, f16 y) {
    return WARPLOOM_SHUFFLE(x, y, WARPLOOM_BY_FOUR(0, 16, 1, 17)) +
           WARPLOOM_SHUFFLE(x, y, WARPLOOM_BY_FOUR(2, 18, 3, 19));
}
WARPLOOM_INLINE f16 add_quarters(f16 x, f16 y) {
    return WARPLOOM_SHUFFLE(x, y, WARPLOOM_BY_FOUR(0, 1, 16, 17)) +
           WARPLOOM_SHUFFLE(x, y, WARPLOOM_BY_FOUR(2, 3, 18, 19));
}
WARPLOOM_INLINE f16 add_lanes(f16 x, f16 y) {
    return WARPLOOM_SHUFFLE(x, y, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +
           WARPLOOM_SHUFFLE(x, y, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
}

// A query with four keys (or fewer: the last is repeated): four partial sums in each quarter of a vector.
template <class T>
WARPLOOM_INLINE f16 meet_four(const float* query, const T* keys, int64_t stride, int count, int D) {
    const T* key[4];
    for (int j = 0; j < 4; ++j) key[j] = keys + std::min(j, count - 1) * stride;
    f16 total[4] = {};
    for (int d = 0; d < D; d += kSpan) {
        const f16 first = load(query + d), second = load(query + d + 16);
        for (int j = 0; j < 4; ++j) {
            f16 a, b;
            load_span(key[j] + d, a, b);
            total[j] += first * a;
            total[j] += second * b;
        }
    }
    return add_quarters(add_halves(total[0], total[1]), add_halves(total[2], total[3]));
}

// The scores of a query with `count` keys, sixteen at a time; what is stored beyond them means nothing.
template <class T>
WARPLOOM_INLINE void meet(const float* query, const T* keys, int64_t stride, int count, int D, float* scores) {
    for (int j = 0; j < count; j += 16) {
        f16 four[4];
        for (int i = 0; i < 4; ++i) {
            const int first = std::min(j + 4 * i, count - 1);
            four[i] = meet_four(query, keys + first * stride, stride, count - first, D);
        }
        store(scores + j, add_lanes(add_lanes(four[0], four[1]), add_lanes(four[2], four[3])));
    }
}

// Adds weighted values to N spans of an output, which stay in registers over the whole page.
template <int N, class T>
WARPLOOM_INLINE void gather(const T* values, int64_t stride, const float* weights, int from, int to, float* out) {
    f16 total[2 * N];
    for (int i = 0; i < 2 * N; ++i) total[i] = load(out + 16 * i);
    for (int j = from; j < to; ++j)
        for (int i = 0; i < N; ++i) {
            f16 a, b;
            load_span(values + j * stride + kSpan * i, a, b);
            total[2 * i] += a * weights[j];
            total[2 * i + 1] += b * weights[j];
        }
    for (int i = 0; i < 2 * N; ++i) store(out + 16 * i, total[i]);
}

// A query's scores with one page become weights, and its running maximum, sum and weighted values are brought up to date.
WARPLOOM_INLINE void weigh(const Look& look, int page, int D, int q, Scratch& s) {
    const int from = s.from[q], to = s.to[q], padded = (page + 15) / 16 * 16, end = (to + 15) / 16 * 16;
    float *scores = &s.scores[q * padded], *out = &s.outputs[q * D], *totals = &s.totals[q * 16];
    if (look.softcap > 0)
        for (int j = 0; j < to; ++j) scores[j] = look.softcap * std::tanh(scores[j] / look.softcap);
    std::fill(scores, scores + from, -INFINITY);
    std::fill(scores + to, scores + end, -INFINITY);
    f16 best = load(scores);
    for (int j = 16; j < end; j += 16) {
        const f16 more = load(scores + j);
        best = select(more > best, more, best);
    }
    const float peak = std::max(s.peaks[q], largest(best));
    if (peak > s.peaks[q]) {
        const float shrink = std::exp(s.peaks[q] - peak);
        for (int d = 0; d < D; d += 16) store(out + d, load(out + d) * shrink);
        store(totals, load(totals) * shrink);
        s.peaks[q] = peak;
    }
    f16 total = load(totals);
    for (int j = 0; j < end; j += 16) {
        const f16 weight = exp(load(scores + j) - peak);
        store(scores + j, weight);
        total += weight;
    }
    store(totals, total);
}

// Queries `first` to `last` and one page, step by step: what one query waits for, the others' sums fill.
template <class T>
WARPLOOM_INLINE void visit(const Look& look, const T* keys, const T* values, int64_t stride, int page, int D,
                           int first, int last, Scratch& s) {
    const int padded = (page + 15) / 16 * 16;
    for (int q = first; q < last; ++q)
        if (s.from[q] < s.to[q])
            meet(&s.queries[q * D], keys, stride, s.to[q], D, &s.scores[q * padded]);
    for (int q = first; q < last; ++q)
        if (s.from[q] < s.to[q]) weigh(look, page, D, q, s);
    for (int q = first; q < last; ++q) {
        float *scores = &s.scores[q * padded], *out = &s.outputs[q * D];
        int d = 0;
        for (; d + 2 * kSpan <= D; d += 2 * kSpan) gather<2>(values + d, stride, scores, s.from[q], s.to[q], out + d);
        for (; d < D; d += kSpan) gather<1>(values + d, stride, scores, s.from[q], s.to[q], out + d);
    }
}

// Asks memory for numbers that are needed soon.
template <class T>
WARPLOOM_INLINE void fetch(const T* numbers, int64_t count) {
    for (int64_t i = 0; i < count; i += 64 / int(sizeof(T))) __builtin_prefetch(numbers + i);
}

// Rows of one page, widened and padded, laid out as `load_span` reads them.
template <class T>
WARPLOOM_INLINE void widen_rows(const T* rows, int64_t stride, int count, int D, int padded, float* to) {
    for (int j = 0; j < count; ++j, rows += stride, to += padded) {
        int d = 0;
        for (; d + kSpan <= D; d += kSpan) {
            f16 a, b;
            load_span(rows + d, a, b);
            store(to + d, a), store(to + d + 16, b);
        }
        if (d == D) continue;
        float rest[kSpan];
        for (int i = 0; d + i < D; ++i) rest[i] = widen(rows[d + i]);
        lay_out<T>(rest, D - d, 1, to + d);
    }
}

template <class T>
WARPLOOM_INLINE void attend_task(const Pages& pages, const Step& step, const Look& look, const float* q,
                                 int64_t q_stride, const Task& task, Scratch& s, float* out) {
    const int size = pages.page_size, shared = look.heads / pages.kv_heads, Q = task.tokens * shared;
    const int D = pages.head_dim, padded = (D + kSpan - 1) / kSpan * kSpan, all = Q * task.groups;
    const auto place = [&](int i) {  // (token, head) of a query
        return std::pair<int64_t, int64_t>(task.first + i % Q / shared, (task.group + i / Q) * shared + i % shared);
    };
    s.queries.resize(all * padded), s.outputs.assign(all * padded, 0.0f);
    s.scores.resize(all * ((size + 15) / 16 * 16));
    s.totals.assign(all * 16, 0.0f), s.peaks.assign(all, -INFINITY);
    s.from.resize(all), s.to.resize(all);
    for (int i = 0; i < all; ++i) {
        const auto [token, head] = place(i);
        lay_out<T>(q + token * q_stride + head * D, D, look.scale, &s.queries[i * padded]);
    }
    const int64_t least = step.positions[task.first] + 1, end = least + task.tokens - 1;
    const int64_t begin = look.window > 0 ? std::max<int64_t>(0, least - look.window) : 0;
    const int32_t* table = step.table + int64_t(step.sequences[task.first]) * step.width;
    const int64_t stride = int64_t(pages.kv_heads) * D, whole = size * stride;
    const T *all_keys = static_cast<const T*>(pages.keys), *all_values = static_cast<const T*>(pages.values);
    // Of the next page a part in order, where all of it is this task's; else the rows of its heads.
    const auto fetch_part = [&](int64_t page, int g) __attribute__((always_inline)) {
        const bool mine = task.groups == pages.kv_heads;
        const int64_t next = page + (mine ? int64_t(g) * size * D : (task.group + g) * int64_t(D));
        for (int j = 0; j < size; ++j) {
            const int64_t row = next + j * (mine ? D : stride);
            fetch(all_keys + row, D), fetch(all_values + row, D);
        }
    };
    for (int64_t at = begin / size * size; at < end; at += size) {
        for (int i = 0; i < all; ++i) {
            const int64_t last = least + i % Q / shared, since = look.window > 0 ? last - look.window : 0;
            s.from[i] = int(std::max<int64_t>(0, since - at)), s.to[i] = int(std::min<int64_t>(size, last - at));
        }
        const int count = int(std::min<int64_t>(size, end - at));
        const int64_t offset = table[at / size] * whole + task.group * D;
        const T *keys = all_keys + offset, *values = all_values + offset;
        if (Q <= kDirect && D == padded) {
            for (int g = 0; g < task.groups; ++g) {
                if (at + size < end) fetch_part(table[at / size + 1] * whole, g);
                visit(look, keys + g * D, values + g * D, stride, size, D, g * Q, (g + 1) * Q, s);
            }
            continue;
        }
        s.keys.resize(size * padded), s.values.resize(size * padded);
        for (int g = 0; g < task.groups; ++g) {
            widen_rows(keys + g * D, stride, count, D, padded, s.keys.data());
            widen_rows(values + g * D, stride, count, D, padded, s.values.data());
            visit<float>(look, s.keys.data(), s.values.data(), padded, size, padded, g * Q, (g + 1) * Q, s);
        }
    }
    for (int i = 0; i < all; ++i) {
        const auto [token, head] = place(i);
        const float share = 1 / sum(load(&s.totals[i * 16]));
        lay_back<T>(&s.outputs[i * padded], D, share, out + (token * look.heads + head) * D);
    }
}

WARPLOOM_CLONES void attend_float(const Pages& p, const Step& t, const Look& l, const float* q, int64_t stride,
                                  const Task& task, Scratch& s, float* out) {
    attend_task<float>(p, t, l, q, stride, task, s, out);
}

WARPLOOM_CLONES void attend_half(const Pages& p, const Step& t, const Look& l, const float* q, int64_t stride,
                                 const Task& task, Scratch& s, float* out) {
    attend_task<bfloat16>(p, t, l, q, stride, task, s, out);
}

WARPLOOM_CLONES void round_to(const float* from, int n, bfloat16* to) {
    for (int i = 0; i < n; ++i) narrow(from[i], to[i]);
}
WARPLOOM_CLONES void round_to(const float* from, int n, float* to) { std::copy(from, from + n, to); }

// All that neighbors of one sequence will look up is there.
void check_pages(const Pages& pages, const Step& step, const Look& look, int first, int last) {
    const int64_t sequence = within(step.sequences[first], step.rows, "sequence");
    within(step.positions[first], int64_t(step.width) * pages.page_size, "position");
    const int64_t end = within(step.positions[last], int64_t(step.width) * pages.page_size, "position");
    const int64_t begin = look.window > 0 ? std::max<int64_t>(0, step.positions[first] + 1 - look.window) : 0;
    const int32_t* table = step.table + sequence * step.width;
    for (int64_t at = begin / pages.page_size; at <= end / pages.page_size; ++at) within(table[at], pages.count, "page");
}

}  // namespace

void write_page(const Pages& pages, int64_t slot, const float* k, const float* v) {
    if (slot < 0) return;
    within(slot, pages.count * pages.page_size, "slot");
    if (pages.format == Format::int8) return write_int8(pages, slot, k, v);
    const int width = pages.kv_heads * pages.head_dim;
    if (pages.format == Format::halves) {
        round_to(k, width, static_cast<bfloat16*>(pages.keys) + slot * width);
        round_to(v, width, static_cast<bfloat16*>(pages.values) + slot * width);
    } else {
        round_to(k, width, static_cast<float*>(pages.keys) + slot * width);
        round_to(v, width, static_cast<float*>(pages.values) + slot * width);
    }
}

void attend_pages(const Pages& pages, const Step& step, const Look& look, const float* q, int64_t q_stride,
                  float* out) {
    const int K = pages.kv_heads, most = std::max(1, kQueries / (look.heads / K));
    thread_local std::vector<int> starts;  // of runs: neighbors of one sequence
    auto& runs = starts;                   // the caller's, whichever thread works on it
    runs.clear();
    int tokens = 0;
    for (; tokens < step.tokens && step.slots[tokens] >= 0; ++tokens) {
        const bool on = tokens > 0 && step.sequences[tokens] == step.sequences[tokens - 1] &&
                        step.positions[tokens] == step.positions[tokens - 1] + 1;
        if (!on || tokens - runs.back() == most) runs.push_back(tokens);
    }
    const int count = int(runs.size());
    runs.push_back(tokens);  // what follows is padding
    for (int run = 0; run < count; ++run) check_pages(pages, step, look, runs[run], runs[run + 1] - 1);
    // A page is one run of memory with all heads' keys, so a task takes them all where there are tasks enough.
    const int parts = count >= 4 * Workers::shared().size() ? 1 : K;
    Workers::shared().run(count * parts, [&](int number) {
        thread_local Scratch scratch;
        const int run = number / parts, first = runs[run];
        const Task task{first, runs[run + 1] - first, number % parts, K / parts};
        if (pages.format == Format::int8) return attend_int8(pages, step, look, q, q_stride, task, out);
        auto attend = pages.format == Format::halves ? attend_half : attend_float;
        asm("" : "+r"(attend));  // a call of who knows what may throw (WARPLOOM_CLONES): it takes memory
        attend(pages, step, look, q, q_stride, task, scratch, out);
    });
}

}  // namespace warploom
