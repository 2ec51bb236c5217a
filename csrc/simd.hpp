// Vector code of both extensions: sixteen floats at a time in whatever registers the CPU has.
//
// The CPU engine is compiled once for every size of registers, as a module each (setup.py); Python loads the one that the CPU
// has registers for (kernels/cpu/extension.py). So what is written with `Register` needs no choice. Instructions that not every
// CPU with such registers has (VNNI, pairs of bfloat16) are used in functions of their own, chosen by a flag like `has_vnni`.
// Sums are taken in a fixed order, so a result does not depend on the neighbours of its row.
//
// In one module for all CPUs, the tokenizer, WARPLOOM_COMPILE_FOR("avx2,…") … WARPLOOM_COMPILE_FOR_ALL enclose the functions of one
// instruction set: no standard header may be included in between.
#pragma once
#include <cstdint>
#include <cstring>
#include <new>
#include <vector>

#if defined(__GNUC__)
#pragma GCC diagnostic ignored "-Wpsabi"  // everything that takes vectors is inlined: no call passes one
#endif
#if defined(__x86_64__) && defined(__GNUC__)
#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12's own headers
#endif
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>
#define WARPLOOM_X86 1
#endif

#define WARPLOOM_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define WARPLOOM_COMPILE_FOR(isa) WARPLOOM_PRAGMA(clang attribute push(__attribute__((target(isa))), apply_to = function))
#define WARPLOOM_COMPILE_FOR_ALL _Pragma("clang attribute pop")
#else
#define WARPLOOM_COMPILE_FOR(isa) _Pragma("GCC push_options") WARPLOOM_PRAGMA(GCC target(isa))
#define WARPLOOM_COMPILE_FOR_ALL _Pragma("GCC pop_options")
#endif
#define WARPLOOM_INLINE inline __attribute__((always_inline))

namespace warploom {

// Memory is copied into these and out of them (load, store) and never pointed at, so that it may lie anywhere. With a float's
// alignment in the type, GCC 11 took each copy through the stack (norms at 0.2 of their speed), and GCC 12 those of f8.
typedef float f16 __attribute__((vector_size(64)));
typedef int32_t i16 __attribute__((vector_size(64)));
typedef int32_t i8 __attribute__((vector_size(32)));
typedef int32_t i4 __attribute__((vector_size(16)));
typedef uint32_t u16 __attribute__((vector_size(64)));
typedef uint32_t u8 __attribute__((vector_size(32)));
typedef uint32_t u4 __attribute__((vector_size(16)));
typedef uint16_t h16 __attribute__((vector_size(32)));
typedef uint16_t h8 __attribute__((vector_size(16)));
typedef uint16_t h4 __attribute__((vector_size(8)));
typedef float f8 __attribute__((vector_size(32)));
typedef float f4 __attribute__((vector_size(16)));

// As large as a register: of larger ones, compilers keep sums in memory.
#if defined(__AVX512F__)
typedef f16 Register;
#elif !defined(__AVX2__)  // SSE, NEON
typedef f4 Register;
#else
typedef f8 Register;
#endif
template <class V>
constexpr int lanes_of = int(sizeof(V) / sizeof(float));
constexpr bool has_avx512 = lanes_of<Register> == 16;

#ifdef __AVX512F__
inline const bool has_vnni = __builtin_cpu_supports("avx512vnni");
#else
constexpr bool has_vnni = false;
#endif

struct bfloat16 {
    uint16_t bits;
};

// Floats that begin with a cache line: sixteen of them that lie across two lines take two reads.
template <class T>
struct InLines {
    using value_type = T;
    InLines() = default;
    template <class Other>
    InLines(const InLines<Other>&) {}
    T* allocate(size_t n) { return static_cast<T*>(::operator new(n * sizeof(T), std::align_val_t(64))); }
    void deallocate(T* p, size_t) { ::operator delete(p, std::align_val_t(64)); }
    bool operator==(const InLines&) const { return true; }
    bool operator!=(const InLines&) const { return false; }
};
using Floats = std::vector<float, InLines<float>>;

WARPLOOM_INLINE float widen(float x) { return x; }
WARPLOOM_INLINE float widen(bfloat16 x) {
    uint32_t bits = uint32_t(x.bits) << 16;
    float y;
    std::memcpy(&y, &bits, 4);
    return y;
}
WARPLOOM_INLINE void narrow(float x, float& y) { y = x; }
WARPLOOM_INLINE void narrow(float x, bfloat16& y) {  // to the nearest, ties to even
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    y.bits = uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// bfloat16 as vectors of floats, and back as `narrow`: no template, since GCC converts no vectors whose size a template gives.
#define WARPLOOM_BFLOAT16(V, words, bits)                                                              \
    WARPLOOM_INLINE void load_as(const bfloat16* p, V& x) {                                            \
        bits half;                                                                                     \
        std::memcpy(&half, p, sizeof(half));                                                           \
        const words wide = __builtin_convertvector(half, words) << 16;                                 \
        std::memcpy(&x, &wide, sizeof(x));                                                             \
    }                                                                                                  \
    WARPLOOM_INLINE void store_as(bfloat16* p, const V& x) {                                           \
        words wide;                                                                                    \
        std::memcpy(&wide, &x, sizeof(x));                                                             \
        const bits half = __builtin_convertvector((wide + 0x7fff + ((wide >> 16) & 1)) >> 16, bits);   \
        std::memcpy(p, &half, sizeof(half));                                                           \
    }
WARPLOOM_BFLOAT16(f4, u4, h4)
#ifdef __AVX2__  // GCC 12 takes these conversions apart: 6 instructions for a load, 8 for a store
WARPLOOM_INLINE void load_as(const bfloat16* p, f8& x) {
    const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p));
    x = _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
WARPLOOM_INLINE void store_as(bfloat16* p, const f8& x) {
    u8 wide;
    std::memcpy(&wide, &x, sizeof(x));
    const __m256i half = (__m256i)((wide + 0x7fff + ((wide >> 16) & 1)) >> 16);
    _mm_storeu_si128((__m128i*)p, _mm_packus_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1)));
}
#else
WARPLOOM_BFLOAT16(f8, u8, h8)
#endif
WARPLOOM_BFLOAT16(f16, u16, h16)

WARPLOOM_INLINE f16 load(const float* p) {
    f16 x;
    std::memcpy(&x, p, 64);
    return x;
}
WARPLOOM_INLINE f16 load(const bfloat16* p) {
    f16 x;
    load_as(p, x);
    return x;
}
WARPLOOM_INLINE void store(float* p, f16 x) { std::memcpy(p, &x, 64); }
WARPLOOM_INLINE void store(bfloat16* p, f16 x) { store_as(p, x); }

// The first n of sixteen lanes; the others are zero.
template <class T>
WARPLOOM_INLINE f16 load(const T* p, int n) {
    if (n >= 16) return load(p);
    float x[16] = {};
    for (int i = 0; i < n; ++i) x[i] = widen(p[i]);
    return load(x);
}
template <class T>
WARPLOOM_INLINE void store(T* p, f16 x, int n) {
    if (n >= 16) return store(p, x);
    float y[16];
    store(y, x);
    for (int i = 0; i < n; ++i) narrow(y[i], p[i]);
}

template <class V>
WARPLOOM_INLINE void load_as(const float* p, V& x) {
    std::memcpy(&x, p, sizeof(V));
}
template <class V>
WARPLOOM_INLINE void store_as(float* p, V x) {
    std::memcpy(p, &x, sizeof(V));
}

// A vector as two. By name: a copy of its bytes makes GCC 12 keep the sum that it was in memory, in the loop too.
WARPLOOM_INLINE void halves(const f16& x, f8& low, f8& high) {
#ifdef __AVX512F__
    low = _mm512_castps512_ps256(x), high = _mm512_extractf32x8_ps(x, 1);
#else
    std::memcpy(&low, &x, 32), std::memcpy(&high, (const char*)&x + 32, 32);
#endif
}
WARPLOOM_INLINE void halves(const f8& x, f4& low, f4& high) {
#ifdef __AVX2__
    low = _mm256_castps256_ps128(x), high = _mm256_extractf128_ps(x, 1);
#else
    std::memcpy(&low, &x, 16), std::memcpy(&high, (const char*)&x + 16, 16);
#endif
}

WARPLOOM_INLINE float sum(f16 x) {
    f8 a, b;
    halves(x, a, b);
    a += b;
    f4 c, d;
    halves(a, c, d);
    c += d;
    return (c[0] + c[2]) + (c[1] + c[3]);
}

WARPLOOM_INLINE f16 select(i16 mask, f16 yes, f16 no) { return mask ? yes : no; }

// Whole numbers in as many lanes.
i16 ints_like(const f16&);
i8 ints_like(const f8&);
i4 ints_like(const f4&);
template <class V>
using Ints = decltype(ints_like(V()));

// 2 to the whole number that 1.5 · 2²³ was added to. Without a conversion: that of NaN is undefined, and Clang made a number of it.
template <class V>
WARPLOOM_INLINE V power_of_2(const V& shifted) {
    Ints<V> exponent;
    std::memcpy(&exponent, &shifted, sizeof(V));
    exponent = (exponent << 23) + (127 << 23);
    V scale;
    std::memcpy(&scale, &exponent, sizeof(V));
    return scale;
}

// x becomes exp(x) to about one unit in the last place, 0 far below and infinity far above. (By reference: Clang lets no
// vector be an argument where one side is for another CPU, even where nothing is called.)
template <class V>
WARPLOOM_INLINE void exponentiate(V& x) {
    const V low = V{} - 87.3f, high = V{} + 88.7f;
    const V y = x < low ? low : x > high ? high : x;
    const V shift = V{} + 12582912.0f;  // 1.5 · 2²³: adding it rounds to an integer
    const V shifted = y * 1.44269504f + shift, n = shifted - shift;
    const V r = y - n * 0.693359375f + n * 2.12194440e-4f;
    V p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    x = x < low ? V{} : p * power_of_2(shifted);
}
template <class V>
WARPLOOM_INLINE V exp(V x) {
    exponentiate(x);
    return x;
}
WARPLOOM_INLINE f16 exp(f16 x) {
    if (has_avx512) return exp<f16>(x);
    Register part[16 / lanes_of<Register>];  // comparisons of more than a register would be made lane by lane
    std::memcpy(part, &x, 64);
    for (Register& each : part) each = exp<Register>(each);
    std::memcpy(&x, part, 64);
    return x;
}

WARPLOOM_INLINE f16 larger(f16 x, f16 y) {
    if (has_avx512) return x > y ? x : y;
    Register a[16 / lanes_of<Register>], b[16 / lanes_of<Register>];
    std::memcpy(a, &x, 64), std::memcpy(b, &y, 64);
    for (int i = 0; i < 16 / lanes_of<Register>; ++i) a[i] = a[i] > b[i] ? a[i] : b[i];
    std::memcpy(&x, a, 64);
    return x;
}

// 2ʳ of a rest of half a unit at most, to about one unit in the last place.
template <class V>
WARPLOOM_INLINE V exp2_of_rest(V r) {
    V p = r * 1.3264727e-3f + 9.6715130e-3f;
    p = p * r + 5.5507336e-2f;
    p = p * r + 2.4022242e-1f;
    p = p * r + 6.9314700e-1f;
    return p * r + 1.0f;
}

// 2ˣ of x ≤ 0, and about 0 far below: sixteen weights of attention after another.
template <class V>
WARPLOOM_INLINE V exp2_negative(V x) {
    const V low = V{} - 120.0f, y = x < low ? low : x;
    const V shift = V{} + 12582912.0f;  // 1.5 · 2²³: the sum's last bits are the integer
    const V shifted = y + shift;
    V p = exp2_of_rest(y - (shifted - shift));
    Ints<V> bits, exponent;
    std::memcpy(&bits, &p, sizeof(V)), std::memcpy(&exponent, &shifted, sizeof(V));
    bits += exponent << 23;
    std::memcpy(&p, &bits, sizeof(V));
    return p;
}

// eˣ of x ≤ 0, rounding aside, 0 below -87 and NaN of any NaN, in two thirds of the instructions of `exp`. Its relative error grows
// by 8e-8 times -x, as its share of a sum falls.
template <class V>
WARPLOOM_INLINE V exp_negative(V x) {
    const V low = V{} - 87.0f, y = low > x ? low : x;
    const V shift = V{} + 12582912.0f;
    const V shifted = y * 1.44269504f + shift, p = exp2_of_rest(y * 1.44269504f - (shifted - shift));
    return x < low ? V{} : p * power_of_2(shifted);
}

// tanh(x) to about 1e-7.
template <class V>
WARPLOOM_INLINE V tanh(V x) {
    return 1.0f - 2.0f / (1.0f + exp(x + x));
}

// Lanes of two vectors, by numbers.
#if defined(__clang__) || __GNUC__ >= 12
#define WARPLOOM_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define WARPLOOM_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, decltype(ints_like(a)){__VA_ARGS__})
#endif

// Lanes i to i + 7 of two vectors, in turns.
#define WARPLOOM_ZIP(a, b, i) \
    WARPLOOM_SHUFFLE(a, b, i, i + 16, i + 1, i + 17, i + 2, i + 18, i + 3, i + 19, i + 4, i + 20, i + 5, i + 21, i + 6, \
                     i + 22, i + 7, i + 23)

// A square turned over, of as many rows as V has lanes: perfect shuffles of its rows.
#define WARPLOOM_ZIP_8(a, b, i) WARPLOOM_SHUFFLE(a, b, i, i + 8, i + 1, i + 9, i + 2, i + 10, i + 3, i + 11)
#define WARPLOOM_ZIP_4(a, b, i) WARPLOOM_SHUFFLE(a, b, i, i + 4, i + 1, i + 5)
WARPLOOM_INLINE void zip(const f16& a, const f16& b, f16* to) { to[0] = WARPLOOM_ZIP(a, b, 0), to[1] = WARPLOOM_ZIP(a, b, 8); }
WARPLOOM_INLINE void zip(const f8& a, const f8& b, f8* to) { to[0] = WARPLOOM_ZIP_8(a, b, 0), to[1] = WARPLOOM_ZIP_8(a, b, 4); }
WARPLOOM_INLINE void zip(const f4& a, const f4& b, f4* to) { to[0] = WARPLOOM_ZIP_4(a, b, 0), to[1] = WARPLOOM_ZIP_4(a, b, 2); }

template <class V>
WARPLOOM_INLINE void transpose_square(const float* from, int64_t from_row, float* to, int64_t to_row) {
    constexpr int n = lanes_of<V>;
    V x[n], y[n];
#pragma GCC unroll 16  // else GCC 11 keeps the square in memory
    for (int i = 0; i < n; ++i) load_as(from + i * from_row, x[i]);
    for (int apart = n / 2, round = n; round > 1; round /= 2) {
        for (int i = 0; i < apart; ++i) zip(x[i], x[i + apart], y + 2 * i);
        for (int i = 0; i < n; ++i) x[i] = y[i];
    }
    for (int i = 0; i < n; ++i) store_as(to + i * to_row, x[i]);
}

// A square of sixteen rows turned over, by registers of V.
template <class V = Register>
WARPLOOM_INLINE void transpose_16x16(const float* from, int64_t from_row, float* to, int64_t to_row) {
    for (int i = 0; i < 16; i += lanes_of<V>)
        for (int j = 0; j < 16; j += lanes_of<V>)
            transpose_square<V>(from + i * from_row + j, from_row, to + j * to_row + i, to_row);
}

// bfloat16 by pairs: of twice as many numbers as a vector has, those at even places (the lower halves of the words) and those
// at odd ones.
template <class V>
WARPLOOM_INLINE void widen_pairs(const bfloat16* p, V& even, V& odd) {
    typedef uint32_t Words __attribute__((vector_size(sizeof(V))));
    Words bits;
    std::memcpy(&bits, p, sizeof(V));
    const Words low = bits << 16, high = bits & 0xffff0000u;
    std::memcpy(&even, &low, sizeof(V)), std::memcpy(&odd, &high, sizeof(V));
}

WARPLOOM_INLINE float largest(f16 x) {
    f8 a, b;
    halves(x, a, b);
    a = a > b ? a : b;
    f4 c, d;
    halves(a, c, d);
    c = c > d ? c : d;
    const float e = c[0] > c[1] ? c[0] : c[1], f = c[2] > c[3] ? c[2] : c[3];
    return e > f ? e : f;
}

template <class T>
WARPLOOM_INLINE float dot(const float* a, const T* b, int n) {
    f16 total = {};
    int i = 0;
    for (; i + 16 <= n; i += 16) total += load(a + i) * load(b + i);
    float tail = 0;
    for (; i < n; ++i) tail += a[i] * widen(b[i]);
    return sum(total) + tail;
}

}  // namespace warploom
