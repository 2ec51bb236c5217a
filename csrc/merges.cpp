#include "merges.hpp"

#include <algorithm>
#include <functional>
#include <stdexcept>

namespace warploom {

void PairTable::build(const std::vector<Symbol>& left, const std::vector<Symbol>& right, size_t symbols) {
    lefts_.assign(symbols / 64 + 1, 0);
    rights_.assign(symbols / 64 + 1, 0);
    for (Symbol symbol : left) lefts_[symbol >> 6] |= 1ull << (symbol & 63);
    for (Symbol symbol : right) rights_[symbol >> 6] |= 1ull << (symbol & 63);
    size_t size = 64;
    shift_ = 58;
    while (size < left.size() * 2) size *= 2, --shift_;
    mask_ = size - 1;
    slots_.assign(size, kEmpty);
    bytes_.assign(1 << 16, kNoRank);
    for (uint32_t rank = 0; rank < left.size(); ++rank) {
        if (this->rank(left[rank], right[rank]) != kNoRank) continue;  // the first of equal merges counts
        uint64_t key = static_cast<uint64_t>(left[rank]) << 21 | right[rank];
        uint64_t slot = key * kMultiplier >> shift_;
        while (slots_[slot] != kEmpty) slot = (slot + 1) & mask_;
        slots_[slot] = key << 22 | rank;
        if (left[rank] < 256 && right[rank] < 256) bytes_[left[rank] << 8 | right[rank]] = rank;
    }
}

Merges::Merges(const std::vector<TokenId>& byte_ids, const std::vector<TokenId>& left,
               const std::vector<TokenId>& right, const std::vector<TokenId>& merged) {
    TokenId greatest = *std::max_element(byte_ids.begin(), byte_ids.end());
    for (const auto* ids : {&left, &right, &merged})
        for (TokenId id : *ids) greatest = std::max(greatest, id);
    constexpr Symbol kNone = ~0u;
    std::vector<Symbol> symbol_of(static_cast<size_t>(greatest) + 1, kNone);
    for (TokenId id : byte_ids) {
        symbol_of[id] = static_cast<Symbol>(ids_.size());
        ids_.push_back(id);
    }
    for (TokenId id : merged) {
        if (symbol_of[id] != kNone) {
            ordered_ = false;
            continue;
        }
        symbol_of[id] = static_cast<Symbol>(ids_.size());
        ids_.push_back(id);
    }
    if (ids_.size() >= 1u << 21) throw std::invalid_argument("merges make more than 2097152 tokens, which is the most");
    for (size_t i = 0; i < merged.size(); ++i) {
        if (symbol_of[left[i]] == kNone || symbol_of[right[i]] == kNone)
            throw std::invalid_argument("merges uses a token that is neither a byte nor the result of a merge");
        left_.push_back(symbol_of[left[i]]);
        right_.push_back(symbol_of[right[i]]);
        result_.push_back(symbol_of[merged[i]]);
        ordered_ = ordered_ && left_[i] < result_[i] && right_[i] < result_[i];
    }
    for (uint32_t rank = 0; rank < result_.size(); ++rank) plain_results_ = plain_results_ && result_[rank] == 256 + rank;
    for (Symbol symbol = 256; symbol < ids_.size(); ++symbol) plain_ids_ = plain_ids_ && ids_[symbol] == symbol;
    pairs_.build(left_, right_, ids_.size());
}

size_t Merges::encode(const uint8_t* word, size_t size, TokenId* ids, MergeScratch& scratch) const {
    return size <= kShort ? encode_short(word, size, ids) : encode_long(word, size, ids, scratch);
}

size_t Merges::encode_short(const uint8_t* word, size_t size, TokenId* ids) const {
    Symbol symbols[kShort];
    uint32_t ranks[kShort];  // of the pair that begins at each symbol; kNoRank where there is none
    uint64_t alive = size == 64 ? ~0ull : (1ull << size) - 1;  // where a symbol begins
    for (size_t i = 0; i < size; ++i) symbols[i] = word[i];
    for (size_t i = 0; i + 1 < size; ++i) ranks[i] = pairs_.byte_rank(word[i], word[i + 1]);
    ranks[size - 1] = kNoRank;
    while (true) {
        uint32_t rank = ranks[0];
        size_t best = 0;
        for (size_t i = 1; i < size; ++i) {  // nothing moves when symbols merge, so this loop has the same length each time
            bool better = ranks[i] < rank;
            rank = better ? ranks[i] : rank;
            best = better ? i : best;
        }
        if (rank == kNoRank) break;
        uint64_t behind = alive & (~1ull << best);  // not empty: the right half is there
        size_t right = static_cast<size_t>(__builtin_ctzll(behind));
        behind &= behind - 1;
        alive &= ~(1ull << right);
        symbols[best] = result(rank);
        ranks[right] = kNoRank;
        ranks[best] = behind ? pairs_.rank(symbols[best], symbols[__builtin_ctzll(behind)]) : kNoRank;
        if (uint64_t before = alive & ((1ull << best) - 1)) {
            size_t left = 63 - static_cast<size_t>(__builtin_clzll(before));
            ranks[left] = pairs_.rank(symbols[left], symbols[best]);
        }
    }
    size_t count = 0;
    for (; alive; alive &= alive - 1) ids[count++] = id(symbols[__builtin_ctzll(alive)]);
    return count;
}

namespace {
constexpr uint32_t kEnd = 0xFFFFFFFF;
constexpr Symbol kGone = 0xFFFFFFFF;
}  // namespace

void Merges::offer(MergeScratch& s, uint32_t position, uint32_t rank) const {
    uint32_t entry = static_cast<uint32_t>(s.waiting.size());
    s.waiting.push_back({position, kEnd});
    if (s.first[rank] != kEnd) {
        s.waiting[s.last[rank]].next = entry;
    } else {
        s.first[rank] = entry;
        s.ranks.push_back(rank);
        std::push_heap(s.ranks.begin(), s.ranks.end(), std::greater<>());
    }
    s.last[rank] = entry;
}

// Empties a bucket into `positions`, leftmost first. Positions come in that order by themselves in a vocabulary
// that BPE learned, where each token is made by one merge and only after its halves.
void Merges::take_bucket(MergeScratch& s, uint32_t rank) const {
    s.positions.clear();
    for (uint32_t entry = s.first[rank]; entry != kEnd; entry = s.waiting[entry].next)
        s.positions.push_back(s.waiting[entry].position);
    s.first[rank] = kEnd;
    if (!ordered_) std::sort(s.positions.begin(), s.positions.end());
}

size_t Merges::encode_long(const uint8_t* word, size_t size, TokenId* ids, MergeScratch& s) const {
    if (size >= kEnd) throw std::invalid_argument("a piece of text without a break has 4 GiB or more");
    uint32_t length = static_cast<uint32_t>(size);
    s.symbols.assign(word, word + size);
    s.after.resize(size);
    s.before.resize(size);
    s.waiting.clear();
    s.ranks.clear();
    s.first.resize(result_.size(), kEnd);  // buckets are left empty by the previous word
    s.last.resize(result_.size());
    for (uint32_t i = 0; i < length; ++i) s.after[i] = i + 1, s.before[i] = i - 1;
    for (uint32_t i = 0; i + 1 < length; ++i) {
        uint32_t rank = pairs_.byte_rank(word[i], word[i + 1]);
        if (rank != kNoRank) offer(s, i, rank);
    }
    while (!s.ranks.empty()) {
        uint32_t rank = s.ranks.front();
        std::pop_heap(s.ranks.begin(), s.ranks.end(), std::greater<>());
        s.ranks.pop_back();
        take_bucket(s, rank);
        Symbol left = left_[rank], right = right_[rank], result = this->result(rank);
        for (size_t k = 0; k < s.positions.size(); ++k) {
            if (k % (1 << 18) == (1 << 18) - 1 && s.checkpoint) (*s.checkpoint)();
            uint32_t i = s.positions[k], j = s.after[i];
            if (s.symbols[i] != left || j >= length || s.symbols[j] != right) continue;
            s.symbols[i] = result;
            s.symbols[j] = kGone;
            uint32_t next = s.after[i] = s.after[j];
            if (i > 0) {
                uint32_t before = s.before[i], found = pairs_.rank(s.symbols[before], result);
                if (found != kNoRank) offer(s, before, found);
            }
            if (next < length) {
                s.before[next] = i;
                uint32_t found = pairs_.rank(result, s.symbols[next]);
                if (found != kNoRank) offer(s, i, found);
            }
            // A merge learned earlier has become possible (never in a vocabulary that BPE learned): it goes first.
            if (!s.ranks.empty() && s.ranks.front() < rank) {
                for (++k; k < s.positions.size(); ++k) offer(s, s.positions[k], rank);
            }
        }
    }
    size_t count = 0;
    for (uint32_t i = 0; i < length; i = s.after[i]) ids[count++] = id(s.symbols[i]);
    return count;
}

}  // namespace warploom
