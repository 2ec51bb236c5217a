#include "word_cache.hpp"

#include <cstdlib>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace warploom {

void* allocate_zeroed(size_t size) {
    constexpr size_t kHuge = 2 << 20;
    size_t alignment = size >= kHuge ? kHuge : 64;
#if defined(_WIN32)
    void* memory = _aligned_malloc(size, alignment);
#else
    void* memory = std::aligned_alloc(alignment, (size + alignment - 1) / alignment * alignment);
#endif
    if (!memory) throw std::bad_alloc();
#if defined(__linux__)
    if (size >= kHuge) madvise(memory, size, MADV_HUGEPAGE);
#endif
    std::memset(memory, 0, size);
    return memory;
}

void release(void* memory) {
#if defined(_WIN32)
    _aligned_free(memory);
#else
    std::free(memory);
#endif
}

template <class Id>
WordCache<Id>::WordCache() : slots_(kFirstSlots) {
    resize(kFirstBits);
}

template <class Id>
WordCache<Id>::~WordCache() {
    release(buckets_);
}

template <class Id>
void WordCache<Id>::resize(int bits) {
    Bucket* old = buckets_;
    size_t old_size = old ? size_t{1} << bits_ : 0;
    buckets_ = static_cast<Bucket*>(allocate_zeroed((size_t{1} << bits) * sizeof(Bucket)));
    bits_ = bits;
    shift_ = 64 - bits;
    inserted_ = 0;
    for (size_t i = 0; i < old_size; ++i)
        for (const Entry& entry : old[i].entry)
            if (entry.key.high) insert_short(entry.key, entry.ids);
    release(old);
}

template <class Id>
void WordCache<Id>::insert_short(WordKey key, const Id* ids) {
    uint64_t place = hash_key(key) >> shift_;
    Entry* free = nullptr;
    for (uint64_t near : {place, place ^ 1})
        for (Entry& entry : buckets_[near].entry)
            if (!free && !entry.key.high) free = &entry;
    Entry& entry = free ? *free : buckets_[place].entry[1];  // who came first stays: frequent words come early
    entry.key = key;
    std::memcpy(entry.ids, ids, sizeof entry.ids);
    ++inserted_;
}

template <class Id>
void WordCache<Id>::insert(const uint8_t* word, size_t length, const TokenId* ids, size_t count) {
    if (length > kKeyBytes || count > kInline) return insert_long(word, length, ids, count);
    if (inserted_ * 2 >= size_t{1} << bits_ && bits_ < kLastBits) resize(bits_ + 2 < kLastBits ? bits_ + 2 : kLastBits);
    Id packed[kInline + 1] = {};
    for (size_t i = 0; i < count; ++i) packed[i] = static_cast<Id>(ids[i]);
    packed[kInline] = static_cast<Id>(count);
    insert_short(copy_key(word, length), packed);
}

template <class Id>
const typename WordCache<Id>::LongWord* WordCache<Id>::find_long(const uint8_t* word, size_t length, uint64_t hash) const {
    for (size_t slot = hash & (slots_.size() - 1);; slot = (slot + 1) & (slots_.size() - 1)) {
        const LongWord* known = record_at(&slots_[slot]);
        if (!known) return nullptr;
        if (known->hash == hash && known->length == length && std::memcmp(known->bytes(), word, length) == 0) return known;
    }
}

template <class Id>
void WordCache<Id>::insert_long(const uint8_t* word, size_t length, const TokenId* ids, size_t count) {
    if (length > kLongest) return;
    if (arena_.size() > kArenaLimit || long_count_ * 2 >= kLastSlots) {
        slots_.assign(slots_.size(), 0);
        arena_.clear();
        long_count_ = 0;
    }
    if (long_count_ * 2 >= slots_.size()) grow_slots();
    size_t place = arena_.size();
    arena_.resize(place + (sizeof(LongWord) + count * sizeof(Id) + length + 7) / 8);
    LongWord* record = new (arena_.data() + place)
        LongWord{hash_word(word, length), static_cast<uint32_t>(length), static_cast<uint32_t>(count)};
    Id* kept = const_cast<Id*>(record->ids());
    for (size_t i = 0; i < count; ++i) kept[i] = static_cast<Id>(ids[i]);
    std::memcpy(kept + count, word, length);
    size_t slot = record->hash & (slots_.size() - 1);
    while (slots_[slot]) slot = (slot + 1) & (slots_.size() - 1);
    slots_[slot] = static_cast<uint32_t>(place + 1);
    ++long_count_;
}

template <class Id>
void WordCache<Id>::grow_slots() {
    std::vector<uint32_t> old(slots_.size() * 4);
    old.swap(slots_);
    for (uint32_t place : old) {
        if (!place) continue;
        size_t slot = record_at(&place)->hash & (slots_.size() - 1);
        while (slots_[slot]) slot = (slot + 1) & (slots_.size() - 1);
        slots_[slot] = place;
    }
}

template class WordCache<uint16_t>;
template class WordCache<uint32_t>;

}  // namespace warploom
