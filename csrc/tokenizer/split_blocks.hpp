// SIMD pretokenizer: splits 64 bytes at once. Included by simd_loops.hpp, once per instruction set.
//
// Each class of characters becomes a 64-bit mask, bit i for byte i. Shifting a mask left by one asks about the previous
// character, so "a letter that does not follow a letter or a blank" is `letter & ~((letter | blank) << 1)`: the rules of
// a pattern become a dozen word operations for 64 characters.
//
// A block always begins where a piece begins, so no state is carried from block to block, and the piece that is still
// open at the end of a block is simply looked at again. What cannot be decided inside the block is marked in
// `uncertain`: its last characters (their right neighbors are missing), some runs of spaces, some characters beyond ASCII.
// Starts are believed up to the first such place; there the exact scanner takes over for a piece or more.
//
// A character of several bytes sets the bits of all of them, so that the same algebra holds: classes change only where
// characters begin. What the algebra cannot say of such a character is left to the scanner (`decode`).

// Bytes of text that are requested ahead: the processor itself requests none of the next page.
constexpr size_t kTextAhead = 2048;

// Bits below i.
static inline uint64_t below(unsigned i) { return i >= 64 ? ~0ull : (1ull << i) - 1; }

static inline uint64_t lowest(uint64_t bits) { return bits & -bits; }

// The lowest bit of the run of bits in `mask` that ends at bit i.
static inline uint64_t run_start(uint64_t mask, unsigned i) {
    uint64_t gaps = ~mask & below(i);
    return gaps ? 2ull << (63 - __builtin_clzll(gaps)) : 1;
}

// The bits from i up to but not including j.
static inline uint64_t between(unsigned i, unsigned j) { return below(j) & ~below(i); }

// Contractions whose apostrophes are in `open`: no piece begins inside, one begins right behind.
static inline uint64_t cut_contractions(const uint8_t* text, uint64_t starts, uint64_t open, bool any_case) {
    for (; open; open &= open - 1) {
        unsigned i = __builtin_ctzll(open);
        unsigned j = static_cast<unsigned>(skip_contraction(text + i, text + 64, any_case) - text);
        if (j == i) continue;
        starts &= ~between(i + 1, j);
        if (j < 64) starts |= 1ull << j;
    }
    return starts;
}

// Adds the characters beyond ASCII to the masks, and leaves in `high` only the first that the masks cannot hold: one that
// the block cuts in two; a space, which must go whole to the word behind it; a digit where digits are counted; for o200k
// a letter or mark that is neither upper nor lower case.
template <Pattern pattern>
static inline void decode(const uint8_t* text, Masks& m) {
    uint64_t high = m.high;
    if (!is_cased(pattern)) {
        uint64_t whole = m.ideograph & ~0ull >> 2, span = whole | whole << 1 | whole << 2;
        m.letter |= span;
        m.wide[3] |= whole;
        high &= ~span;
    }
    while (high) {
        unsigned i = static_cast<unsigned>(__builtin_ctzll(high)), first = text[i];
        unsigned length = first < 0xE0 ? 2 : first < 0xF0 ? 3 : 4;
        m.high = high;
        if (i + length > 64) return;
        uint8_t bits = character_at(text + i, text + 64).bits;
        if (bits & kSpace || (pattern != Pattern::kGpt2 && bits & kDigit)) return;
        if (is_cased(pattern) && (bits & kUpper) && (bits & kLower)) return;
        uint64_t span = ((1ull << length) - 1) << i;
        m.letter |= bits & word_bits(pattern) ? span : 0;  // which of them is hard to predict
        m.digit |= bits & kDigit ? span : 0;
        if (is_cased(pattern)) m.upper |= bits & kUpper ? span : 0;
        m.wide[length] |= 1ull << i;
        high &= ~span;
    }
    m.high = 0;
}

template <Pattern pattern>
static inline uint64_t gpt2_starts(const uint8_t* text, const Masks& m, uint64_t valid) {
    constexpr bool single = is_single_digit(pattern);  // then no space goes with a digit
    uint64_t space = m.blank | m.other_space, after_blank = m.blank << 1;
    uint64_t sign = valid & ~(m.letter | m.digit | space);
    uint64_t starts = (m.letter & ~(m.letter << 1 | after_blank)) | (single ? m.digit : m.digit & ~(m.digit << 1 | after_blank)) |
                      (sign & ~(sign << 1 | after_blank)) | (space & ~(space << 1)) | (space & (valid & ~(single ? space | m.digit : space)) >> 1);
    return cut_contractions(text, starts, m.apostrophe & (starts | 1), false);
}

// Every third digit begins a piece, counted from the begin of its run; every one where they are single.
template <Pattern pattern>
static inline uint64_t digit_starts(uint64_t digit) {
    if (is_single_digit(pattern)) return digit;
    uint64_t starts = digit & ~(digit << 1);
    uint64_t fourth = digit & digit << 1 & digit << 2 & digit << 3;
    for (uint64_t next = starts; (next = next << 3 & fourth);) starts |= next;
    return starts;
}

// In o200k a contraction belongs to the word before it: no piece begins at its apostrophe, one begins behind it.
static inline uint64_t join_contractions(const uint8_t* text, uint64_t starts, uint64_t suffixes) {
    unsigned done = 0;
    for (; suffixes; suffixes &= suffixes - 1) {
        unsigned i = __builtin_ctzll(suffixes);
        if (i == done) continue;  // behind another contraction: a word takes only one
        unsigned j = static_cast<unsigned>(skip_contraction(text + i, text + 64, true) - text);
        if (j == i) continue;
        starts &= ~between(i, j);
        if (j < 64) starts |= 1ull << j;
        done = j;
    }
    return starts;
}

// gpt4, o200k and their kin. `trusted` is the place up to which the block is believed; it may come down.
template <Pattern pattern>
static inline uint64_t gpt4_starts(const uint8_t* text, const Masks& m, uint64_t valid, unsigned& trusted) {
    constexpr bool cased = is_cased(pattern);
    uint64_t space = m.blank | m.other_space, flat = space & ~m.newline, newline = m.newline;
    uint64_t sign = valid & ~(m.letter | m.digit | space);
    uint64_t sign_start = sign & ~(sign << 1 | m.blank << 1);

    uint64_t taken = newline & sign << 1;  // newlines right behind signs belong to them
    for (uint64_t more = taken; (more = newline & more << 1 & ~taken);) taken |= more;
    uint64_t run = space & ~taken;

    // A run of spaces begins a piece, so does what follows its last newline, so does its last space before a word.
    uint64_t starts = sign_start | (run & ~(run << 1)) | (flat & newline << 1) | (flat & (valid & ~space) >> 1);
    // Is a newline the last of its run? Not if flat spaces and another newline follow; the scanner sorts that out.
    uint64_t uncertain = 0;
    if (uint64_t doubtful = flat & newline >> 1) {
        uint64_t first = run_start(flat, __builtin_ctzll(doubtful));
        uncertain = newline & first >> 1 ? first : first << 1;
    }
    if (cased) uncertain |= m.slash & taken << 1;  // slashes go on with newlines behind signs
    if (uncertain && static_cast<unsigned>(__builtin_ctzll(uncertain)) < trusted) trusted = __builtin_ctzll(uncertain);
    // Nor can it be known of a run that reaches the end of what is believed.
    if (trusted < 64 && trusted > 0 && space >> (trusted - 1) & 1) trusted = __builtin_ctzll(run_start(space, trusted - 1)) + 1;

    uint64_t lead = (flat | sign_start) << 1;  // a word takes the space or sign before it along
    if (uint64_t wide = sign_start & (m.wide[2] | m.wide[3] | m.wide[4]))
        lead = (lead & ~(wide << 1)) | (wide & m.wide[2]) << 2 | (wide & m.wide[3]) << 3 | (wide & m.wide[4]) << 4;
    starts |= m.letter & ~(m.letter << 1 | lead);
    starts |= digit_starts<pattern>(m.digit);
    if (!cased) return cut_contractions(text, starts, m.apostrophe & (sign_start | 1), true);
    starts |= m.upper & (m.letter & ~m.upper) << 1;
    return pattern == Pattern::kTekken ? starts : join_contractions(text, starts, m.apostrophe & m.letter << 1);
}

// A run of spaces begins a piece, unless it stands behind a >.
static inline uint64_t spaced_starts(const uint8_t* text, const Masks& m) {
    uint64_t starts = m.blank & ~(m.blank << 1) & ~1ull;
    for (uint64_t left = starts; left; left &= left - 1)
        if (text[__builtin_ctzll(left) - 1] == '>') starts &= ~lowest(left);
    return starts;
}

template <Pattern pattern>
static size_t split_blocks(Split& split, uint32_t* ends, size_t capacity) {
    const uint8_t* text = split.text + split.position;  // everything below is relative to where this call begins
    const uint64_t size = split.size - split.position, limit = split.limit - split.position;
    uint64_t at = 0;
    size_t count = 0;
    uint8_t padded[64];
    while (count < capacity && at < limit) {
        const uint8_t* block = text + at;
        __builtin_prefetch(block + kTextAhead);
        const bool last = size - at <= 64;
        const uint64_t valid = below(static_cast<unsigned>(last ? size - at : 64));
        if (last && size - at < 64) {
            __builtin_memset(padded, 0, 64);
            __builtin_memcpy(padded, block, size - at);
            block = padded;
        }
        Masks m;
        classify(block, m);
        unsigned trusted = last ? 64 : 61;
        if (pattern == Pattern::kSpaces) m.high = 0;
        if (m.high) decode<pattern>(block, m);
        if (m.high) {  // undecided: the two characters before it are looked at with it
            unsigned high = __builtin_ctzll(m.high);
            if (high < trusted + 1) trusted = high ? high - 1 : 0;
        }
        uint64_t starts;
        if constexpr (pattern == Pattern::kSpaces) starts = spaced_starts(block, m);
        else if constexpr (pattern == Pattern::kGpt2 || pattern == Pattern::kDigits) starts = gpt2_starts<pattern>(block, m, valid);
        else starts = gpt4_starts<pattern>(block, m, valid, trusted);
        starts &= below(trusted) & valid & ~1ull;
        if (limit - at < 64) starts &= below(static_cast<unsigned>(limit - at) + 1);
        if (starts) {
            count = emit(starts, static_cast<uint32_t>(at), ends, count);
            at += 63 - __builtin_clzll(starts);
        }
        if (trusted == 64) {  // the last block, and certain
            if (at < limit) ends[count++] = static_cast<uint32_t>(at = size);
            break;
        }
        if (starts && trusted >= 60) continue;
        while (at < limit && count < capacity) {
            at = static_cast<uint64_t>(next_piece<pattern>(text + at, text + size) - text);
            ends[count++] = static_cast<uint32_t>(at);
            if (!is_cased(pattern) || at + 1 >= size || (text[at] | text[at + 1]) < 0x80) break;
        }
    }
    split.position += at;
    return count;
}

// Splitting by the scanner alone, for patterns that have no algebra of their own.
template <Pattern pattern>
static size_t split_pieces(Split& split, uint32_t* ends, size_t capacity) {
    const uint8_t *text = split.text + split.position, *at = text;
    const uint8_t *limit = split.text + split.limit, *end = split.text + split.size;
    size_t count = 0;
    while (count < capacity && at < limit) {
        at = next_piece<pattern>(at, end);
        ends[count++] = static_cast<uint32_t>(at - text);
    }
    split.position += static_cast<uint64_t>(at - text);
    return count;
}
