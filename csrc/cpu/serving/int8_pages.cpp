#include "cpu/serving/int8_pages.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <utility>
#include <vector>

#include "cpu/serving/hadamard.hpp"
#include "cpu/serving/online_softmax.hpp"

namespace warploom {

namespace {

constexpr int kTiles = kRound / kTile;
constexpr int kGroup = 6;           // queries of a register tile, with two tiles of keys
constexpr int kFew = 3;             // queries of a register tile, with 64 columns of values
constexpr float kMost = 127 * 128;  // of a query's numbers: high within ±127, low within −64 … 63
constexpr float kParts = 65535;     // of the largest weight of a round
constexpr float kLeast = 1e-30f;    // below it, nothing

int padded(int D) { return (D + 15) / 16 * 16; }
int64_t tile_bytes(int D) { return int64_t(kTile) * (D + int(sizeof(float))); }

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

// Sixteen numbers to whole ones. What follows is left to loops: GCC 12 lowers operators on vectors of integers before it
// knows for which CPU a clone is.
WARPLOOM_INLINE void round_to(int32_t* to, f16 x) {
    const f16 shift = f16{} + 12582912.0f;  // 1.5 · 2²³: adding it rounds to an integer
    const i16 whole = __builtin_convertvector((x + shift) - shift, i16);
    std::memcpy(to, &whole, 64);
}

WARPLOOM_INLINE float peak_of(const float* x, int n) {
    f16 most = {};
    for (int i = 0; i < n; i += 16) most = larger(larger(load(x + i), -load(x + i)), most);
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

// A query as high and low bytes, or as the floats that these stand for.
WARPLOOM_CLONES void split_query(const float* x, int D, float factor, int q, int8_t* bytes, Scratch& s) {
    const int wide = padded(D);
    s.line.resize(wide), s.numbers.resize(wide);
    const int32_t* numbers = s.numbers.data();
    pad_row(x, D, factor, s.line.data());
    hadamard_head(s.line.data(), wide, true);
    s.scales[q] = round_row(s.line.data(), wide, kMost, s.numbers.data());
    if (!bytes) {
        for (int d = 0; d < wide; ++d) s.queries[size_t(q) * wide + d] = float(numbers[d]);
        return;
    }
    s.narrow.resize(2 * wide);
    int8_t *high = s.narrow.data(), *low = high + wide;
    int32_t total = 0;
    for (int d = 0; d < wide; ++d) high[d] = int8_t((numbers[d] + 64) >> 7), total += numbers[d];
    for (int d = 0; d < wide; ++d) low[d] = int8_t(numbers[d] - 128 * high[d]);
    for (int d = 0; d < wide; d += 4, bytes += 8 * kGroup) std::memcpy(bytes, high + d, 4), std::memcpy(bytes + 4, low + d, 4);
    s.starts[q] = -128 * total;
}

// Lane `lane` of a tile's keys and values becomes a token's.
WARPLOOM_CLONES void write_lane(const float* k, const float* v, int D, int lane, uint8_t* keys, uint8_t* values,
                                Scratch& s) {
    const int wide = padded(D), shift = lane % 4 * 8;
    s.line.resize(wide), s.numbers.resize(wide);
    const int32_t* numbers = s.numbers.data();
    pad_row(k, D, 1, s.line.data());
    hadamard_head(s.line.data(), wide, false);
    float scale = round_row(s.line.data(), wide, 127, s.numbers.data());
    s.narrow.resize(wide);
    int8_t* narrow = s.narrow.data();
    for (int d = 0; d < wide; ++d) narrow[d] = int8_t(numbers[d] ^ 128);
    for (int d = 0; d < wide; d += 4) std::memcpy(keys + d * kTile + lane * 4, narrow + d, 4);
    std::memcpy(keys + kTile * wide + lane * 4, &scale, 4);
    pad_row(v, D, 1, s.line.data());
    scale = round_row(s.line.data(), wide, 127, s.numbers.data());
    uint32_t* fours = reinterpret_cast<uint32_t*>(values + lane / 4 * 4 * wide);
    for (int d = 0; d < wide; ++d)
        fours[d] = (fours[d] & ~(0xffu << shift)) | (uint32_t(numbers[d] & 255) << shift);
    std::memcpy(values + kTile * wide + lane * 4, &scale, 4);
}

// A head's tiles of a round.
struct Tiles {
    const uint8_t *keys[kTiles], *values[kTiles];
    int first, last;  // of them, those that any query sees
    const float *key_scales, *value_scales;
};

// Some queries' numbers in float, with the keys of a tile in the lanes; and their weights, with columns in the lanes.
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

#ifdef WARPLOOM_X86
#define WARPLOOM_VNNI __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,fma")))

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

// Weights as high and low bytes.
template <class R>
WARPLOOM_INLINE void split_weights(const R& x, uint8_t* high, uint8_t* low) {
    typedef uint8_t Bytes __attribute__((vector_size(lanes_of<R>)));
    const R shift = R{} + 12582912.0f;  // as in `round_to`
    const Ints<R> whole = __builtin_convertvector((x + shift) - shift, Ints<R>);
    const Bytes highs = __builtin_convertvector(whole >> 8, Bytes), lows = __builtin_convertvector(whole & 255, Bytes);
    std::memcpy(high, &highs, sizeof(Bytes)), std::memcpy(low, &lows, sizeof(Bytes));
}
template <class R>
WARPLOOM_INLINE void split_weights(const Sixteen<R>& x, uint8_t* high, uint8_t* low) {
    for (int i = 0, n = 0; i < Sixteen<R>::kParts; ++i, n += lanes_of<R>) split_weights(x.part[i], high + n, low + n);
}

// Weights of a round, times the scales of their values, become parts of the largest: of `count` queries from q on.
template <class V>
WARPLOOM_INLINE void round_weights(int q, int count, int queries, Scratch& s) {
    int end = 0;
    for (int i = q; i < q + count; ++i) end = std::max(end, s.to[i]);
    end = (end + 15) / 16 * 16;
    V four[4];
    for (int i = 0; i < 4; ++i) {
        V best[4] = {};
        for (int n = 0; n < 4 && 4 * i + n < count; ++n) {
            const int each = q + 4 * i + n;
            const float* scales = &s.value_scales[each / queries * kRound];
            for (int j = 0; j < end; j += 16) {
                const V weight = load_as<V>(&s.scores[each * s.row + j]) * load_as<V>(scales + j);
                store_as(&s.scores[each * s.row + j], weight);
                best[n] = Larger()(weight, best[n]);
            }
        }
        four[i] = fold_four(best, Larger());
    }
    float most[kTogether];
    fold_sixteen(four, Larger(), most);
    for (int i = 0; i < count; ++i) {
        uint8_t* high = &s.weights[size_t(q + i) * 2 * kRound];
        const bool some = s.from[q + i] < s.to[q + i] && most[i] > kLeast;  // else it sees none of them
        const float inverse = some ? kParts / most[i] : 0;
        s.shares[q + i] = some ? most[i] / kParts : 0;
        std::fill(high, high + 2 * kRound, uint8_t(0));
        for (int j = 0; some && j < end; j += 16)
            split_weights(load_as<V>(&s.scores[(q + i) * s.row + j]) * inverse, high + j, high + kRound + j);
    }
}

template <class Isa>
WARPLOOM_INLINE void attend(const Pages& pages, const Step& step, const AttentionOptions& options, const float* q, int64_t q_stride,
                            const QueryBlock& block, Scratch& s, float* out) {
    const int K = pages.kv_heads, shared = options.heads / K, Q = block.tokens * shared, size = pages.page_size, G = block.groups;
    const int narrow = pages.head_dim, D = padded(narrow), all = Q * G;
    const int64_t bytes = tile_bytes(D), group_bytes = int64_t(2) * kGroup * D, head_bytes = (Q + kGroup - 1) / kGroup * group_bytes;
    const auto place = [&](int i) {  // (token, head) of a query
        return std::pair<int64_t, int64_t>(block.first + i % Q / shared, (block.group + i / Q) * shared + i % shared);
    };
    s.begin(all, D, kRound + kTile);
    s.bytes.resize(Isa::bytes ? G * head_bytes : 0), s.queries.resize(Isa::bytes ? 0 : size_t(all) * D);
    s.starts.resize(all), s.scales.resize(all), s.shares.resize(all), s.weights.resize(size_t(all) * 2 * kRound);
    s.key_scales.resize(G * kRound + kTile), s.value_scales.resize(G * kRound);
    for (int i = 0; i < all; ++i) {
        const auto [token, head] = place(i);
        s.ends[i] = step.positions[token] + 1;
        if (options.sinks) s.peaks[i] = options.sinks[head], s.totals[i * 16] = 1;
        int8_t* to = Isa::bytes ? &s.bytes[i / Q * head_bytes + i % Q / kGroup * group_bytes + i % Q % kGroup * 8] : nullptr;
        split_query(q + token * q_stride + head * narrow, narrow, options.scale, i, to, s);
    }
    const int64_t end = s.ends[Q - 1], window = options.window > 0 ? options.window : end;
    const int64_t begin = std::max<int64_t>(0, s.ends[0] - window) / kTile * kTile;
    const int32_t* table = step.table + int64_t(step.sequences[block.first]) * step.width;
    const auto tile_at = [&](const void* side, int64_t at, int g) __attribute__((always_inline)) {
        const int64_t tile = table[at / size] * int64_t(size / kTile) + at % size / kTile;
        return static_cast<const uint8_t*>(side) + (tile * K + block.group + g) * bytes;
    };
    const auto fetch = [&](const void* side, int64_t at, int g) __attribute__((always_inline)) {  // what is needed soon
        if (at >= end) return;
        const uint8_t* tile = tile_at(side, at, g);
        for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(tile + i);
    };
    for (int64_t at = begin / kRound * kRound; at < end; at += kRound) {
        s.at(at, kRound, window);
        const int first = std::max<int64_t>(0, begin - at) / kTile, last = (std::min<int64_t>(kRound, end - at) + kTile - 1) / kTile;
        std::fill(s.value_scales.begin(), s.value_scales.end(), 0.0f);  // also of tiles that are not there
        const auto tiles_of = [&](int g) __attribute__((always_inline)) {
            Tiles tiles{{}, {}, first, last, &s.key_scales[g * kRound], &s.value_scales[g * kRound]};
            for (int i = first; i < last; ++i) {
                tiles.keys[i] = tile_at(pages.keys, at + i * kTile, g), tiles.values[i] = tile_at(pages.values, at + i * kTile, g);
                std::memcpy(&s.key_scales[g * kRound + i * kTile], tiles.keys[i] + kTile * D, kTile * sizeof(float));
            }
            return tiles;
        };
        for (int g = 0; g < G; ++g) {
            const Tiles tiles = tiles_of(g);
            for (int i = first; i < last; ++i) fetch(pages.values, at + i * kTile, g);
            Isa::dot(tiles, g * Q, (g + 1) * Q, D, Isa::bytes ? &s.bytes[g * head_bytes] : nullptr, s);
            for (int i = first; i < last; ++i)
                std::memcpy(&s.value_scales[g * kRound + i * kTile], tiles.values[i] + kTile * D, kTile * sizeof(float));
        }
        for (int i = 0; i < all; i += kTogether) {
            weigh<typename Isa::V>(options.softcap, i, std::min(kTogether, all - i), s);
            round_weights<typename Isa::V>(i, std::min(kTogether, all - i), Q, s);
        }
        for (int g = 0; g < G; ++g) {
            for (int i = 0; i < kTiles; ++i) fetch(pages.keys, at + kRound + i * kTile, g);
            Isa::gather(tiles_of(g), g * Q, (g + 1) * Q, D, s);
        }
    }
    for (int i = 0; i < all; ++i) {
        const auto [token, head] = place(i);
        const float share = 1 / sum(load(&s.totals[i * 16]));
        float* to = out + (token * options.heads + head) * narrow;
        for (int d = 0; d < narrow; ++d) to[d] = s.outputs[size_t(i) * D + d] * share;
    }
}

#define WARPLOOM_ATTEND(clones, name, Isa)                                                                                        \
    clones void name(const Pages& p, const Step& t, const AttentionOptions& o, const float* q, int64_t stride, const QueryBlock& b, \
                     Scratch& s, float* out) {                                                                                    \
        attend<Isa>(p, t, o, q, stride, b, s, out);                                                                               \
    }
WARPLOOM_ATTEND(WARPLOOM_WIDE, attend_wide, Loops<f16>)
WARPLOOM_ATTEND(WARPLOOM_NARROW, attend_narrow, Loops<Register>)
#ifdef WARPLOOM_X86
WARPLOOM_ATTEND(WARPLOOM_VNNI, attend_vnni, Vnni)
#endif


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
    auto work = has_avx512 ? attend_wide : attend_narrow;
#ifdef WARPLOOM_X86
    if (has_vnni) work = attend_vnni;
#endif
    asm("" : "+r"(work));  // a call of who knows what may throw (WARPLOOM_CLONES): it takes memory
    work(pages, step, options, q, q_stride, block, scratch, out);
}

}  // namespace warploom
