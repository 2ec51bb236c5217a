#include "tokenizer/word_cache.hpp"

#if defined(__linux__)
#include <sched.h>
#endif

#include "huge_pages.hpp"

namespace warploom {

unsigned core() {
#if defined(__linux__)
    const int number = sched_getcpu();
    return number < 0 ? 0 : static_cast<unsigned>(number);
#else
    return 0;
#endif
}

template <class Id>
WordCache<Id>::WordCache() : slots_(kFirstSlots) {
    resize(kFirstBits);
}

template <class Id>
WordCache<Id>::~WordCache() {
    release(entries_, sizeof(Entry) << bits_);
}

template <class Id>
void WordCache<Id>::resize(int bits) {
    Entry* old = entries_;
    size_t old_size = old ? size_t{1} << bits_ : 0;
    entries_ = static_cast<Entry*>(allocate_zeroed(sizeof(Entry) << bits));
    bits_ = bits;
    shift_ = 64 - bits;
    inserted_ = 0;
    for (size_t i = 0; i < old_size; ++i)
        if (old[i].key.high) insert_short(old[i].key, old[i].ids);
    release(old, old_size * sizeof(Entry));
}

template <class Id>
void WordCache<Id>::checkpoint() const {
    if (scratch.checkpoint) (*scratch.checkpoint)();
}

template <class Id>
void WordCache<Id>::expect(size_t text_size) {
    int bits = bits_;
    while (bits < kLastBits && (size_t{32} << bits) < text_size) ++bits;
    if (bits > bits_) resize(bits);
}

template <class Id>
void WordCache<Id>::insert_short(WordKey key, const Id* ids) {
    uint64_t home = hash_key(key) >> shift_, place = home;
    for (uint64_t step = 1; entries_[place].key.high && step < 4; ++step) place = home ^ step;
    if (entries_[place].key.high) place = home ^ 1;  // who came first stays: frequent words come early
    entries_[place].key = key;
    std::memcpy(entries_[place].ids, ids, sizeof entries_[place].ids);
    ++inserted_;
}

template <class Id>
void WordCache<Id>::insert(const uint8_t* word, size_t length, const Id* ids, size_t count) {
    if (length > kKeyBytes) return insert_long(word, length, ids, count);
    if (inserted_ * 2 >= size_t{1} << bits_ && bits_ < kLastBits) resize(bits_ + 2 < kLastBits ? bits_ + 2 : kLastBits);
    Id packed[kInline + 1] = {};
    if (count <= kInline) {
        std::memcpy(packed, ids, count * sizeof(Id));
    } else {
        uint32_t place = static_cast<uint32_t>(reserve(kMargin * sizeof(Id)));
        std::memcpy(arena_.data() + place, ids, count * sizeof(Id));
        std::memcpy(packed, &place, sizeof place);
    }
    packed[kInline] = static_cast<Id>(count);
    insert_short(copy_key(word, length), packed);
}

template <class Id>
const typename WordCache<Id>::LongWord* WordCache<Id>::find_long(const uint8_t* word, size_t length) const {
    uint64_t hash = hash_word(word, length);
    for (size_t slot = hash & (slots_.size() - 1); slots_[slot]; slot = (slot + 1) & (slots_.size() - 1)) {
        const LongWord* known = record_at(slots_[slot]);
        if (known->hash == hash && known->length == length && std::memcmp(known->bytes(), word, length) == 0) return known;
    }
    return nullptr;
}

// A place in the arena, which is emptied when it is full: what it held must be merged again.
template <class Id>
size_t WordCache<Id>::reserve(size_t size) {
    if (arena_.size() > kArenaLimit || long_count_ * 2 >= kLastSlots) {
        slots_.assign(slots_.size(), 0);
        arena_.clear();
        long_count_ = 0;
        for (size_t i = 0; i < size_t{1} << bits_; ++i)
            if (entries_[i].count() > kInline) entries_[i] = {};
    }
    size_t place = arena_.size();
    arena_.resize(place + (size + 7) / 8);
    return place;
}

template <class Id>
void WordCache<Id>::insert_long(const uint8_t* word, size_t length, const Id* ids, size_t count) {
    if (length > kLongest) return;
    size_t place = reserve(sizeof(LongWord) + count * sizeof(Id) + length);
    if (long_count_ * 2 >= slots_.size()) grow_slots();
    LongWord* record = new (arena_.data() + place)
        LongWord{hash_word(word, length), static_cast<uint32_t>(length), static_cast<uint32_t>(count)};
    Id* kept = const_cast<Id*>(record->ids());
    std::memcpy(kept, ids, count * sizeof(Id));
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
        size_t slot = record_at(place)->hash & (slots_.size() - 1);
        while (slots_[slot]) slot = (slot + 1) & (slots_.size() - 1);
        slots_[slot] = place;
    }
}

template class WordCache<uint16_t>;
template class WordCache<uint32_t>;

}  // namespace warploom
