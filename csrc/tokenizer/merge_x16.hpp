// SIMD BPE merging: sixteen new words at once, one word a lane. Included by simd_avx512.cpp.
//
// Merging one word is a chain of waits: the least rank tells which symbols merge, and what they become tells where in the
// pair table to look for the ranks of their neighbors, which must arrive before the next least rank is known. Sixteen words
// wait together. A register holds the symbols that sixteen words have at one position, so a step is a loop over
// positions, in which each lane compares the position with its own place and takes what it needs; after a merge all
// behind it move up by one. A candidate is the rank of a pair and, in the lowest four bits, its position: the least is
// the one to merge, leftmost among equals.
//
// By hand, since compilers know no gathers. Lanes that are done wait for the others: about half of all steps.

// Ranks of pairs, kNoRank >> 4 where there is none, in the lanes that are asked for.
static inline __m512i ranks_of(const PairTable& pairs, __mmask16 asked, __m512i left, __m512i right) {
    const __m512i even = _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
    const __m512i odd = _mm512_or_si512(even, all(1)), greatest = _mm512_srli_epi32(all(-1), 10);
    __m512i hash = _mm512_add_epi32(_mm512_mullo_epi32(left, all(static_cast<int>(PairTable::kLeft))),
                                    _mm512_mullo_epi32(right, all(static_cast<int>(pairs.right()))));
    __m512i bucket = _mm512_srlv_epi32(hash, all(static_cast<int>(pairs.shift())));
    __m512i place = _mm512_add_epi32(hash, _mm512_slli_epi32(left, 9));
    place = _mm512_and_si512(place, all(static_cast<int>(pairs.mask())));
    place = _mm512_xor_si512(place, _mm512_mask_i32gather_epi32(place, asked, bucket, pairs.displacements(), 4));
    __m512i first = _mm512_i32gather_epi64(_mm512_castsi512_si256(place), pairs.slots(), 8);
    __m512i last = _mm512_i32gather_epi64(_mm512_extracti64x4_epi64(place, 1), pairs.slots(), 8);
    __m512i low = _mm512_permutex2var_epi32(first, even, last), high = _mm512_permutex2var_epi32(first, odd, last);
    // A slot is left << 43 | right << 22 | rank: all but the rank must agree.
    __m512i rank = _mm512_xor_si512(low, _mm512_slli_epi32(right, 22));
    high = _mm512_xor_si512(high, _mm512_or_si512(_mm512_slli_epi32(left, 11), _mm512_srli_epi32(right, 10)));
    __mmask16 found = _mm512_mask_testn_epi32_mask(asked, high, high);
    found = _mm512_mask_cmple_epu32_mask(found, rank, greatest);
    return _mm512_mask_mov_epi32(all(static_cast<int>(kNoRank >> 4)), found, rank);
}

static void merge_x16(const Merges& merges, NewWords& words) {
    constexpr int kMost = kKeyBytes;
    const PairTable& pairs = merges.pairs();
    const __m512i none = all(PairTable::kNoSymbol), done = all(static_cast<int>(kNoRank << 4));
    const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    __m512i symbols[kMost + 4], candidates[kMost + 1];  // symbols[i + 1] are those at position i; around them are none
    const __m512i at = _mm512_slli_epi32(lane, 4);
    const char* keys = reinterpret_cast<const char*>(words.keys);
    __m512i size = _mm512_srli_epi32(_mm512_i32gather_epi32(at, keys + 12, 1), 24);
    const int most = static_cast<int>(_mm512_reduce_max_epu32(size));

    symbols[0] = none;
    for (int i = 0; i < kMost + 1; i += 4) {
        __m512i bytes = _mm512_i32gather_epi32(at, keys + i, 1);
        for (int j = 0; j < 4; ++j, bytes = _mm512_srli_epi32(bytes, 8))
            symbols[i + j + 1] = _mm512_mask_and_epi32(none, _mm512_cmpgt_epi32_mask(size, all(i + j)), bytes, all(255));
    }
    symbols[kMost + 2] = symbols[kMost + 3] = none;
    __m512i least = done;
    for (int i = 0; i + 1 < most; ++i) {
        __m512i pair = _mm512_or_si512(_mm512_slli_epi32(symbols[i + 1], 8), symbols[i + 2]);
        __m512i rank = _mm512_mask_i32gather_epi32(all(-1), _mm512_cmpgt_epi32_mask(size, all(i + 1)), pair, pairs.bytes(), 4);
        candidates[i] = _mm512_or_si512(_mm512_slli_epi32(rank, 4), all(i));
        least = _mm512_min_epu32(least, candidates[i]);
    }
    for (int i = most > 0 ? most - 1 : 0; i < most + 1; ++i) candidates[i] = all(-1);

    while (__mmask16 merging = _mm512_cmplt_epu32_mask(least, done)) {
        __m512i place = _mm512_mask_and_epi32(all(kMost + 1), merging, least, all(15));
        __m512i rank = _mm512_srli_epi32(least, 4), merged = _mm512_add_epi32(rank, all(256)), before = none, behind = none;
        if (merges.results()) merged = _mm512_mask_i32gather_epi32(none, merging, rank, merges.results(), 4);
        for (int i = 0; i + 1 < most; ++i) {
            __mmask16 here = _mm512_cmpeq_epi32_mask(place, all(i));
            before = _mm512_mask_mov_epi32(before, here, symbols[i]);
            behind = _mm512_mask_mov_epi32(behind, here, symbols[i + 3]);
        }
        __m512i left = _mm512_slli_epi32(ranks_of(pairs, merging, before, merged), 4);
        __m512i right = _mm512_slli_epi32(ranks_of(pairs, merging, merged, behind), 4);
        left = _mm512_or_si512(left, _mm512_and_si512(_mm512_sub_epi32(place, all(1)), all(15)));
        right = _mm512_or_si512(right, _mm512_and_si512(place, all(15)));
        size = _mm512_mask_sub_epi32(size, merging, size, all(1));

        least = done;
        __mmask16 here = _mm512_testn_epi32_mask(place, place), passed = 0;
        __m512i symbol = symbols[1], candidate = candidates[0];
        for (int i = 0; i + 1 < most; ++i) {
            __mmask16 next = _mm512_cmpeq_epi32_mask(place, all(i + 1));
            __m512i next_symbol = symbols[i + 2], next_candidate = candidates[i + 1];
            symbol = _mm512_mask_mov_epi32(symbol, passed, next_symbol);
            candidate = _mm512_mask_sub_epi32(candidate, passed, next_candidate, all(1));
            candidate = _mm512_mask_mov_epi32(_mm512_mask_mov_epi32(candidate, here, right), next, left);
            symbols[i + 1] = _mm512_mask_mov_epi32(symbol, here, merged);
            candidates[i] = candidate;
            least = _mm512_min_epu32(least, candidate);
            passed |= here;
            here = next;
            symbol = next_symbol;
            candidate = next_candidate;
        }
        symbols[most] = _mm512_mask_mov_epi32(symbol, passed, none);
    }
    _mm512_storeu_si512(words.sizes, size);
    for (int i = 0; i < most; ++i) _mm512_storeu_si512(words.symbols[i], symbols[i + 1]);
}
