// BPE encoder: text to token ids. Pretokenizes, looks each piece up in a word cache, merges what is new.
//
// Words are looked up 128 at a time (look_up.hpp), so that what waits for memory waits together. A word that is new is
// first cut where no token reaches across, then merged, then remembered. Merging waits for memory too: new words leave
// room for their ids and are merged when there are sixteen.
//
// A long text is cut into segments at places where every pattern cuts (`safe_cut`), and threads take segments; many
// short texts are grouped into segments.
#pragma once

#include <cstdlib>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "tokenizer/interruptible_threads.hpp"
#include "tokenizer/segments.hpp"
#include "tokenizer/splitter.hpp"
#include "tokenizer/vocabulary.hpp"
#include "tokenizer/word_cache.hpp"

namespace warploom {

// Memory for ids that grows by reallocation and can be handed over to NumPy.
template <class Id>
class IdBuffer {
public:
    IdBuffer() = default;
    IdBuffer(IdBuffer&& other) noexcept { *this = std::move(other); }
    IdBuffer& operator=(IdBuffer&& other) noexcept {
        std::swap(data_, other.data_);
        std::swap(size, other.size);
        std::swap(capacity_, other.capacity_);
        return *this;
    }
    ~IdBuffer() { std::free(data_); }

    // Room for `count` more ids; returns where they go.
    Id* reserve(size_t count) {
        if (size + count > capacity_) resize(size + count + capacity_ / 2);
        return data_ + size;
    }
    void push(Id id) { *reserve(1) = id, ++size; }
    Id* data() { return data_; }
    Id* release() {
        if (size < capacity_ / 8 * 7) resize(size ? size : 1);
        capacity_ = size = 0;
        return std::exchange(data_, nullptr);
    }

    size_t size = 0;

private:
    void resize(size_t capacity) {
        void* data = std::realloc(data_, capacity * sizeof(Id));
        if (!data) throw std::bad_alloc();
        data_ = static_cast<Id*>(data);
        capacity_ = capacity;
    }
    Id* data_ = nullptr;
    size_t capacity_ = 0;
};

extern template class IdBuffer<uint16_t>;
extern template class IdBuffer<uint32_t>;

// View of one text or many.
struct Texts {
    const TextView* first;
    size_t count;

    Texts(const TextView& one) : first(&one), count(1) {}
    Texts(const std::vector<TextView>& many) : first(many.data()), count(many.size()) {}
    const TextView* begin() const { return first; }
    const TextView* end() const { return first + count; }
};

// Thrown for a text with a lone surrogate.
struct NoUtf8 : std::exception {};

// How SentencePiece treats spaces: ▁ in text is one (`marks`), and a stretch of text may get one in front.
struct Metaspace {
    enum Prefix : uint8_t { kNever, kFirst, kAlways };  // `kFirst`: only where the text begins, not behind added tokens
    bool marks = false;
    Prefix prefix = kNever;
    bool if_missing = false;  // not where there is a space already
};

template <class Id>
class Encoder {
public:
    // whole_words: pieces that are looked up before merging (empty for most vocabularies).
    Encoder(Merges merges, Pattern pattern, const std::vector<std::pair<std::string, TokenId>>& whole_words,
            Metaspace metaspace = {});

    // Ids of many texts, one after another, and the number of ids up to each text's end.
    void encode(Texts texts, const Specials* specials, Follows follows, unsigned threads, IdBuffer<Id>& ids,
                std::vector<uint64_t>* ends, const Checkpoint& checkpoint) const;

    // Ids of a text whose pieces were found elsewhere: `ends` holds the end of each.
    void encode_pieces(TextView text, const uint64_t* ends, size_t count, IdBuffer<Id>& ids) const;

    // What look_up.hpp asks for: ids of a word that is not at home in the cache, where the text goes on to `end` and ids
    // begin at `ids`; and the merges, if words may be cut where no token reaches across.
    Id* encode_aside(const uint8_t* word, size_t length, const uint8_t* end, WordCache<Id>& cache, Id* ids, Id* out) const;
    const Merges* divides() const { return divides_ ? &merges_ : nullptr; }

private:
    using Cache = WordCache<Id>;

    void encode_segment(const Segment& segment, Cache& cache, IdBuffer<Id>& ids) const;
    void encode_text(const Segment& segment, Cache& cache, IdBuffer<Id>& ids) const;
    void encode_marked(const Segment& segment, Cache& cache, IdBuffer<Id>& ids) const;
    bool is_spaced(const Segment& segment) const;
    void encode_wide(const Segment& segment, Cache& cache, IdBuffer<Id>& ids) const;
    Id* encode_new(const uint8_t* word, size_t length, Cache& cache, Id* out) const;
    Id* encode_waiting(Cache& cache, Id* ids, Id* out) const;
    void settle(Cache& cache, IdBuffer<Id>& ids) const;

    Merges merges_;
    Pattern pattern_;
    Metaspace metaspace_;
    bool divides_;            // whether words may be cut where no token reaches across
    Vocabulary whole_words_;  // pieces that are looked up before merging
    mutable CachePool<Cache> caches_;
};

// The look-up loop of the chosen instruction set.
template <class Id>
using LookUp = void (*)(const Encoder<Id>&, const uint8_t* text, size_t readable, const uint32_t* ends, size_t count,
                        WordCache<Id>&, IdBuffer<Id>&);
template <class Id>
LookUp<Id> look_up_function();

}  // namespace warploom
