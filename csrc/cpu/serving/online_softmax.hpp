// Attention in rounds of keys: online softmax (Milakov and Gimelshein), as FlashAttention has it. Scores are logarithms to base
// 2, whose powers take half the instructions of exponentials: queries and caps are multiplied by log₂ e.
#pragma once
#include <algorithm>
#include <cmath>
#include <vector>

#include "cpu/serving/paged_attention.hpp"
#include "cpu/sixteen.hpp"

namespace warploom {

constexpr int kRound = 128;   // keys after which maxima, sums and outputs are brought up to date
constexpr int kTogether = 16;  // queries whose maxima are computed side by side
constexpr float kLog2e = 1.44269504f;

// Scale of queries, by which scores are logarithms to base 2; capped scores become so afterwards.
inline float score_scale(const AttentionOptions& options) { return options.softcap > 0 ? options.scale : options.scale * kLog2e; }

// Online-softmax state of some queries: running maxima, sums and outputs, and the next round.
struct Round {
    Floats outputs;             // (queries, width): weighted values
    Floats totals, peaks;       // (queries, 16), (queries): sums of weights, and the largest score
    Floats scores;              // (queries, row): of this round, then weights
    std::vector<int64_t> ends;  // (queries): their position + 1
    std::vector<int> from, to;  // (queries): the keys of this round that a query sees
    int width, row, end;        // scores beyond `end`, a multiple of 16, are seen by none

    void begin(int queries, int outputs_width, int scores_row) {
        width = outputs_width, row = scores_row;
        outputs.assign(size_t(queries) * width, 0.0f), scores.resize(size_t(queries) * row);
        totals.assign(queries * 16, 0.0f), peaks.assign(queries, -INFINITY);
        ends.resize(queries), from.resize(queries), to.resize(queries);
    }

    // The round of `count` keys that begins with key `first`; `ends` grow from the first to the last of each head.
    void at(int64_t first, int count, int64_t window) {
        end = 0;
        if (first + count <= ends.front() && ends.back() - window <= first) {  // all see all
            std::fill(from.begin(), from.end(), 0), std::fill(to.begin(), to.end(), count);
            end = (count + 15) / 16 * 16;
            return;
        }
        for (size_t i = 0; i < ends.size(); ++i) {
            from[i] = int(std::max<int64_t>(0, ends[i] - window - first));
            to[i] = int(std::min<int64_t>(count, ends[i] - first));
            end = std::max(end, to[i]);
        }
        end = (end + 15) / 16 * 16;
    }
};

// Of the first `end` numbers, lane by lane, the largest. (In a sum of its own: an element of an array, GCC keeps it in memory.)
template <class V>
WARPLOOM_INLINE V largest_lanes(const float* x, ptrdiff_t end) {
    V most = load_as<V>(x);
    for (ptrdiff_t j = 16; j < end; j += 16) most = Larger()(load_as<V>(x + j), most);
    return most;
}

// The running maxima of up to kTogether queries from q on are brought up to date, and sums and outputs to the new maxima; scores
// that a query does not see become -infinity.
template <class V>
WARPLOOM_INLINE void raise_peaks(float softcap, int q, int count, Round& s) {
    const ptrdiff_t row = s.row, D = s.width, end = s.end;
    float *scores = &s.scores[q * row], *peaks = &s.peaks[q], *totals = &s.totals[q * 16];
    V four[4];
    for (int i = 0; i < 4; ++i) {
        V best[4];
        for (int n = 0; n < 4; ++n) {
            const int each = std::min(4 * i + n, count - 1);
            float* mine = scores + each * row;
            if (softcap > 0 && each == 4 * i + n)
                for (ptrdiff_t j = 0; j < end; j += 16) store_as(mine + j, tanh(load_as<V>(mine + j) * (1 / softcap)) * (softcap * kLog2e));
            if (s.from[q + each] > 0) std::fill(mine, mine + std::min<ptrdiff_t>(s.from[q + each], end), -INFINITY);
            if (s.to[q + each] < end) std::fill(mine + std::max(s.to[q + each], 0), mine + end, -INFINITY);
            best[n] = largest_lanes<V>(mine, end);
        }
        four[i] = fold_four(best, Larger());
    }
    float now[kTogether];
    fold_sixteen(four, Larger(), now);
    for (int i = 0; i < count; ++i) {
        if (!(now[i] > peaks[i])) continue;
        float* out = &s.outputs[(q + i) * D];
        const float shrink = std::exp2(peaks[i] - now[i]);
        for (ptrdiff_t d = 0; d < D; d += 16) store_as(out + d, load_as<V>(out + d) * shrink);
        store_as(totals + 16 * i, load_as<V>(totals + 16 * i) * shrink);
        peaks[i] = now[i];
    }
}

// Scores of a round become weights: keep(i) of query i gives a function that takes (to, j, weights), those of keys j to j + 15,
// and then(first, count) some queries' after that. Of a query that sees none of the keys, scores mean nothing.
template <class V, class Keep, class Then>
WARPLOOM_INLINE void weigh(float softcap, Round& s, const Keep& keep, const Then& then) {
    const int all = int(s.ends.size()), end = s.end;
    for (int q = 0; q < all; q += kTogether) {
        const int count = std::min(kTogether, all - q);
        raise_peaks<V>(softcap, q, count, s);
        for (int i = q; i < q + count; ++i) {
            if (s.from[i] >= s.to[i]) continue;  // its maximum may be that of no keys
            const auto keep_here = keep(i);
            float *scores = &s.scores[size_t(i) * s.row], peak = s.peaks[i];
            V total = load_as<V>(&s.totals[i * 16]);
            for (int j = 0; j < end; j += 16) {
                const V weight = exp2_negative(load_as<V>(scores + j) - peak);
                keep_here(scores + j, j, weight);
                total += weight;
            }
            store_as(&s.totals[i * 16], total);
        }
        then(q, count);
    }
}

}  // namespace warploom
