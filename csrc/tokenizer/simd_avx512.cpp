// The loops for AVX-512: one instruction compares 64 bytes into a mask, another one turns a mask into offsets.
#include "tokenizer/simd_dispatch.hpp"
#include "tokenizer/masks.hpp"
#include "simd.hpp"

#ifdef WARPLOOM_X86
WARPLOOM_COMPILE_FOR("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi2,bmi,bmi2,lzcnt,popcnt")

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
    m.ideograph = in_range(bytes, '\xE5', 4) | in_range(bytes, '\xEB', 2);
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
    _mm512_storeu_si512(out + 16, _mm512_add_epi32(start, _mm512_cvtepu8_epi32(_mm512_extracti32x4_epi32(packed, 1))));
    if (n > 32) {
        _mm512_storeu_si512(out + 32, _mm512_add_epi32(start, _mm512_cvtepu8_epi32(_mm512_extracti32x4_epi32(packed, 2))));
        _mm512_storeu_si512(out + 48, _mm512_add_epi32(start, _mm512_cvtepu8_epi32(_mm512_extracti32x4_epi32(packed, 3))));
    }
    return count + n;
}

// Merges::gaps, sixteen pairs at a time.
static inline uint64_t gaps_in(const Merges& merges, const uint8_t* word, size_t size) {
    uint64_t pairs = _bzhi_u64(~0ull, static_cast<unsigned>(size - 1)), gaps = 0;
    for (unsigned i = 0; i + 1 < size; i += 16) {
        __mmask16 here = static_cast<__mmask16>(pairs >> i);
        __m512i first = _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(here, word + i));
        __m512i second = _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(here, word + i + 1));
        __m512i pair = _mm512_or_si512(first, _mm512_slli_epi32(second, 8));
        __m512i bits = _mm512_i32gather_epi32(_mm512_srli_epi32(pair, 5), merges.joints(), 4);
        __m512i bit = _mm512_srlv_epi32(bits, _mm512_and_si512(pair, _mm512_set1_epi32(31)));
        gaps |= static_cast<uint64_t>(_mm512_testn_epi32_mask(bit, _mm512_set1_epi32(1))) << i;
    }
    return gaps & pairs;
}

static inline __m512i widen(const uint8_t* text) {
    return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(text)));
}
static inline __m512i widen(const uint16_t* text) {
    return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(text)));
}
static inline __m512i widen(const uint32_t* text) { return _mm512_loadu_si512(text); }

static inline __m512i all(int bits) { return _mm512_set1_epi32(bits); }

#include "tokenizer/merge_x16.hpp"

// A byte of UTF-8 that is not the first: six bits of a character from some place on.
static inline __m512i six(__m512i c, int from) {
    return _mm512_or_si512(_mm512_and_si512(_mm512_srli_epi32(c, from), all(63)), all(0x80));
}

// Sixteen characters at a time: each becomes up to four bytes in a lane of its own, then bytes that are none go.
template <class Unit>
static inline size_t many_to_utf8(const Unit* text, size_t count, uint8_t*& out) {
    size_t i = 0;
    for (; i + 16 <= count; i += 16) {
        __m512i c = widen(text + i);
        __mmask16 two = _mm512_cmpge_epu32_mask(c, all(0x80));
        if (!two) {
            _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm512_cvtepi32_epi8(c));
            out += 16;
            continue;
        }
        if (sizeof(Unit) > 1 && _mm512_cmpeq_epi32_mask(_mm512_srli_epi32(c, 11), all(0x1B))) break;
        __mmask16 three = _mm512_cmpge_epu32_mask(c, all(0x800)), four = _mm512_cmpge_epu32_mask(c, all(0x10000));
        __m512i last = six(c, 0);
        __m512i bytes = c;
        bytes = _mm512_mask_or_epi32(bytes, two, _mm512_or_si512(_mm512_srli_epi32(c, 6), all(0xC0)), _mm512_slli_epi32(last, 8));
        if (sizeof(Unit) > 1) {
            __m512i tail = _mm512_or_si512(_mm512_slli_epi32(six(c, 6), 8), _mm512_slli_epi32(last, 16));
            bytes = _mm512_mask_or_epi32(bytes, three, _mm512_or_si512(_mm512_srli_epi32(c, 12), all(0xE0)), tail);
            if (sizeof(Unit) > 2 && four) {
                tail = _mm512_or_si512(_mm512_slli_epi32(six(c, 12), 8), _mm512_slli_epi32(tail, 8));
                bytes = _mm512_mask_or_epi32(bytes, four, _mm512_or_si512(_mm512_srli_epi32(c, 18), all(0xF0)), tail);
            }
        }
        __mmask64 kept = _mm512_test_epi8_mask(bytes, bytes) | 0x1111111111111111ull;
        _mm512_storeu_si512(out, _mm512_maskz_compress_epi8(kept, bytes));
        out += __builtin_popcountll(kept);
    }
    return i;
}

#include "tokenizer/simd_loops.hpp"

}  // namespace avx512
}  // namespace warploom
WARPLOOM_COMPILE_FOR_ALL

namespace warploom {

const Kernels* kernels_for_avx512() {
    __builtin_cpu_init();
    bool here = __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                __builtin_cpu_supports("avx512vbmi2") && __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2");
    return here ? avx512::kernels_named("avx512") : nullptr;
}

}  // namespace warploom

#else

namespace warploom {
const Kernels* kernels_for_avx512() { return nullptr; }
}  // namespace warploom

#endif
