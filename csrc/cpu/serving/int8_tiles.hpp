// Products of int8 attention over a round of keys: scores of some queries with the keys of its tiles, and the weighted
// values, by VNNI where the CPU has it, else in float32.
#pragma once
#include <algorithm>
#include <cstring>
#include <vector>

#include "cpu/serving/int8_pages.hpp"
#include "cpu/serving/online_softmax.hpp"

namespace warploom::int8 {

constexpr int kTiles = kRound / kTile;
constexpr int kGroup = 6;           // queries of a register tile, with two tiles of keys
constexpr int kFew = 3;             // queries of a register tile, with 64 columns of values

inline int padded(int D) { return (D + 15) / 16 * 16; }
inline int64_t tile_bytes(int D) { return int64_t(kTile) * (D + int(sizeof(float))); }

// Scratch of one thread; D is padded. Where there are products of bytes, queries are bytes, else floats.
struct Scratch : Round {
    std::vector<int8_t, InLines<int8_t>> bytes;      // (heads, groups of queries, D / 4, queries, 2, 4): high and low
    std::vector<int32_t> starts;                     // (queries): −128 · Σ query, takes the keys' offset out again
    Floats scales, shares;                           // (queries): of a query, and of its weights in this round
    std::vector<uint8_t, InLines<uint8_t>> weights;  // (queries, 2, kRound): high and low
    Floats key_scales, value_scales;                 // (heads, kRound)
    Floats queries, keys, values;                    // (queries, D), (D, kRound), (kRound, D)
    Floats line;                                     // (D)
    std::vector<int32_t, InLines<int32_t>> numbers;  // (D)
    std::vector<int8_t> narrow;                      // (D)
};

// A head's tiles of a round.
struct Tiles {
    const uint8_t *keys[kTiles], *values[kTiles];
    int first, last;  // of them, those that any query sees
    const float *key_scales, *value_scales;
};

// Float fallback: scores with the keys of a tile in the lanes; weighted values with columns in the lanes.
template <class R>
struct Loops {
    using V = SixteenIn<R>;
    static constexpr bool bytes = false;

    // A round's bytes as floats.
    static WARPLOOM_INLINE void widen_keys(const Tiles& t, int D, Scratch& s) {
        s.keys.resize(size_t(kRound) * D);
        uint32_t fours[kTile];
        for (int tile = t.first; tile < t.last; ++tile)
            for (int d = 0; d < D; d += 4) {
                std::memcpy(fours, t.keys[tile] + d * kTile, sizeof(fours));
                for (int j = 0; j < 4; ++j) {
                    float* to = &s.keys[(d + j) * kRound + tile * kTile];
                    for (int i = 0; i < kTile; ++i) to[i] = float(int32_t(fours[i] >> 8 * j & 255) - 128);
                }
            }
    }
    static WARPLOOM_INLINE void widen_values(const Tiles& t, int D, Scratch& s) {
        s.values.resize(size_t(kRound) * D);
        uint32_t fours[16];
        for (int tile = t.first; tile < t.last; ++tile)
            for (int n = 0; n < kTile; n += 4)
                for (int d = 0; d < D; d += 16) {
                    std::memcpy(fours, t.values[tile] + n * D + 4 * d, sizeof(fours));
                    for (int j = 0; j < 4; ++j) {
                        float* to = &s.values[size_t(tile * kTile + n + j) * D + d];
                        for (int i = 0; i < 16; ++i) to[i] = float(int32_t(fours[i] << (24 - 8 * j)) >> 24);
                    }
                }
    }

    template <int QUERIES>
    static WARPLOOM_INLINE void dot_some(int q, int from, int to, int D, const float* scales, Scratch& s) {
        for (int tile = from; tile < to; ++tile) {
            V total[QUERIES] = {};
            for (int d = 0; d < D; ++d) {
                const V key = load_as<V>(&s.keys[d * kRound + tile * kTile]);
                for (int i = 0; i < QUERIES; ++i) total[i] += key * s.queries[size_t(q + i) * D + d];
            }
            for (int i = 0; i < QUERIES; ++i) {
                const V score = total[i] * (load_as<V>(scales + tile * kTile) * s.scales[q + i]);
                store_as(&s.scores[(q + i) * s.row + tile * kTile], score);
            }
        }
    }

    template <int QUERIES>
    static WARPLOOM_INLINE void gather_some(int q, int from, int to, int D, Scratch& s) {
        const uint8_t* weights = &s.weights[size_t(q) * 2 * kRound];
        float parts[QUERIES][kRound];
        for (int i = 0; i < QUERIES; ++i, weights += 2 * kRound)
            for (int j = 0; j < kRound; ++j) parts[i][j] = float(256 * weights[j] + weights[kRound + j]);
        for (int d = 0; d < D; d += 16) {
            V total[QUERIES] = {};
            for (int j = from; j < to; ++j) {
                const V value = load_as<V>(&s.values[size_t(j) * D + d]);
                for (int i = 0; i < QUERIES; ++i) total[i] += value * parts[i][j];
            }
            for (int i = 0; i < QUERIES; ++i) {
                float* out = &s.outputs[size_t(q + i) * D + d];
                store_as(out, load_as<V>(out) + total[i] * s.shares[q + i]);
            }
        }
    }

    static WARPLOOM_INLINE void dot(const Tiles& t, int q, int end, int D, const int8_t*, Scratch& s) {
        widen_keys(t, D, s);
        for (int count; q < end; q += count) {
            count = end - q < 4 ? 1 : 4;
            const int from = s.from[q] / kTile, to = (s.to[q + count - 1] + kTile - 1) / kTile;
            count == 4 ? dot_some<4>(q, from, to, D, t.key_scales, s) : dot_some<1>(q, from, to, D, t.key_scales, s);
        }
    }

    static WARPLOOM_INLINE void gather(const Tiles& t, int q, int end, int D, Scratch& s) {
        widen_values(t, D, s);
        for (int count; q < end; q += count) {
            count = end - q < 4 ? 1 : 4;
            const int from = s.from[q], to = s.to[q + count - 1];
            count == 4 ? gather_some<4>(q, from, to, D, s) : gather_some<1>(q, from, to, D, s);
        }
    }
};

#ifdef __AVX512F__
#define WARPLOOM_VNNI __attribute__((target("avx512vnni")))

// sums + unsigned · signed, four bytes a lane. Spelled out as in packed_avx512.cpp; every loop over sums must be unrolled, and
// they be handed on by value: else GCC 12 keeps them in memory.
WARPLOOM_VNNI inline __m512i add_four(__m512i sums, __m512i unsigned_four, __m512i signed_four) {
    asm("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(unsigned_four), "v"(signed_four));
    return sums;
}
WARPLOOM_VNNI inline __m512i spread_four(const void* four) {
    int32_t all;
    std::memcpy(&all, four, 4);
    return _mm512_set1_epi32(all);
}

// Products of bytes: 2 · 2 · QUERIES sums with two tiles of keys, or with 64 columns of values.
struct Vnni {
    using V = f16;
    static constexpr bool bytes = true;

    template <int QUERIES>
    __attribute__((noinline)) WARPLOOM_VNNI static void dot_pair(const int8_t* queries, const uint8_t* first, const uint8_t* second, int D,
                                                                 const int32_t* starts, const float* scales,
                                                                 const float* key_scales, float* scores, ptrdiff_t row) {
        __m512i high[QUERIES][2], low[QUERIES][2];
#pragma GCC unroll 6
        for (int i = 0; i < QUERIES; ++i) {
            high[i][0] = high[i][1] = _mm512_setzero_si512();
            low[i][0] = low[i][1] = _mm512_set1_epi32(starts[i]);
        }
        for (const uint8_t* end = first + D * kTile; first < end; first += 4 * kTile, second += 4 * kTile, queries += 8 * kGroup) {
            const __m512i a = _mm512_loadu_si512(first), b = _mm512_loadu_si512(second);
#pragma GCC unroll 6
            for (int i = 0; i < QUERIES; ++i) {
                const __m512i highs = spread_four(queries + 8 * i), lows = spread_four(queries + 8 * i + 4);
                high[i][0] = add_four(high[i][0], a, highs), high[i][1] = add_four(high[i][1], b, highs);
                low[i][0] = add_four(low[i][0], a, lows), low[i][1] = add_four(low[i][1], b, lows);
            }
        }
#pragma GCC unroll 6
        for (int i = 0; i < QUERIES; ++i)
#pragma GCC unroll 6
            for (int n = 0; n < 2; ++n) {
                const __m512 sum = _mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_slli_epi32(high[i][n], 7), low[i][n]));
                const __m512 scale = _mm512_mul_ps(_mm512_loadu_ps(key_scales + n * kTile), _mm512_set1_ps(scales[i]));
                _mm512_storeu_ps(scores + i * row + n * kTile, _mm512_mul_ps(sum, scale));
            }
    }

    WARPLOOM_VNNI static void dot(const Tiles& t, int q, int end, int D, const int8_t* bytes, Scratch& s) {
        for (; q < end; q += kGroup, bytes += 2 * kGroup * D) {
            const int count = std::min(kGroup, end - q), to = (s.to[q + count - 1] + kTile - 1) / kTile;
            static constexpr decltype(&dot_pair<1>) kinds[] = {dot_pair<1>, dot_pair<2>, dot_pair<3>, dot_pair<4>, dot_pair<5>, dot_pair<6>};
            for (int tile = s.from[q] / kTile; tile < to; tile += 2)  // beyond the last one comes nothing of use
                kinds[count - 1](bytes, t.keys[tile], t.keys[std::min(tile + 1, to - 1)], D, &s.starts[q], &s.scales[q],
                                 t.key_scales + tile * kTile, &s.scores[q * s.row + tile * kTile], s.row);
        }
    }

    template <int QUERIES, int VECTORS>
    __attribute__((noinline)) WARPLOOM_VNNI static void gather_some(const uint8_t* const* values, const uint8_t* const* last, int D, int d,
                                                                    const uint8_t* weights, const float* shares, float* out) {
        __m512i high[QUERIES][VECTORS], low[QUERIES][VECTORS];
#pragma GCC unroll 6
        for (int i = 0; i < QUERIES; ++i)
#pragma GCC unroll 6
            for (int v = 0; v < VECTORS; ++v) high[i][v] = low[i][v] = _mm512_setzero_si512();
        for (; values < last; ++values)
            for (const uint8_t *at = *values + d * 4, *end = at + kTile * D; at < end; at += 4 * D, weights += 4) {
                __m512i four[VECTORS];
#pragma GCC unroll 6
                for (int v = 0; v < VECTORS; ++v) four[v] = _mm512_loadu_si512(at + 64 * v);
#pragma GCC unroll 6
                for (int i = 0; i < QUERIES; ++i) {
                    const __m512i highs = spread_four(weights + 2 * kRound * i), lows = spread_four(weights + 2 * kRound * i + kRound);
#pragma GCC unroll 6
                    for (int v = 0; v < VECTORS; ++v)
                        high[i][v] = add_four(high[i][v], highs, four[v]), low[i][v] = add_four(low[i][v], lows, four[v]);
                }
            }
#pragma GCC unroll 6
        for (int i = 0; i < QUERIES; ++i)
#pragma GCC unroll 6
            for (int v = 0; v < VECTORS; ++v) {
                const __m512 sum = _mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_slli_epi32(high[i][v], 8), low[i][v]));
                float* to = out + size_t(i) * D + 16 * v;
                _mm512_storeu_ps(to, _mm512_fmadd_ps(sum, _mm512_set1_ps(shares[i]), _mm512_loadu_ps(to)));
            }
    }

    template <int VECTORS>
    WARPLOOM_VNNI static void gather_columns(const Tiles& t, int q, int end, int D, int d, Scratch& s) {
        static constexpr decltype(&gather_some<1, VECTORS>) kinds[] = {gather_some<1, VECTORS>, gather_some<2, VECTORS>, gather_some<3, VECTORS>};
        for (; q < end; q += kFew) {
            const int count = std::min(kFew, end - q), from = s.from[q] / kTile, to = (s.to[q + count - 1] + kTile - 1) / kTile;
            if (from < to)
                kinds[count - 1](t.values + from, t.values + to, D, d, &s.weights[size_t(q) * 2 * kRound + from * kTile], &s.shares[q],
                                 &s.outputs[size_t(q) * D + d]);
        }
    }

    WARPLOOM_VNNI static void gather(const Tiles& t, int q, int end, int D, Scratch& s) {
        int d = 0;
        for (; d + 64 <= D; d += 64) gather_columns<4>(t, q, end, D, d, s);
        for (; d < D; d += 16) gather_columns<1>(t, q, end, D, d, s);
    }
};
#endif

}  // namespace warploom::int8
