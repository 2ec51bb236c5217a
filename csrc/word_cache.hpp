// The word cache: most words of a text have been seen before, and then their ids need only be copied.
//
// A word of up to 15 bytes and its length fit in 16 bytes, and so do up to four ids: an entry is half a cache line, and
// a bucket of two entries is one line. Finding a word costs one multiplication and one memory access, and since the
// place is known from the word alone, the access can be requested dozens of words ahead (`bucket_of` + prefetch).
// Longer words, and words of more than four ids, are kept in a second table with their bytes in an arena.
//
// Bounded: the first table grows with use up to 8 MiB, then new words replace old ones; the second is emptied when full.
// A cache belongs to one thread at a time (CachePool lends them), so there is nothing to lock.
#pragma once

#include <atomic>
#include <cstring>
#include <memory>
#include <vector>

#include "merges.hpp"

namespace warploom {

struct WordKey {
    uint64_t low, high;  // the bytes, and the length in the topmost byte
    bool operator==(const WordKey& other) const { return ((low ^ other.low) | (high ^ other.high)) == 0; }
};

constexpr size_t kKeyBytes = 15;

inline uint64_t hash_key(WordKey key) {
    __extension__ using Wide = unsigned __int128;
    Wide product = static_cast<Wide>(key.low ^ 0x9E3779B97F4A7C15ull) * (key.high ^ 0xD6E8FEB86659FD93ull);
    return static_cast<uint64_t>(product) ^ static_cast<uint64_t>(product >> 64);
}

// Which bits of 16 loaded bytes belong to a word of each length.
struct KeyMasks {
    WordKey of[kKeyBytes + 1];
    KeyMasks() {
        for (size_t n = 0; n <= kKeyBytes; ++n) {
            of[n].low = n >= 8 ? ~0ull : (1ull << 8 * n) - 1;
            of[n].high = n <= 8 ? 0 : (1ull << 8 * (n - 8)) - 1;
        }
    }
};

inline const KeyMasks key_masks;

// The key of a word whose first byte is followed by at least 15 readable ones.
inline WordKey load_key(const uint8_t* word, size_t length) {
    WordKey key;
    std::memcpy(&key, word, 16);
    const WordKey& mask = key_masks.of[length];
    return {key.low & mask.low, (key.high & mask.high) | static_cast<uint64_t>(length) << 56};
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

uint64_t hash_word(const uint8_t* word, size_t length);

class WordCache {
public:
    static constexpr uint32_t kIdMask = (1u << 29) - 1;  // the last id shares its word with the number of ids

    struct alignas(32) Entry {
        WordKey key;
        uint32_t ids[4];
        uint32_t count() const { return ids[3] >> 29; }
    };
    struct alignas(64) Bucket {
        Entry entry[2];
    };

    WordCache();

    const Bucket* bucket_of(WordKey key) const { return buckets_.get() + (hash_key(key) >> shift_); }
    const Bucket* table() const { return buckets_.get(); }
    void insert(WordKey key, const TokenId* ids, size_t count);

    // Ids of a word that does not fit above; nullptr if unknown.
    const TokenId* find_long(const uint8_t* word, size_t length, size_t& count) const;
    void insert_long(const uint8_t* word, size_t length, const TokenId* ids, size_t count);

    MergeScratch scratch;
    std::vector<TokenId> ids;           // of the word being encoded
    std::vector<uint32_t> ends;         // of the pieces being looked up

private:
    static constexpr int kFirstBits = 10, kLastBits = 17;
    static constexpr size_t kLongSlots = 1 << 15, kLongLimit = kLongSlots / 2, kArenaLimit = 4 << 20, kLongest = 512;

    struct LongWord {
        uint64_t hash;
        uint32_t place, length, count;
    };
    struct Free {
        void operator()(Bucket* buckets) const;
    };

    void resize(int bits);

    std::unique_ptr<Bucket[], Free> buckets_;
    int bits_ = 0, shift_ = 0;
    size_t inserted_ = 0;
    std::vector<LongWord> long_words_;
    size_t long_count_ = 0;
    std::vector<uint8_t> arena_;  // the bytes, then the ids, of each long word
};

// Lends caches: each is used by one thread at a time and stays warm between calls. Lock-free, so that a process may
// fork at any moment; a child that finds a slot lost to a parent's thread just makes a new cache.
class CachePool {
public:
    ~CachePool() {
        for (auto& slot : slots_) delete slot.load();
    }
    std::unique_ptr<WordCache> take() {
        for (auto& slot : slots_)
            if (slot.load(std::memory_order_relaxed))
                if (WordCache* cache = slot.exchange(nullptr)) return std::unique_ptr<WordCache>(cache);
        return std::make_unique<WordCache>();
    }
    void give_back(std::unique_ptr<WordCache> cache) {
        for (auto& slot : slots_) {
            WordCache* none = nullptr;
            if (slot.compare_exchange_strong(none, cache.get())) {
                cache.release();
                return;
            }
        }
    }

private:
    std::atomic<WordCache*> slots_[16] = {};
};

}  // namespace warploom
