// A word as something to compare and to hash at once: up to 15 bytes and their number, in 16 bytes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace warploom {

struct WordKey {
    uint64_t low, high;  // the bytes, and the length in the topmost byte
    const uint8_t* bytes() const { return reinterpret_cast<const uint8_t*>(this); }
    size_t length() const { return high >> 56; }
    bool operator==(const WordKey& other) const { return ((low ^ other.low) | (high ^ other.high)) == 0; }
};

constexpr size_t kKeyBytes = 15;

// Odd numbers of this process alone: under known ones a text can be written whose words all have one hash, and a table
// of them takes quadratic time.
struct HashSecrets {
    uint64_t low, high;
};
extern const HashSecrets hash_secrets;

inline uint64_t mix(uint64_t a, uint64_t b) {
    __extension__ using Wide = unsigned __int128;
    Wide product = static_cast<Wide>(a ^ hash_secrets.low) * (b ^ hash_secrets.high);
    return static_cast<uint64_t>(product) ^ static_cast<uint64_t>(product >> 64);
}

// The upper bits are the good ones.
inline uint64_t hash_key(WordKey key) { return key.low * hash_secrets.low + key.high * hash_secrets.high; }

// Which bits of 16 loaded bytes belong to a word of each length, and the length where it stands in the key.
typedef uint64_t Bits128 __attribute__((vector_size(16)));
struct KeyMasks {
    struct {
        Bits128 bytes, length;
    } of[kKeyBytes + 1];
    KeyMasks() {
        for (size_t n = 0; n <= kKeyBytes; ++n) {
            of[n].bytes = Bits128{n >= 8 ? ~0ull : (1ull << 8 * n) - 1, n <= 8 ? 0 : (1ull << 8 * (n - 8)) - 1};
            of[n].length = Bits128{0, static_cast<uint64_t>(n) << 56};
        }
    }
};

inline const KeyMasks key_masks;

// The key of a word whose first byte is followed by at least 15 readable ones.
inline WordKey load_key(const uint8_t* word, size_t length) {
    Bits128 bytes;
    std::memcpy(&bytes, word, 16);
    bytes = (bytes & key_masks.of[length].bytes) | key_masks.of[length].length;
    WordKey key;
    std::memcpy(&key, &bytes, 16);
    return key;
}

// The key of a word that may be the last thing in memory.
inline WordKey copy_key(const uint8_t* word, size_t length) {
    uint8_t bytes[16] = {};
    std::memcpy(bytes, word, length);
    bytes[15] = static_cast<uint8_t>(length);
    WordKey key;
    std::memcpy(&key, bytes, 16);
    return key;
}

// The key of a word, where text goes on to `end`.
inline WordKey key_of(const uint8_t* word, size_t length, const uint8_t* end) {
    return end - word > 15 ? load_key(word, length) : copy_key(word, length);
}

// The hash of a word of any length.
inline uint64_t hash_word(const uint8_t* word, size_t length) {
    if (length <= kKeyBytes) return hash_key(copy_key(word, length));
    uint64_t hash = length, a, b;
    for (size_t i = 0; i + 16 < length; i += 16) {
        std::memcpy(&a, word + i, 8);
        std::memcpy(&b, word + i + 8, 8);
        hash = mix(hash ^ a, b);
    }
    std::memcpy(&a, word + length - 16, 8);
    std::memcpy(&b, word + length - 8, 8);
    return mix(hash ^ a, b);
}

}  // namespace warploom
