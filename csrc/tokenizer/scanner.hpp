// Pretokenizer scanners: the end of the piece that begins at p, for each named pattern, exactly as its regular expression
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

enum class Pattern : uint8_t { kGpt2, kDigits, kGpt4, kQwen2, kQwen35, kO200k, kTekken, kSpaces, kDeepSeek, kFalcon };

constexpr const char* kPatternNames[] = {"gpt2", "digits", "gpt4", "qwen2", "qwen3.5", "o200k", "tekken", "spaces", "deepseek", "falcon"};
constexpr size_t kPatterns = sizeof kPatternNames / sizeof *kPatternNames;

// Whether words break where case changes.
constexpr bool is_cased(Pattern pattern) { return pattern == Pattern::kO200k || pattern == Pattern::kTekken; }

// Whether each digit is a piece.
constexpr bool is_single_digit(Pattern pattern) {
    return pattern == Pattern::kDigits || pattern == Pattern::kQwen2 || pattern == Pattern::kQwen35 || pattern == Pattern::kTekken;
}

// Classes of the characters that words are made of.
constexpr uint8_t word_bits(Pattern pattern) { return pattern == Pattern::kQwen35 ? kLetter | kMark : kLetter; }

using Byte = const uint8_t*;

inline bool is_newline(uint8_t byte) { return byte == '\r' || byte == '\n'; }

// Past all characters that have some of the bits `any` and none of the bits `none`.
inline Byte skip_run(Byte p, Byte end, uint8_t any, uint8_t none) {
    while (p < end) {
        Character c = character_at(p, end);
        if ((any && !(c.bits & any)) || (c.bits & none)) break;
        p += c.length;
    }
    return p;
}

inline Byte skip_signs(Byte p, Byte end, uint8_t word) { return skip_run(p, end, 0, kSpace | kDigit | word); }

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
// Characters with some of the bits `border` are as good as the end.
inline Byte spaces_piece(Byte p, Byte end, uint8_t border = 0) {
    Byte last = p, q = p;
    while (q < end) {
        Character c = character_at(q, end);
        if (!(c.bits & kSpace)) return last == p || (c.bits & border) ? q : last;
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
        if (is_newline(*q)) after_newline = q + 1;
    return after_newline ? after_newline : spaces_piece(p, end);
}

template <bool single_digits>
inline Byte gpt2_piece(Byte p, Byte end) {
    if (*p == '\'') {
        Byte q = skip_contraction(p, end, false);
        if (q != p) return q;
    }
    Byte q = *p == ' ' && p + 1 < end ? p + 1 : p;
    Character c = character_at(q, end);
    if (single_digits && c.bits & kDigit) return q == p ? q + c.length : q;
    if (c.bits & kLetter) return skip_run(q + c.length, end, kLetter, 0);
    if (c.bits & kDigit) return skip_run(q + c.length, end, kDigit, 0);
    if (!(c.bits & kSpace)) return skip_signs(q + c.length, end, kLetter);
    return spaces_piece(p, end, single_digits ? kDigit : 0);
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
inline Byte signs_piece(Byte p, Byte end, bool slashes, uint8_t word = kLetter) {
    Byte q = *p == ' ' ? p + 1 : p;
    if (q >= end) return nullptr;
    Character c = character_at(q, end);
    if (c.bits & (kSpace | kDigit | word)) return nullptr;
    q = skip_signs(q + c.length, end, word);
    while (q < end && (is_newline(*q) || (slashes && *q == '/'))) ++q;
    return q;
}

inline Byte gpt4_piece(Byte p, Byte end, int most_digits, uint8_t word) {
    if (*p == '\'') {
        Byte q = skip_contraction(p, end, true);
        if (q != p) return q;
    }
    Character c = character_at(p, end);
    if (c.bits & word) return skip_run(p + c.length, end, word, 0);
    if (c.bits & kDigit) return digits_piece(p, end, c.length, most_digits);
    Byte q = p + c.length;
    if (!is_newline(*p) && q < end) {
        Character next = character_at(q, end);
        if (next.bits & word) return skip_run(q + next.length, end, word, 0);
    }
    if (Byte signs = signs_piece(p, end, false, word)) return signs;
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
inline Byte o200k_word(Byte p, Byte end, Character c, bool contractions) {
    bool may_lead = !(c.bits & (kLetter | kDigit)) && !is_newline(*p);
    for (bool need_lower = true;; need_lower = false) {
        Byte word = may_lead ? o200k_core(p + c.length, end, need_lower) : nullptr;
        if (!word) word = o200k_core(p, end, need_lower);
        if (word) return contractions && word < end && *word == '\'' ? skip_contraction(word, end, true) : word;
        if (!need_lower) return nullptr;
    }
}

inline Byte o200k_piece(Byte p, Byte end, int most_digits, bool contractions) {
    Character c = character_at(p, end);
    if (c.bits & kDigit) return digits_piece(p, end, c.length, most_digits);
    if (Byte word = o200k_word(p, end, c, contractions)) return word;
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

// The characters that DeepSeek cuts apart before it looks for words: U+3040 to 30FF and U+4E00 to 9FA5.
inline bool is_kana_or_han(Byte p, Byte end) {
    if (end - p < 3 || p[0] < 0xE3 || p[0] > 0xE9) return false;
    unsigned code = (p[0] & 0x0Fu) << 12 | (p[1] & 0x3Fu) << 6 | (p[2] & 0x3Fu);
    return (code >= 0x3040 && code <= 0x30FF) || (code >= 0x4E00 && code <= 0x9FA5);
}

// Three expressions after one another (patterns.py): digits in threes, then kana and Han, then words; each sees only what
// the one before has left together. A stretch is such a part of the text; its border is as good as the end of the text.
struct Stretch {
    Byte end;
    bool kana_or_han;
    // The classes of the character at q; a digit where the stretch has ended.
    uint8_t at(Byte q, int& length) const {
        if (q >= end) return kDigit;
        Character c = character_at(q, end);
        length = c.length;
        return is_kana_or_han(q, end) == kana_or_han ? c.bits : uint8_t{kDigit};
    }
    Byte skip(Byte q, uint8_t any) const {
        for (int length = 0; at(q, length) & any; q += length) continue;
        return q;
    }
};

inline bool is_ascii_letter(uint8_t byte) { return (byte | 0x20) >= 'a' && (byte | 0x20) <= 'z'; }

inline Byte deepseek_piece(Byte p, Byte end) {
    constexpr uint8_t kWord = kLetter | kMark, kKnown = kWord | kSign | kSpace | kDigit;
    Character c = character_at(p, end);
    if (c.bits & kDigit) return digits_piece(p, end, c.length, 3);
    const Stretch stretch{end, is_kana_or_han(p, end)};
    if (*p < 0x80 && c.bits & kSign && p + 1 < end && is_ascii_letter(p[1])) {
        Byte q = p + 2;
        while (q < end && is_ascii_letter(*q)) ++q;
        return q;
    }
    Byte q = p + c.length;
    int length = 0;
    uint8_t next = stretch.at(q, length);
    if (next & kWord && !(c.bits & (kLetter | kSign)) && !is_newline(*p)) return stretch.skip(q, kWord);
    if (c.bits & kWord) return stretch.skip(q, kWord);
    if (Byte signs = c.bits & kSign ? p : *p == ' ' && next & kSign ? q : nullptr) {
        q = stretch.skip(signs, kSign);
        while (q < end && is_newline(*q)) ++q;
        return q;
    }
    if (c.bits & kSpace) {
        Byte spaces = stretch.skip(p, kSpace);
        uint8_t after = stretch.at(spaces, length);
        return spaces_or_newlines_piece(p, after & kDigit ? spaces : end);
    }
    // No expression knows such a character (control, private, unassigned) unless a word follows: they stay together.
    while (!(next & kKnown)) {
        Byte last = q;
        q += length;
        next = stretch.at(q, length);
        if (next & kWord) return last;
    }
    return q;
}

// Falcon's three expressions: runs of punctuation, then gpt2 between them, then ASCII digits in threes from the left.
inline bool is_punctuation(Character c) { return (c.bits & (kSign | kSymbol)) == kSign; }

inline Byte falcon_piece(Byte p, Byte end) {
    Byte q = p;
    Character c = character_at(p, end);
    if (is_punctuation(c)) {
        do q += c.length;
        while (q < end && is_punctuation(c = character_at(q, end)));
        return q;
    }
    if (*p == ' ' && p + 1 < end) c = character_at(++q, end);
    if (c.bits & kLetter) return skip_run(q + c.length, end, kLetter, 0);
    if (c.bits & kDigit) {
        for (int ascii = 0; q < end && (c = character_at(q, end)).bits & kDigit; q += c.length) {
            ascii = *q < 0x80 ? ascii + 1 : 0;
            if (ascii == 3) return q - 2 == p ? q + 1 : q - 2;
        }
        return q;
    }
    if (c.bits & kSpace || is_punctuation(c)) {
        Byte after = skip_run(p, end, kSpace, 0);
        return after < end && is_punctuation(character_at(after, end)) ? after : spaces_piece(p, end);
    }
    for (; q < end; q += c.length)
        if ((c = character_at(q, end)).bits & (kSpace | kLetter | kDigit) || is_punctuation(c)) break;
    return q;
}

// The end of the piece that begins at p < end.
template <Pattern pattern>
inline Byte next_piece(Byte p, Byte end) {
    constexpr int most_digits = is_single_digit(pattern) ? 1 : 3;
    if constexpr (pattern == Pattern::kGpt2 || pattern == Pattern::kDigits) return gpt2_piece<is_single_digit(pattern)>(p, end);
    if constexpr (pattern == Pattern::kSpaces) return spaced_piece(p, end);
    if constexpr (pattern == Pattern::kDeepSeek) return deepseek_piece(p, end);
    if constexpr (pattern == Pattern::kFalcon) return falcon_piece(p, end);
    if constexpr (is_cased(pattern)) return o200k_piece(p, end, most_digits, pattern == Pattern::kO200k);
    return gpt4_piece(p, end, most_digits, word_bits(pattern));
}

}  // namespace warploom
