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
#include <functional>
#include <string>
#include <vector>

#include "parallel.hpp"

namespace warploom {

using Symbol = uint32_t;  // 0..255 are bytes, then each merged token in the order of its first merge
using TokenId = uint32_t;

constexpr uint32_t kNoRank = 0xFFFFFFFF;

// The rank (place among the merges) of a pair of symbols. Eight bytes an entry: 21 bits for each symbol, 22 for the rank.
class PairTable {
public:
    void build(const std::vector<Symbol>& left, const std::vector<Symbol>& right, size_t symbols);

    // Most tokens are never the left half of another one, or never the right half: two bits that stay in the nearest
    // cache save most of the look-ups that would find nothing.
    uint32_t rank(Symbol left, Symbol right) const {
        if (!((lefts_[left >> 6] >> (left & 63)) & (rights_[right >> 6] >> (right & 63)) & 1)) return kNoRank;
        uint64_t key = static_cast<uint64_t>(left) << 21 | right;
        for (uint64_t slot = key * kMultiplier >> shift_;; slot = (slot + 1) & mask_) {
            uint64_t entry = slots_[slot];
            if (entry >> 22 == key) return static_cast<uint32_t>(entry & kRankMask);
            if (entry == kEmpty) return kNoRank;
        }
    }

    uint32_t byte_rank(uint8_t left, uint8_t right) const { return bytes_[left << 8 | right]; }

private:
    static constexpr uint64_t kEmpty = ~0ull, kRankMask = (1u << 22) - 1, kMultiplier = 0x9E3779B97F4A7C15ull;
    std::vector<uint64_t> slots_;
    std::vector<uint32_t> bytes_;  // pairs of single bytes, where most look-ups go
    std::vector<uint64_t> lefts_, rights_;  // a bit a symbol
    uint64_t mask_ = 0;
    int shift_ = 63;
};

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
    const Checkpoint* checkpoint = nullptr;  // called now and then within a very long word
};

class Merges {
public:
    // Token ids of the 256 bytes, and of each merge its two halves and its result.
    Merges(const std::vector<TokenId>& byte_ids, const std::vector<TokenId>& left, const std::vector<TokenId>& right,
           const std::vector<TokenId>& merged);

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

    // Calls visit(bytes, id) for each token that its own bytes become.
    void each_whole(const std::function<void(const std::string&, TokenId)>& visit) const;

    // Writes the ids of a word and returns how many there are (at most `size`).
    size_t encode(const uint8_t* word, size_t size, TokenId* ids, MergeScratch& scratch) const;

private:
    static constexpr size_t kShort = 48, kBlock = 1024, kWidest = 8 * kBlock;

    std::vector<std::string> spell() const;
    size_t encode_short(const uint8_t* word, size_t size, Symbol* symbols) const;
    void encode_block(const uint8_t* word, size_t size, std::vector<Symbol>& symbols, MergeScratch& scratch) const;
    bool join(const uint8_t* border, MergeScratch& scratch) const;
    bool stay(Symbol left, Symbol right, const uint8_t* border, MergeScratch& scratch) const;
    void offer(MergeScratch& s, uint32_t position, uint32_t rank) const;
    void take_bucket(MergeScratch& s, uint32_t rank) const;

    // In a vocabulary that BPE learned the merge of rank r makes symbol 256 + r, and mostly symbol s has id s: then
    // nothing need be loaded, and encoding a new word is mostly waiting for loads.
    Symbol result(uint32_t rank) const { return plain_results_ ? 256 + rank : result_[rank]; }
    TokenId id(Symbol symbol) const { return plain_ids_ && symbol >= 256 ? symbol : ids_[symbol]; }

    PairTable pairs_;
    std::vector<Symbol> left_, right_, result_;  // of each merge
    std::vector<TokenId> ids_;                   // of each symbol
    std::vector<uint32_t> lengths_;              // of each symbol, in bytes
    uint64_t joints_[1 << 10] = {};
    bool plain_results_ = true, plain_ids_ = true;
    bool ordered_ = true;                        // each token has one merge, learned after those of its halves
};

}  // namespace warploom
