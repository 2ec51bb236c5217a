// Scanners: the end of the piece that begins at p, by each of the named patterns, exactly as the regular expression
// would match (tokenizer/patterns.py has the expressions, tests compare the two over all of Unicode).
//
// A regular expression tries its alternatives in order, each with backtracking. For these patterns one look at the
// first one or two characters tells which alternative matches, and a run of one class gives its length. Only the words
// of o200k need more thought: see `o200k_word`.
//
// Legend: p where the piece begins, end of the text, limit none: a scanner may look as far as the text goes.
#pragma once

#include <cstring>

#include "tokenizer/unicode.hpp"

namespace warploom {

enum class Pattern : uint8_t { kGpt2, kGpt4, kQwen2, kO200k, kSpaces };

using Byte = const uint8_t*;

// Past all characters that have some of the bits `any` and none of the bits `none`.
inline Byte skip_run(Byte p, Byte end, uint8_t any, uint8_t none) {
    while (p < end) {
        Character c = character_at(p, end);
        if ((any && !(c.bits & any)) || (c.bits & none)) break;
        p += c.length;
    }
    return p;
}

inline Byte skip_letters(Byte p, Byte end) { return skip_run(p, end, kLetter, 0); }
inline Byte skip_signs(Byte p, Byte end) { return skip_run(p, end, 0, kSpace | kLetter | kDigit); }

// Past the contraction 's 't 're 've 'm 'll 'd that begins at the apostrophe p; p itself if there is none.
inline Byte skip_contraction(Byte p, Byte end, bool any_case) {
    if (end - p < 2) return p;
    uint8_t fold = any_case ? 0x20 : 0;
    uint8_t first = p[1] | fold;
    if (first == 's' || first == 't' || first == 'm' || first == 'd') return p + 2;
    if (end - p < 3) return p;
    uint8_t second = p[2] | fold;
    if ((first == 'r' && second == 'e') || (first == 'v' && second == 'e') || (first == 'l' && second == 'l')) return p + 3;
    if (any_case && p[1] == 0xC5 && p[2] == 0xBF) return p + 3;  // U+017F, the long s, is an s in any case
    return p;
}

// The piece that a run of spaces begins: all but its last character if a non-space follows, else all of it.
inline Byte spaces_piece(Byte p, Byte end) {
    Byte last = p, q = p;
    while (q < end) {
        Character c = character_at(q, end);
        if (!(c.bits & kSpace)) return last == p ? q : last;
        last = q;
        q += c.length;
    }
    return q;
}

// The same where newlines take precedence: `\s*[\r\n]+|\s+(?!\S)|\s+`.
inline Byte spaces_or_newlines_piece(Byte p, Byte end) {
    Byte after_newline = nullptr;
    Byte q = p;
    for (Character c; q < end && ((c = character_at(q, end)).bits & kSpace); q += c.length)
        if (c.bits & kNewline) after_newline = q + 1;
    return after_newline ? after_newline : spaces_piece(p, end);
}

inline Byte gpt2_piece(Byte p, Byte end) {
    if (*p == '\'') {
        Byte q = skip_contraction(p, end, false);
        if (q != p) return q;
    }
    Byte q = *p == ' ' && p + 1 < end ? p + 1 : p;
    Character c = character_at(q, end);
    if (c.bits & kLetter) return skip_letters(q + c.length, end);
    if (c.bits & kDigit) return skip_run(q + c.length, end, kDigit, 0);
    if (!(c.bits & kSpace)) return skip_signs(q + c.length, end);
    return spaces_piece(p, end);
}

// Up to `most` digits, the first of which has `length` bytes.
inline Byte digits_piece(Byte p, Byte end, int length, int most) {
    Byte q = p + length;
    for (int count = 1; count < most && q < end; ++count) {
        Character c = character_at(q, end);
        if (!(c.bits & kDigit)) break;
        q += c.length;
    }
    return q;
}

// ` ?[^\s\p{L}\p{N}]+[\r\n]*` (and slashes among the newlines for o200k); nullptr if it does not match at p.
inline Byte signs_piece(Byte p, Byte end, bool slashes) {
    Byte q = *p == ' ' ? p + 1 : p;
    if (q >= end) return nullptr;
    Character c = character_at(q, end);
    if (c.bits & (kSpace | kLetter | kDigit)) return nullptr;
    q = skip_signs(q + c.length, end);
    while (q < end && (*q == '\r' || *q == '\n' || (slashes && *q == '/'))) ++q;
    return q;
}

inline Byte gpt4_piece(Byte p, Byte end, int most_digits) {
    if (*p == '\'') {
        Byte q = skip_contraction(p, end, true);
        if (q != p) return q;
    }
    Character c = character_at(p, end);
    if (c.bits & kLetter) return skip_letters(p + c.length, end);
    if (c.bits & kDigit) return digits_piece(p, end, c.length, most_digits);
    Byte q = p + c.length;
    if (!(c.bits & kNewline) && q < end) {
        Character next = character_at(q, end);
        if (next.bits & kLetter) return skip_letters(q + next.length, end);
    }
    if (Byte signs = signs_piece(p, end, false)) return signs;
    return spaces_or_newlines_piece(p, end);
}

// `U*L+`, or failing that `U+L*`, at q, where some characters (ideographs, marks) are both U and L; nullptr for none.
//
// The greedy U* may swallow characters that L+ needs. If an L follows the U run, L+ takes over there. Otherwise U*
// gives back characters until one of them is an L too, and L+ takes just that one: what follows it is U only.
// The second alternative is tried only after the first has failed everywhere; `need_lower` says which one is asked for.
inline Byte o200k_core(Byte q, Byte end, bool need_lower) {
    Byte begin = q, after_both = nullptr;
    while (q < end) {
        Character c = character_at(q, end);
        if (!(c.bits & kUpper)) break;
        q += c.length;
        if (c.bits & kLower) after_both = q;
    }
    Byte lower = skip_run(q, end, kLower, 0);
    if (!need_lower) return q == begin ? nullptr : lower;
    return lower != q ? lower : after_both;
}

// A word with its optional leading sign and trailing contraction; nullptr if none begins at p.
inline Byte o200k_word(Byte p, Byte end, Character c) {
    bool may_lead = !(c.bits & (kLetter | kDigit | kNewline));
    for (bool need_lower = true;; need_lower = false) {
        Byte word = may_lead ? o200k_core(p + c.length, end, need_lower) : nullptr;
        if (!word) word = o200k_core(p, end, need_lower);
        if (word) return word < end && *word == '\'' ? skip_contraction(word, end, true) : word;
        if (!need_lower) return nullptr;
    }
}

inline Byte o200k_piece(Byte p, Byte end) {
    Character c = character_at(p, end);
    if (c.bits & kDigit) return digits_piece(p, end, c.length, 3);
    if (Byte word = o200k_word(p, end, c)) return word;
    if (Byte signs = signs_piece(p, end, true)) return signs;
    return spaces_or_newlines_piece(p, end);
}

// ` *(?:[^ ]|(?<=>) +)+| +`: spaces and the word behind them, to which spaces behind a > belong too.
inline Byte spaced_piece(Byte p, Byte end) {
    Byte q = p;
    while (q < end && *q == ' ') ++q;
    while (q < end) {
        q = static_cast<Byte>(std::memchr(q, ' ', static_cast<size_t>(end - q)));
        if (!q) return end;
        if (q[-1] != '>') return q;
        while (q < end && *q == ' ') ++q;
    }
    return end;
}

// The end of the piece that begins at p < end.
template <Pattern pattern>
inline Byte next_piece(Byte p, Byte end) {
    if constexpr (pattern == Pattern::kGpt2) return gpt2_piece(p, end);
    if constexpr (pattern == Pattern::kGpt4) return gpt4_piece(p, end, 3);
    if constexpr (pattern == Pattern::kQwen2) return gpt4_piece(p, end, 1);
    if constexpr (pattern == Pattern::kSpaces) return spaced_piece(p, end);
    return o200k_piece(p, end);
}

}  // namespace warploom
