#include "tokenizer/word_counter.hpp"

#include <algorithm>
#include <stdexcept>

namespace warploom {

namespace {
constexpr size_t kPiecesAtOnce = 1024, kGroup = 32, kSegment = 1 << 20;
}

WordCounts::WordCounts() : short_(1 << 12), long_(1 << 8), shift_(64 - 12) {}

uint64_t WordCounts::bytes() const {
    uint64_t total = 0;
    each([&](const uint8_t*, size_t length, uint64_t) { total += length; });
    return total;
}

void WordCounts::add(const uint8_t* text, size_t readable, const uint32_t* ends, size_t count) {
    WordKey keys[kGroup];
    uint64_t hashes[kGroup];
    uint32_t begin = 0;
    for (size_t first = 0; first < count; first += kGroup) {
        const uint32_t* group = ends + first;
        size_t n = std::min(kGroup, count - first);
        bool roomy = group[n - 1] + size_t{16} <= readable;
        uint32_t start = begin;
        for (size_t i = 0; i < n; ++i) {
            size_t length = group[i] - start, known = length <= kKeyBytes ? length : 0;
            keys[i] = roomy ? load_key(text + start, known) : copy_key(text + start, known);
            hashes[i] = hash_key(keys[i]);
            __builtin_prefetch(&short_[hashes[i] >> shift_]);
            start = group[i];
        }
        for (size_t i = 0; i < n; ++i) {
            size_t length = group[i] - begin;
            if (length <= kKeyBytes) add_short(keys[i], hashes[i], 1);
            else add_long(text + begin, length, 1);
            begin = group[i];
        }
    }
}

void WordCounts::add(const uint8_t* word, size_t length, uint64_t count) {
    if (length > kKeyBytes) return add_long(word, length, count);
    WordKey key = copy_key(word, length);
    add_short(key, hash_key(key), count);
}

void WordCounts::add(const WordCounts& other) {
    other.each([this](const uint8_t* word, size_t length, uint64_t count) { add(word, length, count); });
}

inline void WordCounts::add_short(WordKey key, uint64_t hash, uint64_t count) {
    size_t mask = short_.size() - 1;
    for (size_t slot = hash >> shift_;; slot = (slot + 1) & mask) {
        Short& word = short_[slot];
        if (word.key == key) {
            word.count += count;
            return;
        }
        if (word.count) continue;
        word = {key, count};
        if (++short_count_ * 2 > short_.size()) grow_short();
        return;
    }
}

void WordCounts::grow_short() {
    std::vector<Short> old(short_.size() * 2);
    old.swap(short_);
    --shift_;
    size_t mask = short_.size() - 1;
    for (const Short& word : old) {
        if (!word.count) continue;
        size_t slot = hash_key(word.key) >> shift_;
        while (short_[slot].count) slot = (slot + 1) & mask;
        short_[slot] = word;
    }
}

void WordCounts::add_long(const uint8_t* word, size_t length, uint64_t count) {
    if (length >= 0xFFFFFFFF) throw std::length_error("a piece of text without a break has 4 GiB or more");
    uint64_t hash = hash_word(word, length);
    size_t mask = long_.size() - 1;
    for (size_t slot = hash & mask;; slot = (slot + 1) & mask) {
        Long& known = long_[slot];
        if (!known.count) {
            known = {hash, arena_.size(), count, static_cast<uint32_t>(length)};
            arena_.insert(arena_.end(), word, word + length);
            if (++long_count_ * 2 > long_.size()) grow_long();
            return;
        }
        if (known.hash == hash && known.length == length && std::memcmp(arena_.data() + known.place, word, length) == 0) {
            known.count += count;
            return;
        }
    }
}

void WordCounts::grow_long() {
    std::vector<Long> old(long_.size() * 2);
    old.swap(long_);
    size_t mask = long_.size() - 1;
    for (const Long& word : old) {
        if (!word.count) continue;
        size_t slot = word.hash & mask;
        while (long_[slot].count) slot = (slot + 1) & mask;
        long_[slot] = word;
    }
}

void WordCounter::add(TextView text, const Specials* specials, const Checkpoint& checkpoint) {
    std::vector<Segment> segments;
    size_t segment_size = std::min(kSegment, text.size / tables_.size() / 4 + 4096);
    cut_segments(text, specials, pattern_, Follows::kStart, segment_size, segments);

    std::atomic<size_t> next{0}, table{0};
    in_parallel(static_cast<unsigned>(std::min(tables_.size(), segments.size())), checkpoint, [&](const Checkpoint& pause) {
        WordCounts& counts = tables_[table++];
        std::vector<uint32_t> ends(kPiecesAtOnce + kSplitMargin);
        for (size_t i; (i = next++) < segments.size(); pause()) {
            const Segment& segment = segments[i];
            Split split{segment.text, segment.begin, segment.limit, segment.size};
            while (true) {
                const uint8_t* from = segment.text + split.position;
                size_t readable = segment.size - split.position;
                size_t count = split_next(pattern_, split, ends.data(), kPiecesAtOnce);
                if (count == 0) break;
                counts.add(from, readable, ends.data(), count);
            }
        }
    });
}

WordCounts WordCounter::take() {
    WordCounts all = std::exchange(tables_[0], WordCounts());
    for (size_t i = 1; i < tables_.size(); ++i) all.add(std::exchange(tables_[i], WordCounts()));
    return all;
}

}  // namespace warploom
