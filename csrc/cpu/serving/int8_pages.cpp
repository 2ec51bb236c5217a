#include "cpu/serving/int8_pages.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "cpu/serving/hadamard.hpp"
#include "simd.hpp"

namespace warploom {

namespace {

constexpr int kTogether = 16;       // queries whose heads walk the pages side by side
constexpr int kDirect = 4;          // queries for which memory is waited for: the next tile is requested
constexpr float kMost = 127 * 128;  // of a query's numbers: high within ±127, low within −64 … 63
constexpr float kParts = 65535;     // of the largest weight of a tile
constexpr float kLeast = 1e-30f;    // below it, nothing

int padded(int D) { return (D + 15) / 16 * 16; }
int64_t tile_bytes(int D) { return int64_t(kTile) * (D + int(sizeof(float))); }

// What a thread needs for the queries of one walk; D is padded.
struct Scratch {
    std::vector<int8_t, InLines<int8_t>> bytes;      // (queries, 2, D): high and low
    std::vector<int32_t> starts;                     // −128 · Σ query: takes the keys' offset out again
    Floats scales, outputs;                          // (queries), (queries, D)
    Floats totals, peaks;                            // (queries, 16), (queries)
    std::vector<int32_t, InLines<int32_t>> scores;   // (queries, 16)
    std::vector<uint8_t> weights;                    // (queries, 2, 16): high and low
    Floats shrink, share;                            // (queries): of what was, and a part of the weights
    Floats row;                                      // (D)
    std::vector<int32_t, InLines<int32_t>> numbers;  // (D)
    std::vector<int8_t> narrow;                      // (D)
    Floats keys, values;                             // (D, 16), (16, D): of a tile, where there are no products of bytes
};

// Sixteen numbers to whole ones. What follows is left to loops: GCC 12 lowers operators on vectors of integers before it
// knows for which CPU a clone is.
WARPLOOM_INLINE void round_to(int32_t* to, f16 x) {
    const f16 shift = f16{} + 12582912.0f;  // 1.5 · 2²³: adding it rounds to an integer
    const i16 whole = __builtin_convertvector((x + shift) - shift, i16);
    std::memcpy(to, &whole, 64);
}

WARPLOOM_INLINE float peak_of(const float* x, int n) {
    f16 most = {};
    for (int i = 0; i < n; i += 16) {
        const f16 part = load(x + i), size = part < 0.0f ? -part : part;
        most = select(size > most, size, most);
    }
    return largest(most);
}

// `D` numbers times a factor, padded with zeros.
WARPLOOM_INLINE void pad_row(const float* x, int D, float factor, float* row) {
    for (int d = 0; d < D; ++d) row[d] = x[d] * factor;
    std::fill(row + D, row + padded(D), 0.0f);
}

// `wide` numbers as whole ones of at most `most`; what one of them stands for is returned.
WARPLOOM_INLINE float round_row(const float* row, int wide, float most, int32_t* to) {
    const float peak = peak_of(row, wide), inverse = peak > 0 ? most / peak : 0;
    for (int d = 0; d < wide; d += 16) round_to(to + d, load(row + d) * inverse);
    return peak / most;
}

// A query as high and low bytes.
WARPLOOM_CLONES void split_query(const float* x, int D, float factor, int q, Scratch& s) {
    const int wide = padded(D);
    s.row.resize(wide), s.numbers.resize(wide);
    const int32_t* numbers = s.numbers.data();
    pad_row(x, D, factor, s.row.data());
    hadamard_head(s.row.data(), wide, true);
    s.scales[q] = round_row(s.row.data(), wide, kMost, s.numbers.data());
    int8_t *high = &s.bytes[size_t(q) * 2 * wide], *low = high + wide;
    int32_t total = 0;
    for (int d = 0; d < wide; ++d) high[d] = int8_t((numbers[d] + 64) >> 7), total += numbers[d];
    for (int d = 0; d < wide; ++d) low[d] = int8_t(numbers[d] - 128 * high[d]);
    s.starts[q] = -128 * total;
}

// Lane `lane` of a tile's keys and values becomes a token's.
WARPLOOM_CLONES void write_lane(const float* k, const float* v, int D, int lane, uint8_t* keys, uint8_t* values,
                                Scratch& s) {
    const int wide = padded(D), shift = lane % 4 * 8;
    s.row.resize(wide), s.numbers.resize(wide);
    const int32_t* numbers = s.numbers.data();
    pad_row(k, D, 1, s.row.data());
    hadamard_head(s.row.data(), wide, false);
    float scale = round_row(s.row.data(), wide, 127, s.numbers.data());
    s.narrow.resize(wide);
    int8_t* narrow = s.narrow.data();
    for (int d = 0; d < wide; ++d) narrow[d] = int8_t(numbers[d] ^ 128);
    for (int d = 0; d < wide; d += 4) std::memcpy(keys + d * kTile + lane * 4, narrow + d, 4);
    std::memcpy(keys + kTile * wide + lane * 4, &scale, 4);
    pad_row(v, D, 1, s.row.data());
    scale = round_row(s.row.data(), wide, 127, s.numbers.data());
    uint32_t* fours = reinterpret_cast<uint32_t*>(values + lane / 4 * 4 * wide);
    for (int d = 0; d < wide; ++d)
        fours[d] = (fours[d] & ~(0xffu << shift)) | (uint32_t(numbers[d] & 255) << shift);
    std::memcpy(values + kTile * wide + lane * 4, &scale, 4);
}

// The keys that a token sees: its own and those before it, as far as the window reaches.
struct Seen {
    int64_t since, end;
};

// Tiles of the same sixteen tokens, of neighboring heads, and who meets them: of each head's `queries` those of tokens
// `first` to `last`, of which each has `shared`.
struct Tiles {
    const uint8_t *keys, *values, *next_keys, *next_values;  // of the tokens after these; null: none
    int64_t bytes, at;                                       // of a tile; the first token
    const Seen* seen;
    int D, heads, queries, first, last, shared;

    const float* key_scales(int head) const { return scales(keys + head * bytes); }
    const float* value_scales(int head) const { return scales(values + head * bytes); }
    const float* scales(const uint8_t* tile) const { return reinterpret_cast<const float*>(tile + kTile * D); }
};

// A tile's bytes as floats.
WARPLOOM_INLINE void widen_tile(const uint8_t* keys, const uint8_t* values, int D, Scratch& s) {
    s.keys.resize(size_t(kTile) * D), s.values.resize(size_t(kTile) * D);
    for (int j = 0; j < 4; ++j) {
        for (int d = 0; d < D; d += 4) {
            const uint32_t* fours = reinterpret_cast<const uint32_t*>(keys + d * kTile);
            float* to = &s.keys[(d + j) * kTile];
            for (int t = 0; t < kTile; ++t) to[t] = float(int32_t(fours[t] >> 8 * j & 255) - 128);
        }
        for (int t = 0; t < kTile; t += 4) {
            const uint32_t* fours = reinterpret_cast<const uint32_t*>(values + t * D);
            float* to = &s.values[size_t(t + j) * D];
            for (int d = 0; d < D; ++d) to[d] = float(int32_t(fours[d] << (24 - 8 * j)) >> 24);
        }
    }
}

// The plain meaning of a visit, in floats: scores become weights; maximum, sum and weighted values are brought up to date.
WARPLOOM_INLINE void visit_query(const AttentionOptions& options, const Tiles& t, int head, const Seen& seen, int q, Scratch& s) {
    s.row.resize(t.D);
    const int8_t *high = &s.bytes[size_t(q) * 2 * t.D], *low = high + t.D;
    for (int d = 0; d < t.D; ++d) s.row[d] = float(128 * high[d] + low[d]);
    f16 total = {};
    for (int d = 0; d < t.D; ++d) total += load(&s.keys[d * kTile]) * s.row[d];
    float scores[kTile];
    store(scores, total * (load(t.key_scales(head)) * s.scales[q]));
    for (int i = 0; i < kTile; ++i) {
        if (options.softcap > 0) scores[i] = options.softcap * std::tanh(scores[i] / options.softcap);
        if (t.at + i < seen.since || t.at + i >= seen.end) scores[i] = -INFINITY;
    }
    const float peak = std::max(s.peaks[q], largest(load(scores))), shrink = std::exp(s.peaks[q] - peak);
    const f16 weight = exp(load(scores) - peak), scaled = weight * load(t.value_scales(head));
    store(&s.totals[q * kTile], load(&s.totals[q * kTile]) * shrink + weight);
    const float most = largest(scaled), inverse = most > kLeast ? kParts / most : 0;
    int32_t weights[kTile];
    round_to(weights, scaled * inverse);
    for (int d = 0; d < t.D; d += 16) {
        f16 sum = {};
        for (int i = 0; i < kTile; ++i) sum += load(&s.values[size_t(i) * t.D + d]) * float(weights[i]);
        float* out = &s.outputs[size_t(q) * t.D + d];
        store(out, load(out) * shrink + sum * (most / kParts));
    }
    s.peaks[q] = peak;
}

WARPLOOM_CLONES void visit_plain(const AttentionOptions& options, const Tiles& t, Scratch& s) {
    for (int head = 0; head < t.heads; ++head) {
        widen_tile(t.keys + head * t.bytes, t.values + head * t.bytes, t.D, s);
        int q = head * t.queries + t.first * t.shared;
        for (int token = t.first; token < t.last; ++token)
            for (int i = 0; i < t.shared; ++i) visit_query(options, t, head, t.seen[token], q++, s);
    }
}

#ifdef WARPLOOM_X86
#define WARPLOOM_VNNI __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,fma")))

// sums + unsigned · signed, four bytes a lane; a query's are the same four for all lanes. Spelled out as in int8_matrix.cpp.
WARPLOOM_VNNI inline __m512i meet_four(__m512i sums, __m512i keys, const int8_t* query) {
    asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sums) : "v"(keys), "m"(*reinterpret_cast<const int8_t(*)[4]>(query)));
    return sums;
}
WARPLOOM_VNNI inline __m512i add_four(__m512i sums, __m512i weights, __m512i values) {
    asm("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(weights), "v"(values));
    return sums;
}

template <int QUERIES>
WARPLOOM_VNNI inline void meet_some(const uint8_t* keys, int D, int q, Scratch& s) {
    __m512i high[QUERIES], low[QUERIES];
    for (int i = 0; i < QUERIES; ++i) high[i] = _mm512_setzero_si512(), low[i] = _mm512_set1_epi32(s.starts[q + i]);
    const int8_t *highs[QUERIES], *lows[QUERIES];
    for (int i = 0; i < QUERIES; ++i) highs[i] = s.bytes.data() + size_t(q + i) * 2 * D, lows[i] = highs[i] + D;
    for (size_t d = 0; d < size_t(D); d += 4) {
        const __m512i four = _mm512_loadu_si512(keys + d * kTile);
#pragma GCC unroll 4
        for (int i = 0; i < QUERIES; ++i) {
            high[i] = meet_four(high[i], four, highs[i] + d);
            low[i] = meet_four(low[i], four, lows[i] + d);
        }
    }
    for (int i = 0; i < QUERIES; ++i)
        _mm512_storeu_si512(&s.scores[(q + i) * kTile], _mm512_add_epi32(_mm512_slli_epi32(high[i], 7), low[i]));
}

// A query's products with a tile's keys become weights of its values, for the tokens from `since` to `end`.
WARPLOOM_VNNI inline void weigh(const AttentionOptions& options, __m512 key_scales, __m512 value_scales, int64_t since, int64_t end,
                                int q, Scratch& s) {
    __m512 score = _mm512_cvtepi32_ps(_mm512_loadu_si512(&s.scores[q * kTile]));
    score = _mm512_mul_ps(score, _mm512_mul_ps(key_scales, _mm512_set1_ps(s.scales[q])));
    if (options.softcap > 0) {
        float each[kTile];
        _mm512_storeu_ps(each, score);
        for (float& x : each) x = options.softcap * std::tanh(x / options.softcap);
        score = _mm512_loadu_ps(each);
    }
    const uint32_t before = since > 0 ? ~0u << since : ~0u, after = end < kTile ? ~(~0u << end) : ~0u;
    score = _mm512_mask_mov_ps(_mm512_set1_ps(-INFINITY), __mmask16(before & after), score);
    const float peak = std::max(s.peaks[q], _mm512_reduce_max_ps(score));
    f16 shrink = _mm512_set1_ps(1), weight = _mm512_sub_ps(score, _mm512_set1_ps(peak));
    if (peak > s.peaks[q]) exponentiate(shrink = _mm512_set1_ps(s.peaks[q] - peak));
    exponentiate(weight);
    const __m512 scaled = _mm512_mul_ps(weight, value_scales);
    float* totals = &s.totals[q * kTile];
    _mm512_storeu_ps(totals, _mm512_fmadd_ps(_mm512_loadu_ps(totals), shrink, weight));
    const float most = _mm512_reduce_max_ps(scaled), inverse = most > kLeast ? kParts / most : 0;
    const __m512i numbers = _mm512_cvtps_epi32(_mm512_mul_ps(scaled, _mm512_set1_ps(inverse)));
    __m128i* to = reinterpret_cast<__m128i*>(&s.weights[q * 2 * kTile]);
    _mm_storeu_si128(to, _mm512_cvtepi32_epi8(_mm512_srli_epi32(numbers, 8)));
    _mm_storeu_si128(to + 1, _mm512_cvtepi32_epi8(numbers));
    s.peaks[q] = peak, s.shrink[q] = _mm512_cvtss_f32(shrink), s.share[q] = most / kParts;
}

template <int VECTORS>
WARPLOOM_VNNI inline void gather_some(const uint8_t* values, int D, int q, int d, Scratch& s) {
    const uint8_t* weights = &s.weights[q * 2 * kTile];
    __m512i high[VECTORS], low[VECTORS];
    for (int v = 0; v < VECTORS; ++v) high[v] = low[v] = _mm512_setzero_si512();
    for (int t = 0; t < kTile; t += 4) {
        int32_t both[2];
        std::memcpy(both, weights + t, 4), std::memcpy(both + 1, weights + kTile + t, 4);
        const __m512i highs = _mm512_set1_epi32(both[0]), lows = _mm512_set1_epi32(both[1]);
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; ++v) {
            const __m512i four = _mm512_loadu_si512(values + t * D + (d + 16 * v) * 4);
            high[v] = add_four(high[v], highs, four);
            low[v] = add_four(low[v], lows, four);
        }
    }
    float* out = &s.outputs[size_t(q) * D + d];
    const __m512 share = _mm512_set1_ps(s.share[q]), shrink = _mm512_set1_ps(s.shrink[q]);
    for (int v = 0; v < VECTORS; ++v) {
        const __m512i sum = _mm512_add_epi32(_mm512_slli_epi32(high[v], 8), low[v]);
        const __m512 before = _mm512_mul_ps(_mm512_loadu_ps(out + 16 * v), shrink);
        _mm512_storeu_ps(out + 16 * v, _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), share, before));
    }
}

WARPLOOM_VNNI inline void fetch(const uint8_t* next, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(next + i);
}

// Step by step for all heads and queries: what one waits for, the others fill.
WARPLOOM_VNNI void visit_vnni(const AttentionOptions& options, const Tiles& t, Scratch& s) {
    const int some = (t.last - t.first) * t.shared;
    for (int head = 0; head < t.heads; ++head) {
        if (t.next_keys) fetch(t.next_keys + head * t.bytes, t.bytes);
        int q = head * t.queries + t.first * t.shared, end = q + some;
        for (; q + 4 <= end; q += 4) meet_some<4>(t.keys + head * t.bytes, t.D, q, s);
        for (; q < end; ++q) meet_some<1>(t.keys + head * t.bytes, t.D, q, s);
    }
    for (int head = 0; head < t.heads; ++head) {
        const __m512 keys = _mm512_loadu_ps(t.key_scales(head)), values = _mm512_loadu_ps(t.value_scales(head));
        int q = head * t.queries + t.first * t.shared;
        for (int token = t.first; token < t.last; ++token)
            for (int i = 0; i < t.shared; ++i, ++q)
                weigh(options, keys, values, t.seen[token].since - t.at, t.seen[token].end - t.at, q, s);
    }
    for (int head = 0; head < t.heads; ++head) {
        if (t.next_values) fetch(t.next_values + head * t.bytes, t.bytes);
        const uint8_t* values = t.values + head * t.bytes;
        for (int q = head * t.queries + t.first * t.shared, end = q + some; q < end; ++q) {
            int d = 0;
            for (; d + 64 <= t.D; d += 64) gather_some<4>(values, t.D, q, d, s);
            for (; d < t.D; d += 16) gather_some<1>(values, t.D, q, d, s);
        }
    }
}
#endif

using Visit = void (*)(const AttentionOptions&, const Tiles&, Scratch&);

Visit pick_visit() {
#ifdef WARPLOOM_X86
    if (__builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
        return visit_vnni;
#endif
    return visit_plain;
}

const Visit visit = pick_visit();

}  // namespace

void write_int8(const Pages& pages, int64_t slot, const float* k, const float* v) {
    thread_local Scratch scratch;
    const int D = pages.head_dim;
    const int64_t size = tile_bytes(padded(D)), at = slot / kTile * pages.kv_heads * size;
    uint8_t *keys = static_cast<uint8_t*>(pages.keys) + at, *values = static_cast<uint8_t*>(pages.values) + at;
    for (int h = 0; h < pages.kv_heads; ++h, k += D, v += D, keys += size, values += size)
        write_lane(k, v, D, int(slot % kTile), keys, values, scratch);
}

void attend_int8(const Pages& pages, const Step& step, const AttentionOptions& options, const float* q, int64_t q_stride,
                 const QueryBlock& block, float* out) {
    thread_local Scratch scratch;
    thread_local std::vector<Seen> limits;
    Scratch& s = scratch;
    auto& seen = limits;
    const int K = pages.kv_heads, shared = options.heads / K, Q = block.tokens * shared, size = pages.page_size;
    const int narrow = pages.head_dim, D = padded(narrow), together = std::max(1, kTogether / Q);
    const int64_t bytes = tile_bytes(D), tiles = size / kTile;
    const int32_t* table = step.table + int64_t(step.sequences[block.first]) * step.width;
    seen.resize(block.tokens);
    for (int t = 0; t < block.tokens; ++t) {
        const int64_t end = step.positions[block.first + t] + 1;
        seen[t] = {options.window > 0 ? std::max<int64_t>(0, end - options.window) : 0, end};
    }
    for (int group = block.group, groups; group < block.group + block.groups; group += groups) {
        groups = std::min(together, block.group + block.groups - group);
        const int all = groups * Q;
        const auto place = [&](int i) {  // a query's row of numbers, its heads side by side
            const int head = (group + i / Q) * shared + i % shared;
            return std::pair<int64_t, int64_t>(block.first + i % Q / shared, head);
        };
        s.bytes.resize(size_t(all) * 2 * D), s.starts.resize(all), s.scales.resize(all);
        s.scores.resize(all * kTile), s.weights.resize(all * 2 * kTile), s.shrink.resize(all), s.share.resize(all);
        s.outputs.assign(size_t(all) * D, 0.0f), s.totals.assign(all * 16, 0.0f), s.peaks.assign(all, -INFINITY);
        for (int i = 0; i < all; ++i) {
            const auto [token, head] = place(i);
            if (options.sinks) s.peaks[i] = options.sinks[head], s.totals[i * 16] = 1;
            split_query(q + token * q_stride + head * narrow, narrow, options.scale, i, s);
        }
        const auto tile_at = [&](const void* side, int64_t at) {
            const int64_t tile = table[at / size] * tiles + at % size / kTile;
            return static_cast<const uint8_t*>(side) + (tile * K + group) * bytes;
        };
        const int64_t end = seen.back().end;
        int a = 0, b = 0;  // the tokens that see something of a tile: they are neighbors
        for (int64_t at = seen[0].since / kTile * kTile; at < end; at += kTile) {
            while (seen[a].end <= at) ++a;
            while (b < block.tokens && seen[b].since < at + kTile) ++b;
            const bool more = Q <= kDirect && at + kTile < end;
            visit(options, Tiles{tile_at(pages.keys, at), tile_at(pages.values, at),
                              more ? tile_at(pages.keys, at + kTile) : nullptr,
                              more ? tile_at(pages.values, at + kTile) : nullptr, bytes, at, seen.data(), D, groups, Q,
                              a, b, shared}, s);
        }
        for (int i = 0; i < all; ++i) {
            const auto [token, head] = place(i);
            const float share = 1 / sum(load(&s.totals[i * 16]));
            float* to = out + (token * options.heads + head) * narrow;
            for (int d = 0; d < narrow; ++d) to[d] = s.outputs[size_t(i) * D + d] * share;
        }
    }
}

}  // namespace warploom
