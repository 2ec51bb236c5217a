// Walsh–Hadamard transform: a rotation that spreads outliers evenly over their group before quantization (QuaRot).
//
// Before numbers are rounded to 8 bits with a common scale they are rotated, x → Hx / √n, where H has only ±1: an outlier
// becomes a little of everybody's, and the group looks Gaussian (relative error of the activations of a real model: 1.1–1.5 %
// without, 0.5 % with it). What multiplies them is rotated too, and (Hx)·(Hw) / n = x·w, so nothing else need know. QuaRot's idea.
#pragma once
#include "simd.hpp"

namespace warploom {

// Lanes with their partners `apart` places away: the lower becomes the sum, the upper the difference.
#define WARPLOOM_BUTTERFLY(x, sign, ...) x = x * sign + WARPLOOM_SHUFFLE(x, x, __VA_ARGS__)

// 16 · `count` numbers in place, `count` a power of two, without the division by √n. Only sums and differences: the same bits
// on every CPU, as long as the order of the steps is the same.
WARPLOOM_INLINE void hadamard(f16* x, int count) {
    for (int apart = 1; apart < count; apart *= 2)
        for (int i = 0; i < count; ++i) {
            if (i & apart) continue;
            const f16 a = x[i], b = x[i + apart];
            x[i] = a + b, x[i + apart] = a - b;
        }
    const f16 by8 = {1, 1, 1, 1, 1, 1, 1, 1, -1, -1, -1, -1, -1, -1, -1, -1};
    const f16 by4 = {1, 1, 1, 1, -1, -1, -1, -1, 1, 1, 1, 1, -1, -1, -1, -1};
    const f16 by2 = {1, 1, -1, -1, 1, 1, -1, -1, 1, 1, -1, -1, 1, 1, -1, -1};
    const f16 by1 = {1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1};
    for (int i = 0; i < count; ++i) {
        WARPLOOM_BUTTERFLY(x[i], by8, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7);
        WARPLOOM_BUTTERFLY(x[i], by4, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11);
        WARPLOOM_BUTTERFLY(x[i], by2, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13);
        WARPLOOM_BUTTERFLY(x[i], by1, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14);
    }
}
#undef WARPLOOM_BUTTERFLY

// A head of n numbers, n a multiple of sixteen: in powers of two up to 256, the largest first. Times a power of two near
// 1 / √size: `back` takes the smaller one where √size is none, so that a head turned and turned back is the head itself.
WARPLOOM_INLINE void hadamard_head(float* x, int n, bool back) {
    f16 part[16];
    for (int size = 256; n > 0; size /= 2)
        for (; n >= size; n -= size, x += size) {
            for (int i = 0; i < size / 16; ++i) part[i] = load(x + 16 * i);
            hadamard(part, size / 16);
            const float share = 1.0f / float(1 << (__builtin_ctz(unsigned(size)) + back) / 2);
            for (int i = 0; i < size / 16; ++i) store(x + 16 * i, part[i] * share);
        }
}

}  // namespace warploom
