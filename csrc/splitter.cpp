#include "splitter.hpp"

#include <atomic>
#include <stdexcept>
#include <string>

#include "split_masks.hpp"

namespace warploom {

bool has_avx512();
bool has_avx2();
SplitFunction split_avx512(Pattern pattern);
SplitFunction split_avx2(Pattern pattern);

namespace portable {

// One table look-up a byte, one bit a class.
static inline void classify(const uint8_t* text, Masks& m) {
    m = Masks{};
    for (int i = 0; i < 64; ++i) {
        uint8_t byte = text[i];
        uint64_t bit = 1ull << i;
        if (byte >= 0x80) {
            m.high |= bit;
            continue;
        }
        uint8_t bits = unicode_classes.ascii[byte];
        if (bits & kLetter) m.letter |= bit;
        if (bits & kLetter && bits & kUpper) m.upper |= bit;
        if (bits & kDigit) m.digit |= bit;
        if (byte == ' ') m.blank |= bit;
        else if (bits & kSpace) m.other_space |= bit;
        if (bits & kNewline) m.newline |= bit;
        if (byte == '\'') m.apostrophe |= bit;
        if (byte == '/') m.slash |= bit;
    }
}

static inline size_t emit(uint64_t bits, uint32_t base, uint32_t* out, size_t count) {
    for (; bits; bits &= bits - 1) out[count++] = base + static_cast<uint32_t>(__builtin_ctzll(bits));
    return count;
}

#include "split_blocks.hpp"

SplitFunction split(Pattern pattern) {
    if (pattern == Pattern::kGpt2) return split_blocks<Pattern::kGpt2>;
    if (pattern == Pattern::kGpt4) return split_blocks<Pattern::kGpt4>;
    if (pattern == Pattern::kQwen2) return split_blocks<Pattern::kQwen2>;
    return split_blocks<Pattern::kO200k>;
}

}  // namespace portable

namespace {

enum class Isa { kPortable, kAvx2, kAvx512 };

bool available(Isa isa) { return isa == Isa::kPortable || (isa == Isa::kAvx2 ? has_avx2() : has_avx512()); }

Isa best() { return available(Isa::kAvx512) ? Isa::kAvx512 : available(Isa::kAvx2) ? Isa::kAvx2 : Isa::kPortable; }

std::atomic<Isa>& chosen() {
    static std::atomic<Isa> isa{best()};
    return isa;
}

}  // namespace

SplitFunction split_function(Pattern pattern) {
    switch (chosen().load(std::memory_order_relaxed)) {
        case Isa::kAvx512: return split_avx512(pattern);
        case Isa::kAvx2: return split_avx2(pattern);
        default: return portable::split(pattern);
    }
}

const char* instruction_set() {
    Isa isa = chosen();
    return isa == Isa::kAvx512 ? "avx512" : isa == Isa::kAvx2 ? "avx2" : "portable";
}

void use_instruction_set(const char* name) {
    std::string wanted = name;
    Isa isa = wanted == "avx512" ? Isa::kAvx512 : wanted == "avx2" ? Isa::kAvx2 : Isa::kPortable;
    if (wanted == "best") isa = best();
    else if (wanted != "avx512" && wanted != "avx2" && wanted != "portable")
        throw std::invalid_argument("instruction set is '" + wanted + "'; it must be avx512, avx2, portable or best");
    if (!available(isa)) throw std::invalid_argument("this machine or build has no " + wanted);
    chosen() = isa;
}

uint64_t safe_cut(const uint8_t* text, uint64_t begin, uint64_t limit, uint64_t size) {
    const uint8_t* end = text + size;
    for (uint64_t at = limit; at > begin; --at) {
        if (at >= size || (text[at] & 0xC0) == 0x80 || text[at] == '\'') continue;
        if (character_at(text + at, end).bits & (kLetter | kDigit | kMark)) continue;
        uint64_t before = at - 1;
        while (before > begin && (text[before] & 0xC0) == 0x80) --before;
        if (character_at(text + before, end).bits & (kLetter | kDigit)) return at;
    }
    return begin;
}

}  // namespace warploom
