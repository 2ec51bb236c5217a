// The word counter: all that training needs to know about a corpus is how often each distinct piece occurs, and there
// are far fewer distinct pieces than pieces. So a corpus of any size streams through in bounded memory.
//
// Pieces of up to 15 bytes are their own 16-byte keys, as in the word cache; longer ones keep their bytes in an arena.
// Each thread counts into a table of its own, and the tables are added up at the end.
#pragma once

#include "tokenizer/encoder.hpp"

namespace warploom {

class WordCounts {
public:
    WordCounts();

    // Counts consecutive pieces; `readable` bytes of text may be loaded.
    void add(const uint8_t* text, size_t readable, const uint32_t* ends, size_t count);
    void add(const uint8_t* word, size_t length, uint64_t count);
    void add(const WordCounts& other);

    size_t size() const { return short_count_ + long_count_; }
    uint64_t bytes() const;

    // Calls visit(bytes, length, count) for each distinct piece.
    template <class Visit>
    void each(Visit visit) const {
        for (const Short& word : short_)
            if (word.count) visit(reinterpret_cast<const uint8_t*>(&word.key), static_cast<size_t>(word.key.high >> 56), word.count);
        for (const Long& word : long_)
            if (word.count) visit(arena_.data() + word.place, static_cast<size_t>(word.length), word.count);
    }

private:
    struct Short {
        WordKey key;
        uint64_t count;
    };
    struct Long {
        uint64_t hash, place, count;
        uint32_t length;
    };
    void add_short(WordKey key, uint64_t hash, uint64_t count);
    void add_long(const uint8_t* word, size_t length, uint64_t count);
    void grow_short();
    void grow_long();

    std::vector<Short> short_;
    std::vector<Long> long_;
    std::vector<uint8_t> arena_;
    size_t short_count_ = 0, long_count_ = 0;
    int shift_;
};

// Counts the pieces of texts, with threads.
class WordCounter {
public:
    WordCounter(Pattern pattern, unsigned threads) : pattern_(pattern), tables_(threads) {}

    // Counts a whole text, or a stretch of one that was cut at a safe place. Special tokens separate and are not counted.
    void add(TextView text, const Specials* specials, const Checkpoint& checkpoint);
    void add_word(const uint8_t* word, size_t length, uint64_t count) { tables_[0].add(word, length, count); }

    // All counts, added up and handed over: the counter starts anew.
    WordCounts take();

private:
    Pattern pattern_;
    std::vector<WordCounts> tables_;
};

}  // namespace warploom
