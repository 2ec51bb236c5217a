#include "tokenizer/segments.hpp"

#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "tokenizer/unicode.hpp"

namespace warploom {

Specials::Specials(std::vector<AddedToken> tokens) : tokens_(std::move(tokens)) {
    for (size_t i = 0; i < tokens_.size(); ++i) {
        const std::string& text = tokens_[i].text;
        if (text.empty()) throw std::invalid_argument("an added token is empty; it must have at least one character");
        uint32_t node = 0;
        for (size_t at = 0; at < text.size(); ++at) {
            uint8_t byte = static_cast<uint8_t>(text[at]);
            uint32_t next = at ? child_of(node, byte) : first_[byte];
            if (!next) {
                next = static_cast<uint32_t>(nodes_.size());
                nodes_.push_back({0, at ? nodes_[node].child : 0, 0, byte});
                (at ? nodes_[node].child : first_[byte]) = next;
            }
            node = next;
        }
        nodes_[node].token = static_cast<uint32_t>(i + 1);
        longest_ = std::max(longest_, text.size());
        unsigned first = static_cast<uint8_t>(text[0]);
        only_first_ = i == 0 || only_first_ == static_cast<int>(first) ? static_cast<int>(first) : -2;
        for (unsigned second = 0; second < 256; ++second)
            if (text.size() == 1 || second == static_cast<uint8_t>(text[1]))
                pairs_[(first | second << 8) >> 6] |= 1ull << (first & 63);
    }
}

uint32_t Specials::child_of(uint32_t node, uint8_t byte) const {
    uint32_t child = nodes_[node].child;
    while (child && nodes_[child].byte != byte) child = nodes_[child].sibling;
    return child;
}

Specials::Found Specials::next(TextView text, size_t from, size_t done) const {
    for (size_t at = from; at < text.size; ++at) {
        if (only_first_ >= 0) {
            const void* here = std::memchr(text.data + at, only_first_, text.size - at);
            if (!here) break;
            at = static_cast<size_t>(static_cast<const uint8_t*>(here) - text.data);
        }
        uint32_t node = first_[text.data[at]];
        if (!node) continue;
        size_t end = at + 1;
        if (end < text.size) {
            unsigned pair = text.data[at] | static_cast<unsigned>(text.data[end]) << 8;
            if (!(pairs_[pair >> 6] >> (pair & 63) & 1)) continue;
        }
        uint32_t token = 0;
        size_t token_end = 0;
        while (node) {
            if (nodes_[node].token) token = nodes_[node].token, token_end = end;
            if (end == text.size) break;
            node = child_of(node, text.data[end++]);
        }
        if (token) return found(text, at, token_end, done, tokens_[token - 1]);
    }
    return {text.size, text.size, 0, text.size, text.size};
}

// A token with the white space that it takes along.
Specials::Found Specials::found(TextView text, size_t from, size_t next, size_t done, const AddedToken& token) const {
    size_t begin = from, end = next;
    while (token.lstrip && begin > done) {
        size_t before = begin - 1;
        while (before > done && (text.data[before] & 0xC0) == 0x80) --before;
        if (!(character_at(text.data + before, text.data + begin).bits & kSpace)) break;
        begin = before;
    }
    while (token.rstrip && end < text.size) {
        Character c = character_at(text.data + end, text.data + text.size);
        if (!(c.bits & kSpace)) break;
        end += c.length;
    }
    return {begin, end, token.id, from, next};
}

namespace {

// As `safe_cut`, but of characters.
template <class Unit>
size_t safe_cut_of(const Unit* text, Pattern pattern, size_t begin, size_t limit) {
    for (size_t at = limit; at > begin; --at) {
        if (pattern == Pattern::kSpaces && text[at] != ' ') continue;
        if (text[at] == '\'' || (class_of(text[at]) & (kLetter | kDigit | kMark))) continue;
        if (class_of(text[at - 1]) & (kLetter | kDigit)) return at;
    }
    return begin;
}

void cut_wide(TextView text, Pattern pattern, Follows follows, size_t segment_size, std::vector<Segment>& segments) {
    for (size_t begin = 0, limit; begin < text.size; begin = limit, follows = Follows::kText) {
        limit = text.size;
        if (limit - begin > segment_size + segment_size / 2) {
            size_t wanted = begin + segment_size;
            limit = text.width == 1   ? safe_cut_of(text.data, pattern, begin, wanted)
                    : text.width == 2 ? safe_cut_of(reinterpret_cast<const uint16_t*>(text.data), pattern, begin, wanted)
                                      : safe_cut_of(reinterpret_cast<const uint32_t*>(text.data), pattern, begin, wanted);
            if (limit == begin) limit = text.size;
        }
        segments.push_back({text.data, begin, limit, text.size, 0, false, text.width, follows});
    }
}

}  // namespace

void cut_segments(TextView text, const Specials* specials, Pattern pattern, Follows follows, size_t segment_size,
                  std::vector<Segment>& segments) {
    if (text.width) return cut_wide(text, pattern, follows, std::min(segment_size, kWideSegment), segments);
    size_t begin = 0, from = 0;
    while (true) {
        Specials::Found special = specials ? specials->next(text, from, begin) : Specials::Found{text.size, text.size, 0, 0, 0};
        for (size_t limit; begin < special.begin; begin = limit, follows = Follows::kText) {
            limit = special.begin;
            if (limit - begin > segment_size + segment_size / 2) {
                limit = safe_cut(text.data, pattern, begin, begin + segment_size, special.begin);
                if (limit == begin) limit = special.begin;
            }
            segments.push_back({text.data, begin, limit, special.begin, 0, false, 0, follows});
        }
        follows = Follows::kAdded;
        if (special.begin == special.end) return;
        segments.push_back({text.data, 0, 0, 0, special.id, false});
        begin = special.end;
        from = special.next;
    }
}

StreamCut stream_cut(TextView text, const Specials* specials, Pattern pattern) {
    size_t longest = specials ? specials->longest() : 1;
    if (text.size <= longest) return {0, Follows::kText};
    size_t limit = text.size - longest, begin = 0, from = 0;
    while (begin < limit) {
        Specials::Found special = specials ? specials->next(text, from, begin) : Specials::Found{text.size, text.size, 0, text.size, 0};
        if (special.from >= limit || special.end == text.size)  // white space that it takes along may go on
        {
            uint64_t cut = safe_cut(text.data, pattern, begin, std::min(limit, special.begin), special.begin);
            return {cut, cut == begin ? Follows::kAdded : Follows::kText};
        }
        begin = special.end;
        from = special.next;
    }
    return {begin, Follows::kAdded};
}

}  // namespace warploom
