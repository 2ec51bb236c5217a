#include "tokenizer/word_key.hpp"

#include <random>

namespace warploom {

namespace {
uint64_t odd_number(std::random_device& device) { return static_cast<uint64_t>(device()) << 32 | device() | 1; }
HashSecrets draw() {
    std::random_device device;
    return {odd_number(device), odd_number(device)};
}
}  // namespace

const HashSecrets hash_secrets = draw();

}  // namespace warploom
