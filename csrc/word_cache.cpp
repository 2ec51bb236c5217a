#include "word_cache.hpp"

#include <new>

namespace warploom {

void WordCache::Free::operator()(Bucket* buckets) const { ::operator delete(buckets, std::align_val_t{64}); }

WordCache::WordCache() { resize(kFirstBits); }

void WordCache::resize(int bits) {
    size_t size = size_t{1} << bits;
    void* memory = ::operator new(size * sizeof(Bucket), std::align_val_t{64});
    std::memset(memory, 0, size * sizeof(Bucket));
    std::unique_ptr<Bucket[], Free> old = std::move(buckets_);
    size_t old_size = old ? size_t{1} << bits_ : 0;
    buckets_.reset(static_cast<Bucket*>(memory));
    bits_ = bits;
    shift_ = 64 - bits;
    inserted_ = 0;
    for (size_t i = 0; i < old_size; ++i)
        for (const Entry& entry : old[i].entry)
            if (entry.key.high) insert(entry.key, entry.ids, entry.count());
}

void WordCache::insert(WordKey key, const TokenId* ids, size_t count) {
    if (inserted_ >= size_t{1} << bits_ && bits_ < kLastBits) resize(bits_ + 2 < kLastBits ? bits_ + 2 : kLastBits);
    Bucket& bucket = buckets_[hash_key(key) >> shift_];
    Entry& entry = bucket.entry[bucket.entry[0].key.high != 0];  // who came first stays: frequent words come early
    entry.key = key;
    for (size_t i = 0; i < 4; ++i) entry.ids[i] = i < count ? ids[i] & kIdMask : 0;
    entry.ids[3] |= static_cast<uint32_t>(count) << 29;
    ++inserted_;
}

uint64_t hash_word(const uint8_t* word, size_t length) {
    uint64_t hash = length;
    for (; length > 15; word += 15, length -= 15) hash = hash_key({hash, 0}) ^ hash_key(copy_key(word, 15));
    return hash_key({hash, 1}) ^ hash_key(copy_key(word, length));
}

const TokenId* WordCache::find_long(const uint8_t* word, size_t length, size_t& count) const {
    if (long_words_.empty() || length > kLongest) return nullptr;
    uint64_t hash = hash_word(word, length);
    for (size_t slot = hash % kLongSlots;; slot = (slot + 1) % kLongSlots) {
        const LongWord& known = long_words_[slot];
        if (known.length == 0) return nullptr;
        if (known.hash != hash || known.length != length) continue;
        if (std::memcmp(arena_.data() + known.place, word, length) != 0) continue;
        count = known.count;
        return reinterpret_cast<const TokenId*>(arena_.data() + known.place + (length + 3) / 4 * 4);
    }
}

void WordCache::insert_long(const uint8_t* word, size_t length, const TokenId* ids, size_t count) {
    if (length > kLongest) return;
    if (long_words_.empty() || long_count_ >= kLongLimit || arena_.size() > kArenaLimit) {
        long_words_.assign(kLongSlots, LongWord{});
        long_count_ = 0;
        arena_.clear();
    }
    uint64_t hash = hash_word(word, length);
    size_t slot = hash % kLongSlots;
    while (long_words_[slot].length) slot = (slot + 1) % kLongSlots;
    size_t place = arena_.size(), ids_place = place + (length + 3) / 4 * 4;
    arena_.resize(ids_place + count * sizeof(TokenId));
    std::memcpy(arena_.data() + place, word, length);
    std::memcpy(arena_.data() + ids_place, ids, count * sizeof(TokenId));
    long_words_[slot] = {hash, static_cast<uint32_t>(place), static_cast<uint32_t>(length), static_cast<uint32_t>(count)};
    ++long_count_;
}

}  // namespace warploom
