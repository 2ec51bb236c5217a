// The word cache: most words of a text have been seen before, and then their ids need only be copied.
//
// A word of up to 15 bytes and its length fit in 16 bytes, and its ids and their number in 16 more: an entry is half a
// cache line, and a bucket of two entries is one line. Finding a word costs one multiplication and one memory access,
// and since the place is known from the word alone, the access can be requested dozens of words ahead (`bucket_of` +
// prefetch). A full bucket overflows into its neighbor. Longer words, and words of more ids, are kept in a second table:
// slots of eight bytes, and a record of ids and bytes for each word in an arena.
//
// Bounded: the first table grows with use up to 8 MiB, then new words replace old ones; the second is emptied when its
// arena reaches 16 MiB. A cache belongs to one thread at a time (CachePool lends them): there is nothing to lock.
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

inline uint64_t mix(uint64_t a, uint64_t b) {
    __extension__ using Wide = unsigned __int128;
    Wide product = static_cast<Wide>(a ^ 0x9E3779B97F4A7C15ull) * (b ^ 0xD6E8FEB86659FD93ull);
    return static_cast<uint64_t>(product) ^ static_cast<uint64_t>(product >> 64);
}

inline uint64_t hash_key(WordKey key) { return mix(key.low, key.high); }

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

// Memory in huge pages where the system has them: a look-up then never waits for an address translation.
void* allocate_zeroed(size_t size);
void release(void* memory);

// Id: uint16_t for vocabularies of up to 65536 tokens, else uint32_t.
template <class Id>
class WordCache {
public:
    static constexpr size_t kInline = 16 / sizeof(Id) - 1;  // ids in an entry; the last place holds their number
    static constexpr size_t kLongest = 1024;                // longer words are not kept

    struct Entry {
        WordKey key;
        Id ids[kInline + 1];
        size_t count() const { return ids[kInline]; }
    };
    struct alignas(64) Bucket {
        Entry entry[2];
    };
    struct LongWord {  // in the arena, followed by its ids and its bytes
        uint64_t hash;
        uint32_t length, count;
        const Id* ids() const { return reinterpret_cast<const Id*>(this + 1); }
        const uint8_t* bytes() const { return reinterpret_cast<const uint8_t*>(ids() + count); }
    };

    WordCache();
    ~WordCache();
    WordCache(const WordCache&) = delete;

    const Bucket* table() const { return buckets_; }
    const Bucket* bucket_of(WordKey key) const { return buckets_ + (hash_key(key) >> shift_); }

    // A word that was not in its bucket may be in the one beside it (nullptr if it is not). It then changes places with
    // one at home, so that words which are looked up often end up there.
    const Entry* find_beside(WordKey key) {
        uint64_t place = hash_key(key) >> shift_;
        for (Entry& entry : buckets_[place ^ 1].entry)
            if (entry.key == key) {
                Entry& home = buckets_[place].entry[1];
                std::swap(entry, home);
                return &home;
            }
        return nullptr;
    }

    // Long words are found in three steps, so that many can be under way at once: the slot, the record, the comparison.
    const uint32_t* slot_of(uint64_t hash) const { return slots_.data() + (hash & (slots_.size() - 1)); }
    const LongWord* record_at(const uint32_t* slot) const {
        return *slot ? reinterpret_cast<const LongWord*>(arena_.data() + (*slot - 1)) : nullptr;
    }
    const LongWord* find_long(const uint8_t* word, size_t length, uint64_t hash) const;

    void insert(const uint8_t* word, size_t length, const TokenId* ids, size_t count);

    MergeScratch scratch;
    std::vector<TokenId> ids;    // of the word being encoded
    std::vector<uint32_t> ends;  // of the pieces being looked up

private:
    static constexpr int kFirstBits = 10, kLastBits = 17;
    static constexpr size_t kFirstSlots = 1 << 10, kLastSlots = 1 << 18, kArenaLimit = (16 << 20) / 8;

    void resize(int bits);
    void insert_short(WordKey key, const Id* ids);
    void insert_long(const uint8_t* word, size_t length, const TokenId* ids, size_t count);
    void grow_slots();

    Bucket* buckets_ = nullptr;
    int bits_ = 0, shift_ = 0;
    size_t inserted_ = 0;
    std::vector<uint32_t> slots_;  // one more than a place in the arena; 0 for none
    std::vector<uint64_t> arena_;
    size_t long_count_ = 0;
};

// Lends caches: each is used by one thread at a time and stays warm between calls. Lock-free, so that a process may
// fork at any moment; a child that finds a slot lost to a parent's thread just makes a new cache.
template <class Cache>
class CachePool {
public:
    ~CachePool() {
        for (auto& slot : slots_) delete slot.load();
    }
    std::unique_ptr<Cache> take() {
        for (auto& slot : slots_)
            if (slot.load(std::memory_order_relaxed))
                if (Cache* cache = slot.exchange(nullptr)) return std::unique_ptr<Cache>(cache);
        return std::make_unique<Cache>();
    }
    void give_back(std::unique_ptr<Cache> cache) {
        for (auto& slot : slots_) {
            Cache* none = nullptr;
            if (slot.compare_exchange_strong(none, cache.get())) {
                cache.release();
                return;
            }
        }
    }

private:
    std::atomic<Cache*> slots_[16] = {};
};

}  // namespace warploom
