#include "tokenizer/splitter.hpp"

namespace warploom {

uint64_t safe_cut(const uint8_t* text, Pattern pattern, uint64_t begin, uint64_t limit, uint64_t size) {
    const uint8_t* end = text + size;
    for (uint64_t at = limit; at > begin; --at) {
        if (at >= size || (text[at] & 0xC0) == 0x80 || text[at] == '\'') continue;
        if (pattern == Pattern::kSpaces && text[at] != ' ') continue;
        if (character_at(text + at, end).bits & (kLetter | kDigit | kMark)) continue;
        uint64_t before = at - 1;
        while (before > begin && (text[before] & 0xC0) == 0x80) --before;
        if (character_at(text + before, end).bits & (kLetter | kDigit)) return at;
    }
    return begin;
}

}  // namespace warploom
