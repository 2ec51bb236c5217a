// Merging: the bytes of one word become token ids.
//
// The rule: of all neighboring pairs that are a learned merge, apply the earliest learned one, leftmost first; repeat.
// A word has few bytes, so for short ones a linear scan for the best pair beats any cleverness. A run without spaces can
// have a million, and there the scan would be quadratic: long words use a queue with one bucket per merge. A merge makes
// pairs whose merges were learned later, so buckets fill ahead of the one being emptied, and each position is visited
// about once: linear time, whatever the text.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "tokenizer/pair_table.hpp"
#include "tokenizer/interruptible_threads.hpp"
#include "tokenizer/word_key.hpp"

namespace warploom {

using TokenId = uint32_t;

constexpr TokenId kNoToken = 0xFFFFFFFF;

// Memory that `Merges::encode` works in, kept between words.
struct MergeScratch {
    struct Waiting {
        uint32_t position, next;
    };
    std::vector<Symbol> symbols;
    std::vector<uint32_t> after, before;
    std::vector<Waiting> waiting;                // entries of all buckets
    std::vector<uint32_t> first, last, ranks;    // of each bucket; `ranks` is a heap of the buckets that are not empty
    std::vector<uint32_t> positions;
    std::vector<Symbol> block, joined, window, pair;
    std::vector<uint8_t> kept;  // of a word that holds bytes which are dropped
    const Checkpoint* checkpoint = nullptr;  // called now and then within a very long word
};

// New words that wait until there are enough of them to be merged side by side.
struct NewWords {
    static constexpr size_t kMost = 16;
    size_t count = 0;
    WordKey keys[kMost] = {};     // zero beyond `count`
    size_t places[kMost];         // where their ids go
    uint32_t sizes[kMost];        // the outcome: how many symbols each has become,
    Symbol symbols[kKeyBytes][kMost];  // and its first ones, its second ones, …
};

class Merges {
public:
    // Token ids of the 256 bytes, kNoToken for those that have none and are dropped from words before merging, and of
    // each merge its two halves and its result. Merges of tokens that never come about are passed over.
    // Tokens from `first_fragment` on are beginnings of characters, which only merges know: they become ids of bytes.
    Merges(const std::vector<TokenId>& byte_ids, const std::vector<TokenId>& left, const std::vector<TokenId>& right,
           const std::vector<TokenId>& merged, TokenId first_fragment = kNoToken);

    // Where a word falls apart: no merge ever joins two tokens between bytes at i and i + 1, so what stands before and
    // what stands after can be encoded, and remembered, on their own. The characters of most scripts fall apart in a
    // vocabulary that learned little of them. Bit i for each of up to 64 bytes, but for the last.
    uint64_t gaps(const uint8_t* word, size_t size) const {
        uint64_t gaps = 0;
        for (size_t i = 0; i + 1 < size; ++i) {
            unsigned pair = word[i] | word[i + 1] << 8;
            gaps |= (~joints_[pair >> 6] >> (pair & 63) & 1) << i;
        }
        return gaps;
    }

    // A bit for each pair of bytes, the first of them the lower eight bits of its place, at which a merge joins two tokens.
    const uint64_t* joints() const { return joints_; }

    // The length of the first part of a word that falls apart, of the whole word if it does not.
    size_t first_part(const uint8_t* word, size_t size) const {
        for (size_t at = 0; at + 1 < size; at += 63)
            if (uint64_t gaps = this->gaps(word + at, size - at < 64 ? size - at : 64))
                return at + static_cast<size_t>(__builtin_ctzll(gaps)) + 1;
        return size;
    }

    // Whether a word holds bytes that are dropped.
    bool lacks(const uint8_t* word, size_t size) const {
        for (size_t i = 0; lacking_ && i < size; ++i)
            if (ids_[word[i]] == kNoToken) return true;
        return false;
    }

    // Writes the ids of a word and returns how many there are (at most `size`).
    size_t encode(const uint8_t* word, size_t size, TokenId* ids, MergeScratch& scratch) const;

    // Merges words one after another.
    void encode_each(NewWords& words) const;

    // In a vocabulary that BPE learned the merge of rank r makes symbol 256 + r, and mostly symbol s has id s: then
    // nothing need be loaded, and encoding a new word is mostly waiting for loads.
    TokenId id(Symbol symbol) const { return plain_ids_ && symbol >= 256 ? symbol : ids_[symbol]; }

    // Writes the id of a symbol, or several where it is a fragment; returns what comes behind.
    template <class Id>
    Id* put(Symbol symbol, Id* out) const {
        if (fragments_.empty() || symbol >= fragments_.size() || fragments_[symbol].empty()) {
            *out = static_cast<Id>(id(symbol));
            return out + 1;
        }
        for (char byte : fragments_[symbol]) *out++ = static_cast<Id>(ids_[static_cast<uint8_t>(byte)]);
        return out;
    }

    // What merging side by side looks up: ranks, and the symbols that merges make, nullptr if they are 256 + rank.
    const PairTable& pairs() const { return pairs_; }
    const Symbol* results() const { return plain_results_ ? nullptr : result_.data(); }

private:
    static constexpr size_t kShort = 48, kBlock = 1024, kWidest = 8 * kBlock;

    std::vector<bool> reachable(const std::vector<TokenId>& byte_ids, const std::vector<TokenId>& left,
                                const std::vector<TokenId>& right, const std::vector<TokenId>& merged) const;
    std::vector<std::string> spell() const;
    size_t encode_whole(const uint8_t* word, size_t size, TokenId* ids, MergeScratch& scratch) const;
    size_t encode_short(const uint8_t* word, size_t size, Symbol* symbols) const;
    void encode_block(const uint8_t* word, size_t size, std::vector<Symbol>& symbols, MergeScratch& scratch) const;
    bool join(const uint8_t* border, MergeScratch& scratch) const;
    bool stay(Symbol left, Symbol right, const uint8_t* border, MergeScratch& scratch) const;
    void offer(MergeScratch& s, uint32_t position, uint32_t rank) const;
    void take_bucket(MergeScratch& s, uint32_t rank) const;

    Symbol result(uint32_t rank) const { return plain_results_ ? 256 + rank : result_[rank]; }

    PairTable pairs_;
    std::vector<Symbol> left_, right_, result_;  // of each merge
    std::vector<TokenId> ids_;                   // of each symbol
    std::vector<uint32_t> lengths_;              // of each symbol, in bytes
    std::vector<std::string> fragments_;         // the bytes of each symbol that is one, up to the last of them
    uint64_t joints_[1 << 10] = {};
    bool plain_results_ = true, plain_ids_ = true, lacking_ = false;
    bool ordered_ = true;                        // each token has one merge, learned after those of its halves
};

}  // namespace warploom
