// Memory of packed weights: matrix after matrix in runs of huge pages.
//
// Decoding walks all weights once a token. In pages of 4 KiB that is an address to look up every 64 cache lines; in pages of 2 MiB
// products of one row took a fifth less. A model's matrices are often smaller than such a page, so they share runs; a run is given
// back with the last matrix in it.
#pragma once
#include <cstddef>
#include <cstdint>
#include <memory>

namespace warploom {

// So many zeros that begin with a cache line.
std::shared_ptr<uint8_t> weight_memory(size_t bytes);

}  // namespace warploom
