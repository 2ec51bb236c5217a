// The block splitter for AVX-512: one instruction compares 64 bytes into a mask, another one turns a mask into offsets.
#include "split_masks.hpp"
#include "splitter.hpp"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // false alarms inside the compiler's own header
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>

// Only code of this file is compiled for these instructions: no standard header may come after this line.
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512vbmi2,bmi,bmi2,lzcnt,popcnt")

namespace warploom {
namespace avx512 {

static inline uint64_t in_range(__m512i bytes, char from, char count) {
    return _mm512_cmplt_epu8_mask(_mm512_sub_epi8(bytes, _mm512_set1_epi8(from)), _mm512_set1_epi8(count));
}

static inline uint64_t equal(__m512i bytes, char byte) {
    return _mm512_cmpeq_epi8_mask(bytes, _mm512_set1_epi8(byte));
}

static inline void classify(const uint8_t* text, Masks& m) {
    __m512i bytes = _mm512_loadu_si512(text);
    m.letter = in_range(_mm512_or_si512(bytes, _mm512_set1_epi8(0x20)), 'a', 26);
    m.upper = in_range(bytes, 'A', 26);
    m.digit = in_range(bytes, '0', 10);
    m.blank = equal(bytes, ' ');
    m.other_space = in_range(bytes, '\t', 5);
    m.newline = equal(bytes, '\n') | equal(bytes, '\r');
    m.apostrophe = equal(bytes, '\'');
    m.slash = equal(bytes, '/');
    m.high = _mm512_movepi8_mask(bytes);
}

// Appends base + i for each bit i; writes up to 64 numbers.
static inline size_t emit(uint64_t bits, uint32_t base, uint32_t* out, size_t count) {
    const __m512i places = _mm512_set_epi8(63, 62, 61, 60, 59, 58, 57, 56, 55, 54, 53, 52, 51, 50, 49, 48, 47, 46, 45, 44,
                                           43, 42, 41, 40, 39, 38, 37, 36, 35, 34, 33, 32, 31, 30, 29, 28, 27, 26, 25, 24,
                                           23, 22, 21, 20, 19, 18, 17, 16, 15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2,
                                           1, 0);
    __m512i packed = _mm512_maskz_compress_epi8(bits, places);
    __m512i start = _mm512_set1_epi32(static_cast<int>(base));
    out += count;
    size_t n = static_cast<size_t>(__builtin_popcountll(bits));
    _mm512_storeu_si512(out, _mm512_add_epi32(start, _mm512_cvtepu8_epi32(_mm512_castsi512_si128(packed))));
    if (n > 16) {
        _mm512_storeu_si512(out + 16, _mm512_add_epi32(start, _mm512_cvtepu8_epi32(_mm512_extracti32x4_epi32(packed, 1))));
        if (n > 32) {
            _mm512_storeu_si512(out + 32, _mm512_add_epi32(start, _mm512_cvtepu8_epi32(_mm512_extracti32x4_epi32(packed, 2))));
            _mm512_storeu_si512(out + 48, _mm512_add_epi32(start, _mm512_cvtepu8_epi32(_mm512_extracti32x4_epi32(packed, 3))));
        }
    }
    return count + n;
}

#include "split_blocks.hpp"

}  // namespace avx512

SplitFunction split_avx512(Pattern pattern) {
    if (pattern == Pattern::kGpt2) return avx512::split_blocks<Pattern::kGpt2>;
    if (pattern == Pattern::kGpt4) return avx512::split_blocks<Pattern::kGpt4>;
    if (pattern == Pattern::kQwen2) return avx512::split_blocks<Pattern::kQwen2>;
    return avx512::split_blocks<Pattern::kO200k>;
}

bool has_avx512() {
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512vbmi2") && __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2");
}

}  // namespace warploom

#else

namespace warploom {
SplitFunction split_avx512(Pattern) { return nullptr; }
bool has_avx512() { return false; }
}  // namespace warploom

#endif
