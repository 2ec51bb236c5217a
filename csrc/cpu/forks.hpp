// Fork handlers: a forked child has none of its parent's threads, and locks in whatever state they were.
#pragma once
#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

namespace warploom {

inline void in_forked_children(void (*forget)()) {
#if defined(__unix__) || defined(__APPLE__)
    pthread_atfork(nullptr, nullptr, forget);
#else
    (void)forget;  // nothing forks
#endif
}

}  // namespace warploom
