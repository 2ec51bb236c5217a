// The loops for any machine: one table look-up a byte, one bit a class.
#include "tokenizer/simd_dispatch.hpp"
#include "tokenizer/masks.hpp"

namespace warploom {
namespace portable {

static inline void classify(const uint8_t* text, Masks& m) {
    m = Masks{};
    for (int i = 0; i < 64; ++i) {
        uint8_t byte = text[i];
        uint64_t bit = 1ull << i;
        if (byte >= 0x80) {
            m.high |= bit;
            if ((byte >= 0xE5 && byte <= 0xE8) || byte == 0xEB || byte == 0xEC) m.ideograph |= bit;
            continue;
        }
        uint8_t bits = unicode_classes.ascii[byte];
        if (bits & kLetter) m.letter |= bit;
        if (bits & kLetter && bits & kUpper) m.upper |= bit;
        if (bits & kDigit) m.digit |= bit;
        if (byte == ' ') m.blank |= bit;
        else if (bits & kSpace) m.other_space |= bit;
        if (is_newline(byte)) m.newline |= bit;
        if (byte == '\'') m.apostrophe |= bit;
        if (byte == '/') m.slash |= bit;
    }
}

static inline size_t emit(uint64_t bits, uint32_t base, uint32_t* out, size_t count) {
    for (; bits; bits &= bits - 1) out[count++] = base + static_cast<uint32_t>(__builtin_ctzll(bits));
    return count;
}

static inline uint64_t gaps_in(const Merges& merges, const uint8_t* word, size_t size) { return merges.gaps(word, size); }

static void merge_x16(const Merges& merges, NewWords& words) { merges.encode_each(words); }

template <class Unit>
static inline size_t many_to_utf8(const Unit*, size_t, uint8_t*&) {
    return 0;
}

#include "tokenizer/simd_loops.hpp"

}  // namespace portable

const Kernels* kernels_for_any() { return portable::kernels_named("portable"); }

}  // namespace warploom
