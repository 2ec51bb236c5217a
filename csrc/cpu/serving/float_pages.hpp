// Paged attention over float32 and bfloat16 pages, computed in float32.
//
// A query's sums have one order, whatever the other queries (batch invariance): the score of a key is summed over sixteen
// lanes of the head, which are then added as a tree; keys come in rounds of about 128 at fixed positions, after each of
// which the running maximum and the lane-wise sums of weights are brought up to date; values are added key by key. Few
// queries of a head (decoding) read a page where it lies. More of them (prompts) share its rows, widened once, in register
// tiles of 4 queries × 32 keys, then 4 queries × 64 columns of values. Keys lie in the lanes there, so lanes of the first
// kind are vectors, added by the same tree: the same bits.
#pragma once
#include "cpu/serving/paged_attention.hpp"

namespace warploom {

constexpr int kDirect = 4;  // queries of a key head that read a page where it lies

// One task of `attend_pages`.
void attend_float_pages(const Pages&, const Step&, const AttentionOptions&, const float* q, int64_t q_stride,
                        const QueryBlock&, float* out);

}  // namespace warploom
