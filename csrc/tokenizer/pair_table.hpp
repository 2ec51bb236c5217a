// Perfect-hash table from pairs of symbols to merge ranks, the look-up at every merging step.
//
// A table in which no look-up has to search on, so that sixteen can be made at once (merge_x16.hpp): pairs fall
// into small buckets, and each bucket has a displacement, found when the table is built, under which all its pairs land
// in free slots of their own. A look-up loads the displacement of a bucket, then one slot, which holds the pair or does
// not. Eight bytes a slot: 21 bits for each symbol, 22 for the rank.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace warploom {

using Symbol = uint32_t;  // 0..255 are bytes, then each merged token in the order of its first merge

constexpr uint32_t kNoRank = 0xFFFFFFFF;

class PairTable {
public:
    static constexpr Symbol kNoSymbol = (1u << 21) - 1;  // in no pair
    static constexpr uint32_t kLeft = 0x9E3779B1u;       // what the left half is multiplied with

    void build(const std::vector<Symbol>& left, const std::vector<Symbol>& right, size_t symbols);

    // Most tokens are never the left half of another one, or never the right half: two bits that stay in the nearest
    // cache save most of the look-ups that would find nothing.
    uint32_t rank(Symbol left, Symbol right) const {
        if (!((lefts_[left >> 6] >> (left & 63)) & (rights_[right >> 6] >> (right & 63)) & 1)) return kNoRank;
        uint32_t hash = left * kLeft + right * right_;
        uint64_t slot = slots_[place(hash, left) ^ displacements_[hash >> shift_]];
        return slot >> 22 == key(left, right) ? static_cast<uint32_t>(slot & kRankMask) : kNoRank;
    }
    uint32_t byte_rank(uint8_t left, uint8_t right) const { return bytes_[left << 8 | right]; }

    // What a look-up in lanes needs: the same steps as `rank`.
    const uint64_t* slots() const { return slots_.data(); }
    const uint32_t* displacements() const { return displacements_.data(); }
    const uint32_t* bytes() const { return bytes_.data(); }
    uint32_t right() const { return right_; }
    unsigned shift() const { return shift_; }
    uint32_t mask() const { return mask_; }

private:
    static constexpr uint64_t kEmpty = ~0ull, kRankMask = (1u << 22) - 1;

    static uint64_t key(Symbol left, Symbol right) { return static_cast<uint64_t>(left) << 21 | right; }
    uint32_t place(uint32_t hash, Symbol left) const { return (hash + (left << 9)) & mask_; }
    bool displace(const std::vector<Symbol>& left, const std::vector<Symbol>& right);

    std::vector<uint64_t> slots_;
    std::vector<uint32_t> displacements_;   // of each bucket
    std::vector<uint32_t> bytes_;           // ranks of pairs of single bytes, where most look-ups go
    std::vector<uint64_t> lefts_, rights_;  // a bit a symbol
    uint32_t right_ = 1, mask_ = 0;
    unsigned shift_ = 0;
};

}  // namespace warploom
