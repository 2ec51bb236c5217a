// Allocator of packed weights: matrix after matrix in runs of huge pages.
//
// Decoding reads all weights once a token. Pages of 4 KiB cost a TLB miss every 64 cache lines; with pages of 2 MiB products
// of one row took a fifth less time. A model's matrices are often smaller than such a page, so they share runs; a run is given
// back with the last matrix in it.
#pragma once
#include <cstddef>
#include <cstdint>
#include <memory>

namespace warploom {

// Zeroed memory, aligned to a cache line.
std::shared_ptr<uint8_t> weight_memory(size_t bytes);

}  // namespace warploom
