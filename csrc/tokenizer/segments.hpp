// Cutting of text into segments for threads: at added tokens, and between them where every pattern cuts.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "tokenizer/splitter.hpp"
#include "tokenizer/vocabulary.hpp"

namespace warploom {

struct TextView {
    const uint8_t* data;
    size_t size;     // in bytes, or in characters that are `width` bytes each
    int width = 0;   // 1, 2 or 4 where the text is as CPython holds it; 0 where it is UTF-8
};

// A string that is one token wherever it stands; it may take the white space before or behind it along.
struct AddedToken {
    std::string text;
    TokenId id;
    bool lstrip = false, rstrip = false;
};

// Added tokens that may occur in a text, and where they do: a trie, so that thousands cost no more than one.
class Specials {
public:
    explicit Specials(std::vector<AddedToken> tokens);

    struct Found {
        size_t begin, end;  // with the white space that is taken along; begin == end if there is none
        TokenId id;
        size_t from, next;  // where the token itself stands: what it is looked for behind `next`
    };
    // The leftmost token from `from` on, the longest where several begin. White space before `done` is not taken along.
    Found next(TextView text, size_t from, size_t done) const;

    size_t longest() const { return longest_; }

private:
    struct Node {
        uint32_t child = 0, sibling = 0, token = 0;  // `token`: one more than a place in `tokens_`, 0 for none
        uint8_t byte = 0;
    };
    uint32_t child_of(uint32_t node, uint8_t byte) const;
    Found found(TextView text, size_t from, size_t next, size_t done, const AddedToken& token) const;

    std::vector<AddedToken> tokens_;
    std::vector<Node> nodes_{1};
    uint32_t first_[256] = {};       // the node of each first byte, 0 where no token begins with it
    uint64_t pairs_[1 << 10] = {};   // a bit for each pair of bytes, the first the lower, with which a token may begin
    int only_first_ = -1;            // the byte that all of them begin with, if they do
    size_t longest_ = 1;
};

// Context before a stretch of text.
enum class Follows : uint8_t { kStart, kAdded, kText };

// A stretch of ordinary text; an added token if begin == limit; an empty text if there is no text.
struct Segment {
    const uint8_t* text;
    uint64_t begin, limit, size;
    TokenId special;
    bool ends_text;
    int width = 0;  // as in TextView
    Follows follows = Follows::kText;
};

constexpr size_t kWideSegment = 1 << 18;  // characters: segments that are no UTF-8 yet are smaller

// Cuts a text at its added tokens (which only UTF-8 may have), and where it may be cut into pieces of about `segment_size`.
void cut_segments(TextView text, const Specials* specials, Pattern pattern, Follows follows, size_t segment_size,
                  std::vector<Segment>& segments);

// Up to where a text that goes on may be treated as if it ended there, 0 if more of it must be seen; and what the rest
// follows.
struct StreamCut {
    uint64_t at;
    Follows follows;
};
StreamCut stream_cut(TextView text, const Specials* specials, Pattern pattern);

}  // namespace warploom
