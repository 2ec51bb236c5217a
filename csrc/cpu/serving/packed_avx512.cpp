// Packed weights by AVX-512 VNNI: unsigned by signed bytes, four columns of sixteen outputs an instruction.
#include <cstring>

#include "cpu/serving/packed_layout.hpp"
#include "simd.hpp"

namespace warploom::packed {

#ifdef __AVX512F__
namespace {
namespace avx512 {

#define TILE_TARGET __attribute__((target("avx512vnni")))

using Ints = __m512i;
using Floats = __m512;
using Bytes = __m512i;
constexpr int kTogether = kBlock;
enum class Kind;
template <Kind>
constexpr int kShift = 0;

TILE_TARGET inline void clear(Floats& x) { x = _mm512_setzero_ps(); }
TILE_TARGET inline void spread(Ints& x, int32_t value) { x = _mm512_set1_epi32(value); }
TILE_TARGET inline Bytes load_line(const uint8_t* p) { return _mm512_loadu_si512(p); }
TILE_TARGET inline Bytes low_halves(Bytes x) { return _mm512_and_si512(x, _mm512_set1_epi8(15)); }
TILE_TARGET inline Bytes high_halves(Bytes x) {
    return _mm512_and_si512(_mm512_srli_epi16(x, 4), _mm512_set1_epi8(15));
}
TILE_TARGET inline Bytes spread_table(const int8_t* table) {
    const __m128i x = _mm_xor_si128(_mm_loadu_si128(reinterpret_cast<const __m128i*>(table)), _mm_set1_epi8(-128));
    return _mm512_broadcast_i32x4(x);
}
TILE_TARGET inline Bytes look_up(Bytes table, Bytes x) { return _mm512_shuffle_epi8(table, x); }
TILE_TARGET inline Bytes four_bytes(const int8_t* p) {
    int32_t four;
    std::memcpy(&four, p, 4);
    return _mm512_set1_epi32(four);
}
// Spelled out: with the intrinsic, GCC 12 copies every sum to another register and back at every step, twice as many
// instructions as there are products.
template <Kind>
TILE_TARGET inline void dot(Ints& sums, Bytes weights, Bytes activations) {
    asm("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(weights), "v"(activations));
}
TILE_TARGET inline void add_shifted(Ints& sums, Ints high) { sums = _mm512_add_epi32(sums, _mm512_slli_epi32(high, 7)); }
TILE_TARGET inline Floats from_halves(const uint8_t* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
TILE_TARGET inline void add_scaled(Floats& total, Ints sums, Floats weight, float scale) {
    total = _mm512_fmadd_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(sums), weight), _mm512_set1_ps(scale), total);
}
TILE_TARGET inline void add_times(Floats& total, Floats a, float b) { total = _mm512_fmadd_ps(a, _mm512_set1_ps(b), total); }
TILE_TARGET inline void finish(float* y, Floats total, const float* units, const float* bias) {
    _mm512_storeu_ps(y, _mm512_fmadd_ps(total, _mm512_loadu_ps(units), _mm512_loadu_ps(bias)));
}

#include "cpu/serving/packed_tile.hpp"

}  // namespace avx512
}  // namespace

Multiply multiply_avx512() { return has_vnni ? avx512::multiply : nullptr; }
#else
Multiply multiply_avx512() { return nullptr; }
#endif

}  // namespace warploom::packed
