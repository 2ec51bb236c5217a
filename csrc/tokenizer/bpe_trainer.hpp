// BPE trainer: word counts to merges, with an incremental pair index and a lazy heap.
//
// All distinct words lie in one array of symbols, a mark between each two. A token starts where its first byte stood; the
// place of its last byte says how long it is, so both neighbors of a token are found in one step, and merging two tokens is
// three writes.
//
// A pair knows how often it occurs (64 bits: the commonest pair of a large corpus overflows 32) and at which places. All
// places of a pair come about in one step: the one that makes its newer half. So they can lie side by side, in order;
// and from then on the count only falls. That is why the heap may be lazy: an entry whose count has fallen in the
// meantime is put back with the true one when it comes up. Pairs too rare to come up soon are not even in the heap, but
// in a waiting list, and `bar` comes down when the heap has no more above it.
//
// Most places are soon merged away and most pairs with them; when too many of either have gathered, those are swept out.
//
// A step gathers by neighbor: with w the sum over places where x stands left of a merged (a, b), the count of (x, a)
// falls by w and the new pair (x, ab) begins with w. One table look-up a distinct neighbor, not one a place.
#pragma once

#include <functional>

#include "tokenizer/word_counter.hpp"

namespace warploom {

enum class Ties { kBytes, kHuggingFace, kIds };

struct TrainingRules {
    uint64_t num_merges;
    Ties ties;
    uint64_t min_frequency;
    uint64_t max_token_length;
    std::vector<uint32_t> byte_order;  // of the 256 bytes in Hugging Face's alphabet
};

// The merges, as pairs of symbols (bytes are 0..255, the n-th merge makes 256 + n). `progress` is called with the number
// of merges so far, now and then; it throws to stop.
std::vector<std::pair<Symbol, Symbol>> train(WordCounts counts, const TrainingRules& rules,
                                             const std::function<void(uint64_t)>& progress);

}  // namespace warploom
