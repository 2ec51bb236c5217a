// Conversion from and to IEEE half precision, in which scales of weights are stored.
#pragma once
#include <cstdint>
#include <cstring>

namespace warploom {

inline float from_bits(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}
inline uint32_t to_bits(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return bits;
}

inline float from_half(uint16_t half) {
    const uint32_t sign = uint32_t(half & 0x8000) << 16, size = half & 0x7fff;
    const float x = from_bits(size << 13) * 0x1p112f;  // the exponents' biases; subnormals come out right too
    return from_bits((size < 0x7c00 ? to_bits(x) : size << 13 | 0x7f800000) | sign);
}

// To the nearest, ties to even; what is too large becomes infinity.
inline uint16_t to_half(float x) {
    const uint32_t all = to_bits(x), sign = all >> 16 & 0x8000, bits = all & 0x7fffffff;
    if (bits > 0x7f800000) return uint16_t(sign | 0x7e00);
    if (bits >= 0x477ff000) return uint16_t(sign | 0x7c00);
    if (bits < 0x38800000)  // subnormal: adding ½ rounds at the place of its last digit, 2⁻²⁴
        return uint16_t(sign | (to_bits(from_bits(bits) + 0.5f) - 0x3f000000));
    return uint16_t(sign | ((bits + 0xfff + (bits >> 13 & 1) - 0x38000000) >> 13));
}

}  // namespace warploom
