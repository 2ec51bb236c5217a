// Attention in training whose products are of pairs of bfloat16 (`vdpbf16ps`), at twice the rate of float32's.
//
// Rounded are, as in FlashAttention, weights and the gradients of scores before they are multiplied; scores, maxima, sums and the
// means of slopes are float32. Order of tasks, two numbers a query and exact means are those of dense_attention.hpp, and its
// numbers are not: they are to base 2 here.
#pragma once
#include "cpu/training/dense_attention.hpp"

namespace warploom {

// Whether this CPU has fast bfloat16 dot products, and heads have an even width.
bool has_pair_attention(int width);

// A task: one key head of a sequence, with the query heads that share it.
void pair_attention_forward(const DenseAttention<bfloat16>& t, HeadsOf<bfloat16> out, int batch, int key_head);
void pair_attention_backward(const DenseAttention<bfloat16>& t, HeadsOf<const bfloat16> d_out, HeadsOf<bfloat16> dq,
                             HeadsOf<bfloat16> dk, HeadsOf<bfloat16> dv, int batch, int key_head);

}  // namespace warploom
