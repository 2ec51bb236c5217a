// The loops for AVX2: two halves of 32 bytes.
#include "tokenizer/simd_dispatch.hpp"
#include "tokenizer/masks.hpp"
#include "simd.hpp"

#ifdef WARPLOOM_X86
WARPLOOM_COMPILE_FOR("avx2,bmi,bmi2,lzcnt,popcnt")

namespace warploom {
namespace avx2 {

struct Bytes64 {
    __m256i low, high;
};

static inline uint64_t mask_of(__m256i low, __m256i high) {
    return static_cast<uint32_t>(_mm256_movemask_epi8(low)) |
           static_cast<uint64_t>(static_cast<uint32_t>(_mm256_movemask_epi8(high))) << 32;
}

static inline __m256i in_range(__m256i bytes, char from, char count) {
    __m256i offset = _mm256_sub_epi8(bytes, _mm256_set1_epi8(from));
    return _mm256_cmpeq_epi8(_mm256_min_epu8(offset, _mm256_set1_epi8(static_cast<char>(count - 1))), offset);
}

static inline uint64_t in_range(Bytes64 bytes, char from, char count) {
    return mask_of(in_range(bytes.low, from, count), in_range(bytes.high, from, count));
}

static inline uint64_t equal(Bytes64 bytes, char byte) {
    __m256i all = _mm256_set1_epi8(byte);
    return mask_of(_mm256_cmpeq_epi8(bytes.low, all), _mm256_cmpeq_epi8(bytes.high, all));
}

static inline void classify(const uint8_t* text, Masks& m) {
    Bytes64 bytes = {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(text)),
                     _mm256_loadu_si256(reinterpret_cast<const __m256i*>(text + 32))};
    __m256i fold = _mm256_set1_epi8(0x20);
    m.letter = in_range(Bytes64{_mm256_or_si256(bytes.low, fold), _mm256_or_si256(bytes.high, fold)}, 'a', 26);
    m.upper = in_range(bytes, 'A', 26);
    m.digit = in_range(bytes, '0', 10);
    m.blank = equal(bytes, ' ');
    m.other_space = in_range(bytes, '\t', 5);
    m.newline = equal(bytes, '\n') | equal(bytes, '\r');
    m.apostrophe = equal(bytes, '\'');
    m.slash = equal(bytes, '/');
    m.high = mask_of(bytes.low, bytes.high);
    m.ideograph = in_range(bytes, '\xE5', 4) | in_range(bytes, '\xEB', 2);
}

// Appends base + i for each bit i, eight at a time so that the number of bits is hard to mispredict.
static inline size_t emit(uint64_t bits, uint32_t base, uint32_t* out, size_t count) {
    out += count;
    size_t n = static_cast<size_t>(__builtin_popcountll(bits));
    do {
        for (int i = 0; i < 8; ++i) {
            *out++ = base + static_cast<uint32_t>(_tzcnt_u64(bits));
            bits &= bits - 1;
        }
    } while (bits);
    return count + n;
}

static inline uint64_t gaps_in(const Merges& merges, const uint8_t* word, size_t size) { return merges.gaps(word, size); }

static void merge_x16(const Merges& merges, NewWords& words) { merges.encode_each(words); }

template <class Unit>
static inline size_t many_to_utf8(const Unit*, size_t, uint8_t*&) {
    return 0;
}

#include "tokenizer/simd_loops.hpp"

}  // namespace avx2
}  // namespace warploom
WARPLOOM_COMPILE_FOR_ALL

namespace warploom {

const Kernels* kernels_for_avx2() {
    __builtin_cpu_init();
    bool here = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2");
    return here ? avx2::kernels_named("avx2") : nullptr;
}

}  // namespace warploom

#else

namespace warploom {
const Kernels* kernels_for_avx2() { return nullptr; }
}  // namespace warploom

#endif
