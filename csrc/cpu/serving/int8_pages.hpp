// int8 KV cache: pages of half the size, and attention by integer dot products.
//
// Decoding reads all keys and values of all requests once a token, so their bytes are its time. Each token's key and
// value of a head is rounded when it is written, with a scale of its own: nothing that comes later changes it. Keys, whose
// channels differ most, are rotated before (hadamard.hpp), and queries with them.
//
// A page is a row of tiles, one for every sixteen tokens and head, and a tile lies as the dot-product instruction (unsigned
// by signed bytes, four a lane) wants it: keys as (D / 4, 16 tokens, 4), offset by 128 to be unsigned; values as
// (4, D, 4 tokens); after either sixteen scales. D is padded to whole vectors.
//
// A query meets the keys as two bytes a number, 128 · high + low, and the weights of a tile's values are two bytes too,
// 256 · high + low of 65535 parts of the largest. Sums of whole numbers are exact, and two products of bytes cost less
// than widening: what remains of rounding is that of keys and values.
#pragma once
#include "cpu/serving/paged_attention.hpp"

namespace warploom {

constexpr int kTile = 16;  // tokens

// As `write_page`, and one task of `attend_pages`.
void write_int8(const Pages&, int64_t slot, const float* k, const float* v);
void attend_int8(const Pages&, const Step&, const AttentionOptions&, const float* q, int64_t q_stride, const QueryBlock&, float* out);

}  // namespace warploom
