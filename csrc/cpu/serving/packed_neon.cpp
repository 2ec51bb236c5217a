// Packed weights by ARM's dot products (ARMv8.2, every server and Apple core since 2018): signed bytes, four columns of four outputs
// an instruction. Sixteen outputs are four registers.
#include <cstring>

#include "cpu/serving/packed_layout.hpp"
#include "simd.hpp"

#if defined(__aarch64__) && (defined(__ARM_FEATURE_DOTPROD) || !defined(__clang__))
#define WARPLOOM_DOTPROD 1
#include <arm_neon.h>
#if defined(__linux__)
#include <sys/auxv.h>
#endif
#endif

namespace warploom::packed {

#ifdef WARPLOOM_DOTPROD
namespace {
namespace neon {

#ifdef __ARM_FEATURE_DOTPROD
#define TILE_TARGET
bool has_dot_products() { return true; }
#else
#define TILE_TARGET __attribute__((target("arch=armv8.2-a+dotprod")))
bool has_dot_products() {
#if defined(__linux__)
    return getauxval(AT_HWCAP) >> 20 & 1;  // HWCAP_ASIMDDP
#else
    return false;
#endif
}
#endif

struct Ints {
    int32x4_t part[4];
};
struct Floats {
    float32x4_t part[4];
};
struct Bytes {
    uint8x16_t part[4];
};
constexpr int kTogether = 1;  // with four rows: sixteen sums, eight registers of weights, one of activations
#define EACH_PART for (int p = 0; p < 4; ++p)

enum class Kind;
// Bytes become signed; nibbles are.
template <Kind K>
constexpr int kShift = int(K) == 1 ? 0 : 128;

TILE_TARGET inline void clear(Floats& x) { EACH_PART x.part[p] = vdupq_n_f32(0); }
TILE_TARGET inline void spread(Ints& x, int32_t value) { EACH_PART x.part[p] = vdupq_n_s32(value); }
TILE_TARGET inline Bytes load_line(const uint8_t* at) {
    Bytes x;
    EACH_PART x.part[p] = vld1q_u8(at + 16 * p);
    return x;
}
TILE_TARGET inline Bytes low_halves(Bytes x) {
    EACH_PART x.part[p] = vandq_u8(x.part[p], vdupq_n_u8(15));
    return x;
}
TILE_TARGET inline Bytes high_halves(Bytes x) {
    EACH_PART x.part[p] = vshrq_n_u8(x.part[p], 4);
    return x;
}
TILE_TARGET inline Bytes spread_table(const int8_t* table) {
    Bytes x;
    EACH_PART x.part[p] = veorq_u8(vreinterpretq_u8_s8(vld1q_s8(table)), vdupq_n_u8(128));
    return x;
}
TILE_TARGET inline Bytes look_up(Bytes table, Bytes x) {
    EACH_PART x.part[p] = vqtbl1q_u8(table.part[p], x.part[p]);
    return x;
}
TILE_TARGET inline Bytes four_bytes(const int8_t* from) {
    uint32_t four;
    std::memcpy(&four, from, 4);
    Bytes x;
    EACH_PART x.part[p] = vreinterpretq_u8_u32(vdupq_n_u32(four));
    return x;
}
template <Kind K>
TILE_TARGET inline void dot(Ints& sums, Bytes weights, Bytes activations) {
    EACH_PART {
        const uint8x16_t weight = kShift<K> ? veorq_u8(weights.part[p], vdupq_n_u8(128)) : weights.part[p];
        sums.part[p] = vdotq_s32(sums.part[p], vreinterpretq_s8_u8(weight), vreinterpretq_s8_u8(activations.part[p]));
    }
}
TILE_TARGET inline void add_shifted(Ints& sums, Ints high) { EACH_PART sums.part[p] = vaddq_s32(sums.part[p], vshlq_n_s32(high.part[p], 7)); }
TILE_TARGET inline Floats from_halves(const uint8_t* at) {
    Floats x;
    EACH_PART {
        float16x4_t halves;
        std::memcpy(&halves, at + 8 * p, 8);
        x.part[p] = vcvt_f32_f16(halves);
    }
    return x;
}
TILE_TARGET inline void add_scaled(Floats& total, Ints sums, Floats weight, float scale) {
    EACH_PART total.part[p] = vfmaq_n_f32(total.part[p], vmulq_f32(vcvtq_f32_s32(sums.part[p]), weight.part[p]), scale);
}
TILE_TARGET inline void add_times(Floats& total, Floats x, float y) { EACH_PART total.part[p] = vfmaq_n_f32(total.part[p], x.part[p], y); }
TILE_TARGET inline void finish(float* y, Floats total, const float* units, const float* bias) {
    EACH_PART vst1q_f32(y + 4 * p, vfmaq_f32(vld1q_f32(bias + 4 * p), total.part[p], vld1q_f32(units + 4 * p)));
}

#include "cpu/serving/packed_tile.hpp"

}  // namespace neon
}  // namespace

Multiply multiply_neon() { return neon::has_dot_products() ? neon::multiply : nullptr; }
#else
Multiply multiply_neon() { return nullptr; }
#endif

}  // namespace warploom::packed
