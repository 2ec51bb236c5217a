// CPython's strings, of one, two or four bytes a character, to UTF-8. Included by simd_loops.hpp, once per instruction set,
// after `many_to_utf8`, which takes as many characters from the front as the machine can do at once.

// Sixteen ASCII characters at a time.
template <class Unit>
static inline size_t ascii_to_utf8(const Unit* text, size_t count, uint8_t*& out) {
    size_t i = 0;
    for (; i + 16 <= count; i += 16) {
        uint32_t any = 0;
        for (size_t j = 0; j < 16; ++j) any |= text[i + j];
        if (any >= 0x80) break;
        for (size_t j = 0; j < 16; ++j) out[j] = static_cast<uint8_t>(text[i + j]);
        out += 16;
    }
    return i;
}

// Writes the UTF-8 of characters and returns its size; `out` has room for the longest, and 64 bytes more. A lone
// surrogate, which has no UTF-8, makes it return kNoUtf8.
template <class Unit>
static size_t to_utf8(const Unit* text, size_t count, uint8_t* out) {
    uint8_t* const from = out;
    for (size_t i = 0; i < count;) {
        i += many_to_utf8(text + i, count - i, out);
        i += ascii_to_utf8(text + i, count - i, out);
        if (i == count) break;
        uint32_t c = text[i++];
        if (c < 0x80) {
            *out++ = static_cast<uint8_t>(c);
        } else if (c < 0x800) {
            *out++ = static_cast<uint8_t>(0xC0 | c >> 6);
            *out++ = static_cast<uint8_t>(0x80 | (c & 63));
        } else if (c < 0x10000) {
            if (c >> 11 == 0x1B) return kNoUtf8;
            *out++ = static_cast<uint8_t>(0xE0 | c >> 12);
            *out++ = static_cast<uint8_t>(0x80 | (c >> 6 & 63));
            *out++ = static_cast<uint8_t>(0x80 | (c & 63));
        } else {
            *out++ = static_cast<uint8_t>(0xF0 | c >> 18);
            *out++ = static_cast<uint8_t>(0x80 | (c >> 12 & 63));
            *out++ = static_cast<uint8_t>(0x80 | (c >> 6 & 63));
            *out++ = static_cast<uint8_t>(0x80 | (c & 63));
        }
    }
    return static_cast<size_t>(out - from);
}
