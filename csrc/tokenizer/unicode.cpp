#include "tokenizer/unicode.hpp"

#include <cstdlib>
#include <cstring>

namespace warploom {

namespace {

struct Run {
    uint32_t length;
    uint8_t bits;
};

const Run kRuns[] = {
#include "tokenizer/unicode_classes.inc"
};

}  // namespace

UnicodeClasses::UnicodeClasses() {
    std::memset(this, 0, sizeof *this);
    uint8_t block[64];
    int filled = 0, code_block = 0, distinct = 0;
    for (const Run& run : kRuns) {
        for (uint32_t left = run.length; left > 0;) {
            if (filled == 0 && left >= 128 && code_block > 0) {  // whole blocks of one class: the second equals the first
                uint32_t whole = left / 64;
                std::memset(block, run.bits, 64);
                int id = distinct;
                for (int i = 0; i < distinct; ++i)
                    if (std::memcmp(classes + i * 64, block, 64) == 0) id = i;
                if (id == distinct) std::memcpy(classes + 64 * distinct++, block, 64);
                for (uint32_t i = 0; i < whole; ++i) block_of[code_block++] = static_cast<uint16_t>(id);
                left -= whole * 64;
                continue;
            }
            block[filled++] = run.bits;
            --left;
            if (filled < 64) continue;
            filled = 0;
            if (distinct == 1024) std::abort();  // a future Unicode with more than 1024 distinct blocks
            std::memcpy(classes + 64 * distinct, block, 64);
            block_of[code_block++] = static_cast<uint16_t>(distinct++);
        }
    }
    std::memcpy(ascii, classes, 128);  // the first two blocks, which are never shared
}

const UnicodeClasses unicode_classes;

uint64_t first_invalid_utf8(const uint8_t* text, uint64_t size) {
    const uint8_t *p = text, *end = text + size;
    auto tail = [](uint8_t byte) { return (byte & 0xC0) == 0x80; };
    while (p < end) {
        while (end - p >= 32) {
            uint64_t a, b, c, d;
            std::memcpy(&a, p, 8);
            std::memcpy(&b, p + 8, 8);
            std::memcpy(&c, p + 16, 8);
            std::memcpy(&d, p + 24, 8);
            if ((a | b | c | d) & 0x8080808080808080ull) break;
            p += 32;
        }
        if (p >= end) break;
        uint8_t first = *p;
        if (first < 0x80) {
            ++p;
        } else if (first >= 0xC2 && first < 0xE0) {
            if (end - p < 2 || !tail(p[1])) break;
            p += 2;
        } else if (first >= 0xE0 && first < 0xF0) {
            if (end - p < 3 || !tail(p[1]) || !tail(p[2])) break;
            if ((first == 0xE0 && p[1] < 0xA0) || (first == 0xED && p[1] >= 0xA0)) break;
            p += 3;
        } else if (first >= 0xF0 && first < 0xF5) {
            if (end - p < 4 || !tail(p[1]) || !tail(p[2]) || !tail(p[3])) break;
            if ((first == 0xF0 && p[1] < 0x90) || (first == 0xF4 && p[1] >= 0x90)) break;
            p += 4;
        } else {
            break;
        }
    }
    return static_cast<uint64_t>(p - text);
}

}  // namespace warploom
