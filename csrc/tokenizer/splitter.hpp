// Pretokenizer: text to piece boundaries, many at a time.
//
// 64 bytes are classified at once into bit masks, and a few shifts and ands give the places where a piece begins
// (split_blocks.hpp). Where the masks cannot tell, the scanners of scanner.hpp go character by character. The block code
// exists once per instruction set; which one runs is decided at run time (simd_dispatch.hpp).
#pragma once

#include <cstddef>
#include <cstdint>

#include "tokenizer/scanner.hpp"

namespace warploom {

// Where splitting stands: pieces that begin at `position` and later are still to come.
struct Split {
    const uint8_t* text;
    uint64_t position;  // begin of the next piece
    uint64_t limit;     // no piece that begins here or later is wanted (a place where the pattern surely cuts)
    uint64_t size;      // the text may be looked at up to here
};

constexpr size_t kSplitMargin = 128;  // `ends` needs this much room beyond `capacity`

// Writes the ends of the next pieces, at least `capacity` of them if there are so many, relative to the position where
// this call began, and moves the position behind them. Returns their number; 0 when all is split.
// One call covers less than 4 GiB: at a piece so long it throws std::length_error.
size_t split_next(Pattern pattern, Split& split, uint32_t* ends, size_t capacity);

// The instruction sets the block code was built for and this machine has, best first: "avx512", "avx2", "portable".
const char* instruction_set();
void use_instruction_set(const char* name);  // for tests; throws std::invalid_argument if it is not available

// The last position up to `limit` (below `size`) where every named pattern cuts, whatever stands before or after; or
// `begin` if there is none. A letter or digit ends a piece before any space or sign, except before an apostrophe
// (a contraction may begin) and a mark (a word may go on).
// Where only spaces cut, it must be one.
uint64_t safe_cut(const uint8_t* text, Pattern pattern, uint64_t begin, uint64_t limit, uint64_t size);

}  // namespace warploom
