#include "tokenizer/merges.hpp"

#include <algorithm>
#include <functional>
#include <stdexcept>

namespace warploom {

Merges::Merges(const std::vector<TokenId>& byte_ids, const std::vector<TokenId>& left,
               const std::vector<TokenId>& right, const std::vector<TokenId>& merged, TokenId first_fragment) {
    std::vector<bool> known = reachable(byte_ids, left, right, merged);
    constexpr Symbol kNone = ~0u;
    std::vector<Symbol> symbol_of(known.size(), kNone);
    for (TokenId id : byte_ids) {
        if (id == kNoToken) lacking_ = true;
        else symbol_of[id] = static_cast<Symbol>(ids_.size());
        ids_.push_back(id);
    }
    for (size_t i = 0; i < merged.size(); ++i) {
        if (!known[left[i]] || !known[right[i]]) continue;
        if (symbol_of[merged[i]] != kNone) {
            ordered_ = false;
            continue;
        }
        symbol_of[merged[i]] = static_cast<Symbol>(ids_.size());
        ids_.push_back(merged[i]);
    }
    if (ids_.size() >= 1u << 21) throw std::invalid_argument("merges make more than 2097152 tokens, which is the most");
    if (merged.size() >= 1u << 22) throw std::invalid_argument("merges are more than 4194304, which is the most");
    for (size_t i = 0; i < merged.size(); ++i) {
        if (!known[left[i]] || !known[right[i]]) continue;
        left_.push_back(symbol_of[left[i]]);
        right_.push_back(symbol_of[right[i]]);
        result_.push_back(symbol_of[merged[i]]);
        ordered_ = ordered_ && left_.back() < result_.back() && right_.back() < result_.back();
    }
    for (uint32_t rank = 0; rank < result_.size(); ++rank) plain_results_ = plain_results_ && result_[rank] == 256 + rank;
    for (Symbol symbol = 256; symbol < ids_.size(); ++symbol) plain_ids_ = plain_ids_ && ids_[symbol] == symbol;
    std::vector<std::string> bytes = spell();
    for (Symbol symbol = 256; symbol < ids_.size(); ++symbol) {
        if (ids_[symbol] < first_fragment) continue;
        fragments_.resize(symbol + 1);
        fragments_[symbol] = bytes[symbol];
    }
    for (const std::string& token : bytes) lengths_.push_back(static_cast<uint32_t>(token.size()));
    for (size_t i = 0; i < result_.size(); ++i) {
        const std::string &before = bytes[left_[i]], &after = bytes[right_[i]];
        if (before.empty() || after.empty()) continue;  // never comes about
        uint8_t a = static_cast<uint8_t>(before.back()), b = static_cast<uint8_t>(after.front());
        joints_[(a | b << 8) >> 6] |= 1ull << (a & 63);
    }
    for (unsigned i = 0; i < 256 * 256; ++i)  // what stands before and behind a byte that is dropped may merge
        if (ids_[i & 255] == kNoToken || ids_[i >> 8] == kNoToken) joints_[i >> 6] |= 1ull << (i & 63);
    pairs_.build(left_, right_, ids_.size());
}

// Which tokens can come about: the bytes, and what merges make of them.
std::vector<bool> Merges::reachable(const std::vector<TokenId>& byte_ids, const std::vector<TokenId>& left,
                                    const std::vector<TokenId>& right, const std::vector<TokenId>& merged) const {
    TokenId greatest = 0;
    for (const auto* ids : {&byte_ids, &left, &right, &merged})
        for (TokenId id : *ids) greatest = id == kNoToken ? greatest : std::max(greatest, id);
    if (greatest >= 1u << 30) throw std::invalid_argument("merges has an id beyond 1073741823, which is the greatest");
    std::vector<bool> known(static_cast<size_t>(greatest) + 1);
    for (TokenId id : byte_ids)
        if (id != kNoToken) known[id] = true;
    for (bool found = true; found;) {  // twice, unless merges come before those of their halves
        found = false;
        for (size_t i = 0; i < merged.size(); ++i) {
            if (known[merged[i]] || !known[left[i]] || !known[right[i]]) continue;
            known[merged[i]] = found = true;
        }
    }
    return known;
}

// The bytes of each symbol; none for what needs itself to come about.
std::vector<std::string> Merges::spell() const {
    std::vector<std::string> bytes(ids_.size());
    for (size_t i = 0; i < 256; ++i) bytes[i] = static_cast<char>(i);
    for (bool found = true; found;) {  // once, unless merges come before those of their halves
        found = false;
        for (size_t i = 0; i < result_.size(); ++i) {
            if (!bytes[result_[i]].empty() || bytes[left_[i]].empty() || bytes[right_[i]].empty()) continue;
            bytes[result_[i]] = bytes[left_[i]] + bytes[right_[i]];
            found = true;
        }
        if (ordered_) break;
    }
    return bytes;
}

size_t Merges::encode(const uint8_t* word, size_t size, TokenId* ids, MergeScratch& s) const {
    if (!lacks(word, size)) return encode_whole(word, size, ids, s);
    s.kept.clear();
    for (size_t i = 0; i < size; ++i)
        if (ids_[word[i]] != kNoToken) s.kept.push_back(word[i]);
    return s.kept.empty() ? 0 : encode_whole(s.kept.data(), s.kept.size(), ids, s);
}

size_t Merges::encode_whole(const uint8_t* word, size_t size, TokenId* ids, MergeScratch& s) const {
    if (size <= kShort) {
        Symbol symbols[kShort];
        size_t count = encode_short(word, size, symbols);
        TokenId* out = ids;
        for (size_t i = 0; i < count; ++i) out = put(symbols[i], out);
        return static_cast<size_t>(out - ids);
    }
    if (size >= 0xFFFFFFFF) throw std::invalid_argument("a piece of text without a break has 4 GiB or more");
    s.joined.clear();
    for (size_t begin = 0; begin < size; begin += kBlock) {
        encode_block(word + begin, std::min(kBlock, size - begin), s.block, s);
        if (begin % (kBlock << 8) == 0 && begin && s.checkpoint) (*s.checkpoint)();
        if (begin == 0) {
            s.joined = s.block;
        } else if (!join(word + begin, s)) {  // merges reach so far across that blocks do not help
            encode_block(word, size, s.joined, s);
            break;
        }
    }
    TokenId* out = ids;
    for (Symbol symbol : s.joined) out = put(symbol, out);
    return static_cast<size_t>(out - ids);
}

void Merges::encode_each(NewWords& words) const {
    for (size_t i = 0; i < words.count; ++i) {
        Symbol symbols[kShort];
        words.sizes[i] = static_cast<uint32_t>(encode_short(words.keys[i].bytes(), words.keys[i].length(), symbols));
        for (size_t k = 0; k < words.sizes[i]; ++k) words.symbols[k][i] = symbols[k];
    }
}

// Whether two tokens at a border are what their bytes become on their own.
bool Merges::stay(Symbol left, Symbol right, const uint8_t* border, MergeScratch& s) const {
    const uint8_t* begin = border - lengths_[left];
    size_t size = lengths_[left] + lengths_[right];
    if (size <= kShort) {
        Symbol symbols[kShort];
        return encode_short(begin, size, symbols) == 2 && symbols[0] == left && symbols[1] == right;
    }
    encode_block(begin, size, s.pair, s);
    return s.pair.size() == 2 && s.pair[0] == left && s.pair[1] == right;
}

// Appends the block that begins at the border to what is joined; false if a window of bearable size does not suffice.
bool Merges::join(const uint8_t* border, MergeScratch& s) const {
    const uint8_t *begin = border, *end = border;
    size_t left = s.joined.size(), right = 0;  // the window replaces joined[left..] and block[..right]
    s.window.clear();
    while (true) {
        bool fits_left = left == 0 || (s.window.empty() ? stay(s.joined[left - 1], s.block[0], border, s)
                                                        : stay(s.joined[left - 1], s.window.front(), begin, s));
        bool fits_right = s.window.empty() ? fits_left : right == s.block.size() || stay(s.window.back(), s.block[right], end, s);
        if (fits_left && fits_right) break;
        size_t wider = end - begin + 16;
        while (left > 0 && static_cast<size_t>(border - begin) < wider) begin -= lengths_[s.joined[--left]];
        while (right < s.block.size() && static_cast<size_t>(end - border) < wider) end += lengths_[s.block[right++]];
        if (static_cast<size_t>(end - begin) > kWidest) return false;
        encode_block(begin, static_cast<size_t>(end - begin), s.window, s);
    }
    s.joined.resize(left);
    s.joined.insert(s.joined.end(), s.window.begin(), s.window.end());
    s.joined.insert(s.joined.end(), s.block.begin() + static_cast<ptrdiff_t>(right), s.block.end());
    return true;
}

size_t Merges::encode_short(const uint8_t* word, size_t size, Symbol* out) const {
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
    for (; alive; alive &= alive - 1) out[count++] = symbols[__builtin_ctzll(alive)];
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

void Merges::encode_block(const uint8_t* word, size_t size, std::vector<Symbol>& out, MergeScratch& s) const {
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
    out.clear();
    for (uint32_t i = 0; i < length; i = s.after[i]) out.push_back(s.symbols[i]);
}

}  // namespace warploom
