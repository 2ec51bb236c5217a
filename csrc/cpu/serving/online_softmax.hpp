// Attention in rounds of keys: online softmax (Milakov and Gimelshein), as FlashAttention has it.
#pragma once
#include <algorithm>
#include <cmath>
#include <vector>

#include "cpu/sixteen.hpp"

namespace warploom {

constexpr int kRound = 64;     // keys after which maxima, sums and outputs are brought up to date
constexpr int kTogether = 16;  // queries whose weights are computed side by side

// What is known of some queries after some rounds, and of the round that comes next.
struct Round {
    Floats outputs;             // (queries, width): weighted values
    Floats totals, peaks;       // (queries, 16), (queries): sums of weights, and the largest score
    Floats scores;              // (queries, row): of this round, then weights
    std::vector<int64_t> ends;  // (queries): their position + 1
    std::vector<int> from, to;  // (queries): the keys of this round that a query sees
    int width, row;

    void begin(int queries, int outputs_width, int scores_row) {
        width = outputs_width, row = scores_row;
        outputs.assign(size_t(queries) * width, 0.0f), scores.resize(size_t(queries) * row);
        totals.assign(queries * 16, 0.0f), peaks.assign(queries, -INFINITY);
        ends.resize(queries), from.resize(queries), to.resize(queries);
    }

    // The round of `count` keys that begins with key `first`.
    void at(int64_t first, int count, int64_t window) {
        for (size_t i = 0; i < ends.size(); ++i) {
            from[i] = int(std::max<int64_t>(0, ends[i] - window - first));
            to[i] = int(std::min<int64_t>(count, ends[i] - first));
        }
    }
};

// Scores of a round become weights, for up to kTogether queries from q on, and their running maxima and sums are brought up to
// date, and outputs to the new maxima. Where a query sees none of them, its scores mean nothing afterwards.
template <class V>
WARPLOOM_INLINE void weigh(float softcap, int q, int count, Round& s) {
    const ptrdiff_t row = s.row, D = s.width;
    float *scores = &s.scores[q * row], *peaks = &s.peaks[q], *totals = &s.totals[q * 16];
    ptrdiff_t end = 0;
    for (int i = 0; i < count; ++i) end = std::max<ptrdiff_t>(end, s.to[q + i]);
    if (end == 0) return;
    end = (end + 15) / 16 * 16;
    V four[4];
    for (int i = 0; i < 4; ++i) {
        V best[4];
        for (int n = 0; n < 4; ++n) {
            const int each = std::min(4 * i + n, count - 1);
            float* mine = scores + each * row;
            if (softcap > 0 && each == 4 * i + n)
                for (ptrdiff_t j = 0; j < end; j += 16) store_as(mine + j, tanh(load_as<V>(mine + j) * (1 / softcap)) * softcap);
            if (s.from[q + each] > 0) std::fill(mine, mine + std::min<ptrdiff_t>(s.from[q + each], end), -INFINITY);
            if (s.to[q + each] < end) std::fill(mine + std::max(s.to[q + each], 0), mine + end, -INFINITY);
            load_as(mine, best[n]);
            for (ptrdiff_t j = 16; j < end; j += 16) best[n] = Larger()(load_as<V>(mine + j), best[n]);
        }
        four[i] = fold_four(best, Larger());
    }
    float now[kTogether];
    fold_sixteen(four, Larger(), now);
    for (int i = 0; i < count; ++i) {
        if (!(now[i] > peaks[i])) continue;
        float* out = &s.outputs[(q + i) * D];
        const float shrink = std::exp(peaks[i] - now[i]);
        for (ptrdiff_t d = 0; d < D; d += 16) store_as(out + d, load_as<V>(out + d) * shrink);
        store_as(totals + 16 * i, load_as<V>(totals + 16 * i) * shrink);
        peaks[i] = now[i];
    }
    for (int i = 0; i < count; ++i) {
        if (s.from[q + i] >= s.to[q + i]) continue;  // its maximum may be that of no keys
        const float peak = peaks[i];
        V total = load_as<V>(totals + 16 * i);
        for (ptrdiff_t j = 0; j < end; j += 16) {
            const V weight = exp_negative(load_as<V>(scores + i * row + j) - peak);
            store_as(scores + i * row + j, weight);
            total += weight;
        }
        store_as(totals + 16 * i, total);
    }
}

}  // namespace warploom
