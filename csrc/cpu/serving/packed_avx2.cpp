// Packed weights by AVX2, and by AVX-VNNI, which client CPUs have: sixteen outputs are two registers.
#include <cstring>

#include "cpu/serving/packed_layout.hpp"
#include "simd.hpp"
#ifdef __AVX2__
#include <cpuid.h>
#endif

namespace warploom::packed {

#ifdef __AVX2__
namespace {

struct Ints {
    __m256i a, b;
};
struct Floats {
    __m256 a, b;
};
struct Bytes {
    __m256i a, b;
};
constexpr int kTogether = 1;  // with four rows: eight sums, two of weights, one of activations

inline void clear(Floats& x) { x.a = x.b = _mm256_setzero_ps(); }
inline void spread(Ints& x, int32_t value) { x.a = x.b = _mm256_set1_epi32(value); }
inline __m256i load_half(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
inline Bytes load_line(const uint8_t* p) { return {load_half(p), load_half(p + 32)}; }
inline Bytes low_halves(Bytes x) {
    const __m256i mask = _mm256_set1_epi8(15);
    return {_mm256_and_si256(x.a, mask), _mm256_and_si256(x.b, mask)};
}
inline Bytes high_halves(Bytes x) { return low_halves({_mm256_srli_epi16(x.a, 4), _mm256_srli_epi16(x.b, 4)}); }
inline Bytes spread_table(const int8_t* table) {
    const __m128i x = _mm_xor_si128(_mm_loadu_si128(reinterpret_cast<const __m128i*>(table)), _mm_set1_epi8(-128));
    return {_mm256_broadcastsi128_si256(x), _mm256_broadcastsi128_si256(x)};
}
inline Bytes look_up(Bytes table, Bytes x) {
    return {_mm256_shuffle_epi8(table.a, x.a), _mm256_shuffle_epi8(table.b, x.b)};
}
inline Bytes four_bytes(const int8_t* p) {
    int32_t four;
    std::memcpy(&four, p, 4);
    return {_mm256_set1_epi32(four), _mm256_set1_epi32(four)};
}
inline void add_shifted(Ints& sums, Ints high) {
    sums.a = _mm256_add_epi32(sums.a, _mm256_slli_epi32(high.a, 7));
    sums.b = _mm256_add_epi32(sums.b, _mm256_slli_epi32(high.b, 7));
}
inline Floats from_halves(const uint8_t* p) {
    const __m128i* halves = reinterpret_cast<const __m128i*>(p);
    return {_mm256_cvtph_ps(_mm_loadu_si128(halves)), _mm256_cvtph_ps(_mm_loadu_si128(halves + 1))};
}
inline void add_scaled(Floats& total, Ints sums, Floats weight, float scale) {
    const __m256 s = _mm256_set1_ps(scale);
    total.a = _mm256_fmadd_ps(_mm256_mul_ps(_mm256_cvtepi32_ps(sums.a), weight.a), s, total.a);
    total.b = _mm256_fmadd_ps(_mm256_mul_ps(_mm256_cvtepi32_ps(sums.b), weight.b), s, total.b);
}
inline void add_times(Floats& total, Floats x, float y) {
    total.a = _mm256_fmadd_ps(x.a, _mm256_set1_ps(y), total.a);
    total.b = _mm256_fmadd_ps(x.b, _mm256_set1_ps(y), total.b);
}
inline void finish(float* y, Floats total, const float* units, const float* bias) {
    _mm256_storeu_ps(y, _mm256_fmadd_ps(total.a, _mm256_loadu_ps(units), _mm256_loadu_ps(bias)));
    _mm256_storeu_ps(y + 8, _mm256_fmadd_ps(total.b, _mm256_loadu_ps(units + 8), _mm256_loadu_ps(bias + 8)));
}

namespace avx2 {

enum class Kind;
// Bytes become signed, for sums of two products have 16 bits: 255 · 127 twice is too much, 128 · 127 twice is not. Nibbles stay.
template <Kind K>
constexpr int kShift = int(K) == 1 ? 0 : 128;

inline void add_pairs(__m256i& sums, __m256i weights, __m256i activations) {
    const __m256i pairs = _mm256_maddubs_epi16(weights, activations);
    sums = _mm256_add_epi32(sums, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
inline void add_signed(__m256i& sums, __m256i weights, __m256i activations) {
    weights = _mm256_xor_si256(weights, _mm256_set1_epi8(-128));
    add_pairs(sums, _mm256_abs_epi8(weights), _mm256_sign_epi8(activations, weights));
}
template <Kind K>
inline void dot(Ints& sums, Bytes weights, Bytes activations) {
    if (kShift<K> == 0) {
        add_pairs(sums.a, weights.a, activations.a), add_pairs(sums.b, weights.b, activations.b);
    } else {
        add_signed(sums.a, weights.a, activations.a), add_signed(sums.b, weights.b, activations.b);
    }
}

#define TILE_TARGET
#include "cpu/serving/packed_tile.hpp"
#undef TILE_TARGET

}  // namespace avx2

namespace avxvnni {

#define TILE_TARGET  // none: GCC knows `avxvnni` from 11 on, and its one instruction is spelled out

enum class Kind;
template <Kind>
constexpr int kShift = 0;

template <Kind>
TILE_TARGET inline void dot(Ints& sums, Bytes weights, Bytes activations) {
    asm("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sums.a) : "x"(weights.a), "x"(activations.a));
    asm("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sums.b) : "x"(weights.b), "x"(activations.b));
}

#include "cpu/serving/packed_tile.hpp"
#undef TILE_TARGET

}  // namespace avxvnni

bool has_avxvnni() {
    unsigned a = 0, b = 0, c = 0, d = 0;
    return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 4 & 1);
}

}  // namespace

Multiply multiply_avx2() { return avx2::multiply; }
Multiply multiply_avxvnni() { return has_avxvnni() ? avxvnni::multiply : nullptr; }
#else
Multiply multiply_avx2() { return nullptr; }
Multiply multiply_avxvnni() { return nullptr; }
#endif

}  // namespace warploom::packed
