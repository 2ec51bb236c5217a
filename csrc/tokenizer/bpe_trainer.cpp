#include "tokenizer/bpe_trainer.hpp"

#include <algorithm>
#include <stdexcept>

namespace warploom {

namespace {

constexpr Symbol kMark = 0xFFFFFFFF;  // between words
constexpr Symbol kGone = 0xFFFFFFFE;  // where the right half of a merged pair began
constexpr Symbol kLast = 0x80000000;  // and the length of a token of several bytes, where its last byte stands
constexpr uint32_t kNone = 0xFFFFFFFF;

struct Place {
    uint32_t position, word;
};

struct Pair {
    Symbol left, right;
    uint64_t count;
    uint32_t first, places;  // where its places begin, and how many they are
};

// The index of each pair, by its two symbols. A slot holds a part of the hash; the symbols themselves are in the pair.
class PairIndex {
public:
    uint32_t find(const std::vector<Pair>& pairs, Symbol left, Symbol right) const {
        uint64_t hash = hash_of(left, right);
        for (size_t slot = hash >> shift_;; slot = (slot + 1) & (slots_.size() - 1)) {
            auto [tag, index] = slots_[slot];
            if (index == kNone) return kNone;
            if (tag == tag_of(hash) && pairs[index].left == left && pairs[index].right == right) return index;
        }
    }

    // Adds the last of the pairs, a new one.
    void insert(const std::vector<Pair>& pairs) {
        if (pairs.size() * 2 > slots_.size()) return rebuild(pairs);
        put(pairs.back(), static_cast<uint32_t>(pairs.size() - 1));
    }

    void rebuild(const std::vector<Pair>& pairs) {
        shift_ = 64 - 12;
        while (pairs.size() * 2 > size_t{1} << (64 - shift_)) --shift_;
        std::vector<Slot>().swap(slots_);
        slots_.assign(size_t{1} << (64 - shift_), {0, kNone});
        for (uint32_t i = 0; i < pairs.size(); ++i) put(pairs[i], i);
    }

private:
    struct Slot {
        uint32_t tag, index;
    };
    static uint64_t hash_of(Symbol left, Symbol right) {
        return (static_cast<uint64_t>(left) << 32 | right) * 0x9E3779B97F4A7C15ull;
    }
    static uint32_t tag_of(uint64_t hash) { return static_cast<uint32_t>(hash >> 16); }

    void put(const Pair& pair, uint32_t index) {
        uint64_t hash = hash_of(pair.left, pair.right);
        size_t slot = hash >> shift_;
        while (slots_[slot].index != kNone) slot = (slot + 1) & (slots_.size() - 1);
        slots_[slot] = {tag_of(hash), index};
    }
    std::vector<Slot> slots_ = std::vector<Slot>(1 << 12, {0, kNone});
    int shift_ = 64 - 12;
};

// What one step gathers about the neighbors on one side of the merged pair.
struct Neighbors {
    std::vector<uint64_t> lost, gained;  // by symbol: weight that the old pair loses and the new pair gains
    std::vector<uint32_t> places;        // by symbol: how many places the new pair has
    std::vector<Symbol> symbols;         // that occur
    std::vector<std::pair<Symbol, Place>> seen;

    void add(Symbol symbol, Place place, uint64_t weight) {
        if (symbol >= lost.size()) {
            size_t size = symbol + symbol / 2 + 512;
            lost.resize(size);
            gained.resize(size);
            places.resize(size);
        }
        if (places[symbol]++ == 0) symbols.push_back(symbol);
        lost[symbol] += weight;
        gained[symbol] += weight;
        seen.push_back({symbol, place});
    }
    void clear() {
        for (Symbol symbol : symbols) lost[symbol] = gained[symbol] = places[symbol] = 0;
        symbols.clear();
        seen.clear();
    }
};

class Trainer {
public:
    Trainer(WordCounts counts, const TrainingRules& rules) : rules_(rules) {
        for (int byte = 0; byte < 256; ++byte) tokens_.push_back(std::string(1, static_cast<char>(byte)));
        concatenate(std::move(counts));
        count_pairs();
    }

    std::vector<std::pair<Symbol, Symbol>> run(const std::function<void(uint64_t)>& progress) {
        std::vector<std::pair<Symbol, Symbol>> merges;
        while (merges.size() < rules_.num_merges) {
            if (places_.size() > most_places_ || pairs_.size() > most_pairs_) collect();
            uint32_t best;
            if (!pop(best)) break;
            Pair pair = pairs_[best];
            if (tokens_[pair.left].size() + tokens_[pair.right].size() > rules_.max_token_length) continue;
            merges.push_back({pair.left, pair.right});
            merge(pair);
            if (merges.size() % 64 == 0) progress(merges.size());
        }
        progress(merges.size());
        return merges;
    }

private:
    static constexpr size_t kFewPairs = 1 << 16;

    void concatenate(WordCounts counts) {
        uint64_t size = 1;
        counts.each([&](const uint8_t*, size_t length, uint64_t) { size += length > 1 ? length + 1 : 0; });
        if (size >= kLast - 2) throw std::length_error("the corpus has 2 GiB or more of distinct words, which is too much to train on");
        symbols_.reserve(size);
        symbols_.push_back(kMark);
        counts.each([&](const uint8_t* word, size_t length, uint64_t count) {
            if (length < 2) return;
            symbols_.insert(symbols_.end(), word, word + length);
            symbols_.push_back(kMark);
            weights_.push_back(count);
        });
    }

    void count_pairs() {
        std::vector<uint64_t> counts(1 << 16);
        std::vector<uint32_t> places(1 << 16);
        auto each_pair = [&](auto visit) {
            uint32_t word = 0;
            for (uint32_t i = 1; i + 1 < symbols_.size(); ++i) {
                if (symbols_[i] == kMark) ++word;
                else if (symbols_[i + 1] != kMark) visit(symbols_[i] << 8 | symbols_[i + 1], Place{i, word});
            }
        };
        each_pair([&](uint32_t pair, Place place) {
            counts[pair] += weights_[place.word];
            ++places[pair];
        });
        std::vector<uint32_t> next(1 << 16);
        uint32_t total = 0;
        for (uint32_t pair = 0; pair < 1 << 16; ++pair) {
            next[pair] = total;
            total += places[pair];
        }
        most_places_ = total + size_t{total} / 4;
        places_.reserve(most_places_ + total / 8);
        places_.resize(total);
        for (uint32_t pair = 0; pair < 1 << 16; ++pair)
            if (places[pair]) add_pair(pair >> 8, pair & 0xFF, counts[pair], next[pair], places[pair]);
        each_pair([&](uint32_t pair, Place place) { places_[next[pair]++] = place; });
    }

    void add_pair(Symbol left, Symbol right, uint64_t count, uint32_t first, uint32_t places) {
        uint32_t index = static_cast<uint32_t>(pairs_.size());
        pairs_.push_back({left, right, count, first, places});
        index_.insert(pairs_);
        if (count >= bar_) push(count, index);
        else waiting_.push_back(index);
    }

    // Forgets places that were merged away, and pairs that have no other. There are never more living places than in the
    // beginning, so what is left leaves room enough. Pairs lie in the order of their places: all move towards the front.
    void collect() {
        std::vector<uint32_t> renamed(pairs_.size(), kNone);
        uint32_t pairs = 0, places = 0;
        for (uint32_t i = 0; i < pairs_.size(); ++i) {
            Pair pair = pairs_[i];
            uint32_t first = places, left_size = static_cast<uint32_t>(tokens_[pair.left].size());
            for (uint32_t k = pair.first; pair.count && k < pair.first + pair.places; ++k) {
                Place place = places_[k];
                if (symbols_[place.position] == pair.left && symbols_[place.position + left_size] == pair.right)
                    places_[places++] = place;
            }
            if (places == first) continue;
            renamed[i] = pairs;
            pairs_[pairs++] = {pair.left, pair.right, pair.count, first, places - first};
        }
        pairs_.resize(pairs);
        places_.resize(places);
        most_pairs_ = std::max<size_t>(pairs_.size() * 2, kFewPairs);
        index_.rebuild(pairs_);

        size_t kept = 0;
        for (Entry entry : heap_)
            if (renamed[entry.pair] != kNone) heap_[kept++] = {entry.count, renamed[entry.pair]};
        heap_.resize(kept);
        std::make_heap(heap_.begin(), heap_.end(), [this](const Entry& a, const Entry& b) { return later(a, b); });
        kept = 0;
        for (uint32_t pair : waiting_)
            if (renamed[pair] != kNone) waiting_[kept++] = renamed[pair];
        waiting_.resize(kept);
    }

    // -- which pair comes next -----------------------------------------------------------------------------------------

    struct Entry {
        uint64_t count;
        uint32_t pair;
    };

    bool later(const Entry& a, const Entry& b) const {
        if (a.count != b.count) return a.count < b.count;
        const Pair &p = pairs_[a.pair], &q = pairs_[b.pair];
        if (rules_.ties == Ties::kBytes) {
            int order = tokens_[p.left].compare(tokens_[q.left]);
            return order ? order < 0 : tokens_[p.right] < tokens_[q.right];
        }
        Symbol p_left = number(p.left), q_left = number(q.left);
        return p_left != q_left ? p_left > q_left : number(p.right) > number(q.right);
    }

    Symbol number(Symbol symbol) const {
        return rules_.ties == Ties::kHuggingFace && symbol < 256 ? rules_.byte_order[symbol] : symbol;
    }

    void push(uint64_t count, uint32_t pair) {
        heap_.push_back({count, pair});
        std::push_heap(heap_.begin(), heap_.end(), [this](const Entry& a, const Entry& b) { return later(a, b); });
    }

    bool pop(uint32_t& pair) {
        while (true) {
            while (!heap_.empty()) {
                Entry top = heap_.front();
                std::pop_heap(heap_.begin(), heap_.end(), [this](const Entry& a, const Entry& b) { return later(a, b); });
                heap_.pop_back();
                uint64_t count = pairs_[top.pair].count;
                if (count == top.count) {
                    pair = top.pair;
                    return count >= rules_.min_frequency;
                }
                if (count >= bar_) push(count, top.pair);
                else if (count > 0) waiting_.push_back(top.pair);
            }
            if (waiting_.empty() || bar_ <= 1) return false;
            lower_bar();
        }
    }

    void lower_bar() {
        uint64_t greatest = 0;
        for (uint32_t pair : waiting_) greatest = std::max(greatest, pairs_[pair].count);
        bar_ = std::max<uint64_t>(1, std::min(bar_, greatest) / 2);
        size_t kept = 0;
        for (uint32_t pair : waiting_) {
            uint64_t count = pairs_[pair].count;
            if (count >= bar_) push(count, pair);
            else if (count > 0) waiting_[kept++] = pair;
        }
        waiting_.resize(kept);
    }

    // -- one step ------------------------------------------------------------------------------------------------------

    void merge(const Pair& pair) {
        Symbol made = static_cast<Symbol>(tokens_.size());
        uint32_t left_size = static_cast<uint32_t>(tokens_[pair.left].size());
        uint32_t size = left_size + static_cast<uint32_t>(tokens_[pair.right].size());
        tokens_.push_back(tokens_[pair.left] + tokens_[pair.right]);
        twins_.clear();
        uint64_t twin_weight = 0;
        for (uint32_t k = pair.first; k < pair.first + pair.places; ++k) {
            auto [position, word] = places_[k];
            if (symbols_[position] != pair.left || symbols_[position + left_size] != pair.right) continue;
            uint64_t weight = weights_[word];
            symbols_[position] = made;
            symbols_[position + left_size] = kGone;
            symbols_[position + size - 1] = kLast | size;
            uint32_t before = position - 1;
            if (symbols_[before] >= kLast && symbols_[before] != kMark) before = position - (symbols_[before] & ~kLast);
            Symbol left = symbols_[before], right = symbols_[position + size];
            if (left == made) {  // the step before this one took (made, left half) for a new pair: it is (made, made)
                rights_.gained[pair.left] -= weight;
                twin_weight += weight;
                twins_.push_back({before, word});
            } else if (left != kMark) {
                lefts_.add(left, {before, word}, weight);
            }
            if (right != kMark) rights_.add(right, {position, word}, weight);
        }
        for (Symbol left : lefts_.symbols) lose(left, pair.left, lefts_.lost[left]);
        for (Symbol right : rights_.symbols) lose(pair.right, right, rights_.lost[right]);
        make_pairs(lefts_, made, true);
        make_pairs(rights_, made, false);
        if (!twins_.empty()) {
            uint32_t first = static_cast<uint32_t>(places_.size());
            places_.insert(places_.end(), twins_.begin(), twins_.end());
            add_pair(made, made, twin_weight, first, static_cast<uint32_t>(twins_.size()));
        }
        lefts_.clear();
        rights_.clear();
    }

    void lose(Symbol left, Symbol right, uint64_t weight) {
        uint32_t index = index_.find(pairs_, left, right);
        if (index != kNone) pairs_[index].count -= weight;
    }

    void make_pairs(Neighbors& neighbors, Symbol made, bool on_left) {
        uint32_t total = static_cast<uint32_t>(places_.size());
        for (Symbol symbol : neighbors.symbols) {
            uint32_t places = neighbors.places[symbol];
            if (neighbors.gained[symbol])
                on_left ? add_pair(symbol, made, neighbors.gained[symbol], total, places)
                        : add_pair(made, symbol, neighbors.gained[symbol], total, places);
            neighbors.lost[symbol] = total;  // from here on: where its next place goes
            total += places;
        }
        places_.resize(total);
        for (const auto& [symbol, place] : neighbors.seen) places_[neighbors.lost[symbol]++] = place;
    }

    const TrainingRules& rules_;
    std::vector<std::string> tokens_;
    std::vector<Symbol> symbols_;
    std::vector<uint64_t> weights_;  // of words
    std::vector<Pair> pairs_;
    std::vector<Place> places_;
    size_t most_places_ = 0, most_pairs_ = kFewPairs;  // when there are more, it is time to `collect`
    PairIndex index_;
    std::vector<Entry> heap_;
    std::vector<uint32_t> waiting_;
    uint64_t bar_ = 1 << 20;
    Neighbors lefts_, rights_;
    std::vector<Place> twins_;
};

}  // namespace

std::vector<std::pair<Symbol, Symbol>> train(WordCounts counts, const TrainingRules& rules,
                                             const std::function<void(uint64_t)>& progress) {
    return Trainer(std::move(counts), rules).run(progress);
}

}  // namespace warploom
