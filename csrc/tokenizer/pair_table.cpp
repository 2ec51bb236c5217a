#include "tokenizer/pair_table.hpp"

#include <algorithm>

namespace warploom {

void PairTable::build(const std::vector<Symbol>& left, const std::vector<Symbol>& right, size_t symbols) {
    lefts_.assign(symbols / 64 + 1, 0);
    rights_.assign(symbols / 64 + 1, 0);
    for (Symbol symbol : left) lefts_[symbol >> 6] |= 1ull << (symbol & 63);
    for (Symbol symbol : right) rights_[symbol >> 6] |= 1ull << (symbol & 63);
    bytes_.assign(1 << 16, kNoRank);
    for (uint32_t rank = static_cast<uint32_t>(left.size()); rank-- > 0;)  // the first of equal merges counts
        if (left[rank] < 256 && right[rank] < 256) bytes_[left[rank] << 8 | right[rank]] = rank;

    unsigned bits = 6;
    while (size_t{4} << bits < left.size() * 5) ++bits;
    for (int tries = 1;; ++tries) {  // one in three succeeds
        slots_.assign(size_t{1} << bits, kEmpty);
        displacements_.assign(size_t{1} << (bits - 2), 0);
        mask_ = (1u << bits) - 1;
        shift_ = 32 - (bits - 2);
        right_ = (right_ * 0x2C9277B5u + 0x85EBCA76u) | 1;
        if (displace(left, right)) return;
        if (tries % 32 == 0) ++bits;
    }
}

// Finds a displacement for each bucket, large ones first; false if two pairs of a bucket would stay together under any.
bool PairTable::displace(const std::vector<Symbol>& left, const std::vector<Symbol>& right) {
    const uint32_t count = static_cast<uint32_t>(left.size());
    auto hash = [&](uint32_t rank) { return left[rank] * kLeft + right[rank] * right_; };
    std::vector<uint32_t> begins(displacements_.size() + 2), ranks(count);
    for (uint32_t rank = 0; rank < count; ++rank) ++begins[(hash(rank) >> shift_) + 2];
    for (size_t i = 2; i < begins.size(); ++i) begins[i] += begins[i - 1];
    for (uint32_t rank = 0; rank < count; ++rank) ranks[begins[(hash(rank) >> shift_) + 1]++] = rank;

    std::vector<uint32_t> order(displacements_.size());
    for (uint32_t i = 0; i < order.size(); ++i) order[i] = i;
    std::stable_sort(order.begin(), order.end(),
                     [&](uint32_t a, uint32_t b) { return begins[a + 1] - begins[a] > begins[b + 1] - begins[b]; });

    std::vector<std::pair<uint32_t, uint64_t>> members;  // place and contents
    for (uint32_t bucket : order) {
        members.clear();
        for (uint32_t i = begins[bucket]; i < begins[bucket + 1]; ++i) {
            Symbol l = left[ranks[i]], r = right[ranks[i]];
            std::pair<uint32_t, uint64_t> added = {place(hash(ranks[i]), l), key(l, r) << 22 | ranks[i]};
            auto same = std::find_if(members.begin(), members.end(), [&](auto& m) { return m.first == added.first; });
            if (same == members.end()) members.push_back(added);
            else if (same->second >> 22 != added.second >> 22) return false;  // else the first of equal merges counts
        }
        uint32_t& displacement = displacements_[bucket];
        auto fits = [&](auto& m) { return slots_[m.first ^ displacement] == kEmpty; };
        while (!std::all_of(members.begin(), members.end(), fits))
            if (++displacement > mask_) return false;
        for (auto& [place, slot] : members) slots_[place ^ displacement] = slot;
    }
    return true;
}

}  // namespace warploom
