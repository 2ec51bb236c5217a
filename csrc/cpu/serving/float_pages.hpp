// Attention over pages of float32 and bfloat16, computed in float32.
//
// A query's sums have one order, whoever its neighbors are: the score of a key is summed over sixteen lanes of the head, which
// are then added as a tree; keys come in rounds of about 64 at fixed positions, after each of which the running maximum and the
// lane-wise sums of weights are brought up to date; values are added key by key. Few queries of a head (decoding) read a page
// where it lies. More of them (prompts) share its rows, widened once, and are computed in tiles of 4 queries × 4 keys and
// 4 queries × 64 columns of values in registers: the same sums in the same order, side by side.
#pragma once
#include "cpu/serving/paged_attention.hpp"

namespace warploom {

constexpr int kDirect = 4;  // queries of a key head that read a page where it lies

// One task of `attend_pages`.
void attend_float_pages(const Pages&, const Step&, const AttentionOptions&, const float* q, int64_t q_stride,
                        const QueryBlock&, float* out);

}  // namespace warploom
