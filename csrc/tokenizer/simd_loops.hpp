// The loops of one instruction set. Included by each file that compiles for one, inside a namespace of its own, after
// `classify`, `emit` and the like are defined there.
//
// Functions here are static, and templates they call are instantiated elsewhere (extern template): a copy of a shared
// inline function, compiled for this file's instructions, must not be the one that the linker keeps for everybody.
#include "tokenizer/split_blocks.hpp"

#include "tokenizer/look_up.hpp"
#include "tokenizer/to_utf8.hpp"

static const Kernels* kernels_named(const char* name) {
    static const Kernels all = {name,
                                {split_blocks<Pattern::kGpt2>, split_blocks<Pattern::kDigits>, split_blocks<Pattern::kGpt4>,
                                 split_blocks<Pattern::kQwen2>, split_blocks<Pattern::kQwen35>, split_blocks<Pattern::kO200k>,
                                 split_blocks<Pattern::kTekken>, split_blocks<Pattern::kSpaces>,
                                 split_pieces<Pattern::kDeepSeek>, split_pieces<Pattern::kFalcon>},
                                look_up<uint16_t>,
                                look_up<uint32_t>,
                                merge_x16,
                                to_utf8<uint8_t>,
                                to_utf8<uint16_t>,
                                to_utf8<uint32_t>};
    return &all;
}
