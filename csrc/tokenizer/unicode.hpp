// Unicode classes of code points, and a UTF-8 reader that finds them without branching on the value.
//
// A pattern sees only a few properties of a character: letter, digit, space, mark, case, sign. They are one byte of
// bits per code point, in a two-stage table: code points share blocks of 64, and most blocks are alike. The last byte
// of a UTF-8 sequence carries six bits, so the bytes before it name the block.
#pragma once

#include <cstdint>

namespace warploom {

enum Class : uint8_t {
    kLetter = 1,
    kDigit = 2,
    kSpace = 4,
    kMark = 8,
    kUpper = 16,  // Lu Lt Lm Lo M: may stand in the first half of an o200k word
    kLower = 32,  // Ll Lm Lo M: may stand in its second half
    kSymbol = 64,  // symbols beyond ASCII; signs that are none are punctuation to Falcon
    kSign = 128,   // punctuation and symbols
};

struct UnicodeClasses {
    static constexpr int kBlocks = 0x110000 / 64;
    uint8_t ascii[128];
    uint16_t block_of[kBlocks + 16];  // the margin keeps four-byte sequences beyond U+10FFFF inside
    uint8_t classes[1024 * 64];
    UnicodeClasses();
};

extern const UnicodeClasses unicode_classes;

// The class of a code point; none beyond the last.
inline uint8_t class_of(uint32_t code) {
    return code < 0x110000 ? unicode_classes.classes[unicode_classes.block_of[code >> 6] * 64 + (code & 63)] : 0;
}

// The class of a character and the bytes it takes.
struct Character {
    uint8_t bits;
    uint8_t length;
};

// Reads the character at p < end. The text is valid UTF-8; if it is not, the answer is arbitrary but stays in bounds.
inline Character character_at(const uint8_t* p, const uint8_t* end) {
    const UnicodeClasses& table = unicode_classes;
    uint32_t first = p[0];
    if (first < 0x80) return {table.ascii[first], 1};
    uint32_t block, length;
    if (first < 0xE0) {
        block = first & 0x1F;
        length = 2;
    } else if (first < 0xF0) {
        if (end - p < 3) return {0, static_cast<uint8_t>(end - p)};
        block = (first & 0x0F) << 6 | (p[1] & 0x3F);
        length = 3;
    } else {
        if (end - p < 4) return {0, static_cast<uint8_t>(end - p)};
        block = (first & 0x07) << 12 | (p[1] & 0x3F) << 6 | (p[2] & 0x3F);
        if (block >= UnicodeClasses::kBlocks) return {0, 4};
        length = 4;
    }
    if (end - p < static_cast<int>(length)) return {0, static_cast<uint8_t>(end - p)};
    return {table.classes[table.block_of[block] * 64 + (p[length - 1] & 0x3F)], static_cast<uint8_t>(length)};
}

// The offset of the first byte that is not part of a valid UTF-8 sequence; `size` if there is none.
uint64_t first_invalid_utf8(const uint8_t* text, uint64_t size);

}  // namespace warploom
