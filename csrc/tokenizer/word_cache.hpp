// The word cache: most words of a text have been seen before, and then their ids need only be copied.
//
// A word of up to 15 bytes and its length fit in 16 bytes, and its ids and their number in 16 more: an entry is half a
// cache line. Finding a word costs two multiplications and one memory access, and since the place is known from the word
// alone, the access can be requested dozens of words ahead (`home_of` + prefetch). A word whose home is taken lives in
// one of the three places beside it. Where there are more ids than fit, the entry says where in an arena they are.
// Longer words have a table of their own: slots of four bytes, and a record of ids and bytes for each in the arena.
//
// Bounded: the first table grows with use up to 8 MiB, then new words replace old ones; the arena is emptied when it
// reaches 16 MiB. A cache belongs to one thread at a time (CachePool lends them): there is nothing to lock.
#pragma once

#include <atomic>
#include <cstring>
#include <memory>
#include <vector>

#include "tokenizer/merges.hpp"
#include "tokenizer/word_key.hpp"

namespace warploom {

// The number of the core this thread runs on; 0 where the system does not say.
unsigned core();

// Id: uint16_t for vocabularies of up to 65536 tokens, else uint32_t.
template <class Id>
class WordCache {
public:
    static constexpr size_t kInline = 16 / sizeof(Id) - 1;  // ids in an entry; the last place holds their number
    static constexpr size_t kMargin = 16;                   // `put` needs room for so many ids, however few it writes
    static constexpr size_t kLongest = 1024;                // longer words are not kept

    struct Entry {
        WordKey key;
        Id ids[kInline + 1];
        size_t count() const { return ids[kInline]; }
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

    const Entry* table() const { return entries_; }
    unsigned shift() const { return static_cast<unsigned>(shift_); }
    const Entry* home_of(WordKey key) const { return entries_ + (hash_key(key) >> shift_); }

    // A word that is not at home may be beside it (nullptr if it is not). It then changes places with the one that is,
    // so that words which are looked up often end up at home.
    const Entry* find_beside(WordKey key) {
        uint64_t home = hash_key(key) >> shift_;
        for (uint64_t step = 1; step < 4; ++step)
            if (entries_[home ^ step].key == key) {
                std::swap(entries_[home ^ step], entries_[home]);
                return entries_ + home;
            }
        return nullptr;
    }
    const Entry* find(WordKey key) {
        const Entry* home = home_of(key);
        if (!home->key.high) return nullptr;  // then hardly beside: a new word waits for one access instead of two
        return home->key == key ? home : find_beside(key);
    }

    // Writes the ids of an entry: always 16 bytes, of which the next word overwrites the superfluous.
    Id* put(const Entry& entry, Id* out) const {
        size_t count = entry.count();
        if (__builtin_expect(count > kInline, 0)) std::memcpy(out, arena_.data() + place_in(entry), kMargin * sizeof(Id));
        else std::memcpy(out, entry.ids, 16);
        return out + count;
    }

    const LongWord* find_long(const uint8_t* word, size_t length) const;

    void insert(const uint8_t* word, size_t length, const Id* ids, size_t count);

    // Stops work on an endless word if the user asked for it.
    void checkpoint() const;

    // Makes room at once for the words of a text of this many bytes, which spares moving them later.
    void expect(size_t text_size);

    MergeScratch scratch;
    NewWords waiting;            // to be merged and inserted
    std::vector<TokenId> ids;    // of the word being encoded
    std::vector<uint8_t> utf8;   // of the segment being encoded, where the text is not UTF-8
    std::vector<uint8_t> marked; // the same with spaces for ▁
    std::vector<uint32_t> ends;  // of the pieces of a text

private:
    static constexpr int kFirstBits = 11, kLastBits = 18;
    static constexpr size_t kFirstSlots = 1 << 10, kLastSlots = 1 << 18, kArenaLimit = (16 << 20) / 8;

    void resize(int bits);
    void insert_short(WordKey key, const Id* ids);
    static uint32_t place_in(const Entry& entry) {
        uint32_t place;
        std::memcpy(&place, entry.ids, sizeof place);
        return place;
    }
    size_t reserve(size_t size);
    void insert_long(const uint8_t* word, size_t length, const Id* ids, size_t count);
    const LongWord* record_at(uint32_t slot) const { return reinterpret_cast<const LongWord*>(arena_.data() + (slot - 1)); }
    void grow_slots();

    Entry* entries_ = nullptr;
    int bits_ = 0, shift_ = 0;
    size_t inserted_ = 0;
    std::vector<uint32_t> slots_;  // one more than a place in the arena; 0 for none
    std::vector<uint64_t> arena_;
    size_t long_count_ = 0;
};

extern template class WordCache<uint16_t>;
extern template class WordCache<uint32_t>;

// Lends caches: each is used by one thread at a time and stays warm between calls. A thread gets the one that its core
// used last, if it can, since that core's own memory still holds the words seen most. Lock-free, so that a process may
// fork at any moment; a child that finds a slot lost to a parent's thread just makes a new cache.
template <class Cache>
class CachePool {
public:
    ~CachePool() {
        for (auto& slot : slots_) delete slot.load();
    }
    std::unique_ptr<Cache> take() {
        for (size_t i = 0, here = core(); i < kSlots; ++i) {
            std::atomic<Cache*>& slot = slots_[(here + i) % kSlots];
            if (slot.load(std::memory_order_relaxed))
                if (Cache* cache = slot.exchange(nullptr)) return std::unique_ptr<Cache>(cache);
        }
        return std::make_unique<Cache>();
    }
    void give_back(std::unique_ptr<Cache> cache) {
        for (size_t i = 0, here = core(); i < kSlots; ++i) {
            Cache* none = nullptr;
            if (slots_[(here + i) % kSlots].compare_exchange_strong(none, cache.get())) {
                cache.release();
                return;
            }
        }
    }

private:
    static constexpr size_t kSlots = 16;
    std::atomic<Cache*> slots_[kSlots] = {};
};

}  // namespace warploom
