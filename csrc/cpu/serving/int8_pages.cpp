#include "cpu/serving/int8_pages.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <utility>
#include <vector>

#include "cpu/serving/hadamard.hpp"
#include "cpu/serving/int8_tiles.hpp"

namespace warploom {

namespace {

using namespace int8;

constexpr float kMost = 127 * 128;  // of a query's numbers: high within ±127, low within −64 … 63
constexpr float kParts = 65535;     // of the largest weight of a round
constexpr float kLeast = 1e-30f;    // below it, nothing

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

// A query as high and low bytes, or as the floats that these stand for. Inlined into attention, it takes the registers of the
// weights there: GCC 12 stores 140 vectors instead of 31.
__attribute__((noinline)) void split_query(const float* x, int D, float factor, int q, int8_t* bytes, Scratch& s) {
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
void write_lane(const float* k, const float* v, int D, int lane, uint8_t* keys, uint8_t* values,
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

// Numbers from 0 to 65535 as whole ones: high and low bytes.
template <class R>
WARPLOOM_INLINE void split_weights(const R& x, uint8_t* high, uint8_t* low) {
    typedef uint8_t Bytes __attribute__((vector_size(lanes_of<R>)));
    const R shifted = x + 8388608.0f;  // 2²³: the sum's last bits are the integer
    Ints<R> bits;
    std::memcpy(&bits, &shifted, sizeof(R));
    const Bytes highs = __builtin_convertvector(bits >> 8, Bytes), lows = __builtin_convertvector(bits, Bytes);
    std::memcpy(high, &highs, sizeof(Bytes)), std::memcpy(low, &lows, sizeof(Bytes));
}
#if defined(__AVX512F__) && !defined(__clang__)
WARPLOOM_INLINE void split_weights(const f16& x, uint8_t* high, uint8_t* low) {  // GCC would take the vector apart
    typedef uint8_t Bytes __attribute__((vector_size(16), aligned(1)));
    const f16 shifted = x + 8388608.0f;
    i16 bits;
    std::memcpy(&bits, &shifted, sizeof(bits));
    asm("vpmovdb %1, %0" : "=m"(*reinterpret_cast<Bytes*>(high)) : "v"(bits >> 8));
    asm("vpmovdb %1, %0" : "=m"(*reinterpret_cast<Bytes*>(low)) : "v"(bits));
}
#endif
template <class R>
WARPLOOM_INLINE void split_weights(const Sixteen<R>& x, uint8_t* high, uint8_t* low) {
    for (int i = 0, n = 0; i < Sixteen<R>::kParts; ++i, n += lanes_of<R>) split_weights(x.part[i], high + n, low + n);
}

// Weights of a round times the scales of their values become parts of the largest: of `count` queries from q on.
template <class V>
WARPLOOM_INLINE void round_weights(int q, int count, Scratch& s) {
    const int end = s.end;
    V four[4];
    for (int i = 0; i < 4; ++i) {
        V best[4];
        for (int n = 0; n < 4; ++n)
            best[n] = largest_lanes<V>(&s.scores[size_t(q + std::min(4 * i + n, count - 1)) * s.row], end);
        four[i] = fold_four(best, Larger());
    }
    float most[kTogether];
    fold_sixteen(four, Larger(), most);
    for (int i = 0; i < count; ++i) {
        const float *weights = &s.scores[size_t(q + i) * s.row], parts = kParts / std::max(most[i], kLeast);
        uint8_t* high = &s.weights[size_t(q + i) * 2 * kRound];
        s.shares[q + i] = 1 / parts;
        if (s.from[q + i] >= s.to[q + i]) {  // it sees none of them
            std::fill_n(high, 2 * kRound, uint8_t(0));
            continue;
        }
        for (int j = 0; j < end; j += 16) split_weights(load_as<V>(weights + j) * parts, high + j, high + kRound + j);
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
        if (options.sinks) s.peaks[i] = options.sinks[head] * kLog2e, s.totals[i * 16] = 1;
        int8_t* to = Isa::bytes ? &s.bytes[i / Q * head_bytes + i % Q / kGroup * group_bytes + i % Q % kGroup * 8] : nullptr;
        split_query(q + token * q_stride + head * narrow, narrow, score_scale(options), i, to, s);
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
        using V = typename Isa::V;
        const auto keep = [&](int i) __attribute__((always_inline)) {
            return [scales = &s.value_scales[i / Q * kRound]](float* to, int j, const V& weight) __attribute__((always_inline)) {
                store_as(to, weight * load_as<V>(scales + j));
            };
        };
        const auto then = [&](int i, int count) __attribute__((always_inline)) { round_weights<V>(i, count, s); };
        weigh<V>(options.softcap, s, keep, then);
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

#define WARPLOOM_ATTEND(target, name, Isa)                                                                                        \
    target void name(const Pages& p, const Step& t, const AttentionOptions& o, const float* q, int64_t stride, const QueryBlock& b, \
                     Scratch& s, float* out) {                                                                                    \
        attend<Isa>(p, t, o, q, stride, b, s, out);                                                                               \
    }
WARPLOOM_ATTEND(, attend_floats, Loops<Register>)
#ifdef __AVX512F__
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
    Scratch* mine = &scratch;
    asm("" : "+r"(mine));  // else GCC 12 asks for the address of a thread's own in the innermost loop
#ifdef __AVX512F__
    if (has_vnni) return attend_vnni(pages, step, options, q, q_stride, block, *mine, out);
#endif
    attend_floats(pages, step, options, q, q_stride, block, *mine, out);
}

}  // namespace warploom
