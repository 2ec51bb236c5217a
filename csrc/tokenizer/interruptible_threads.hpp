// Interruptible parallel work: threads that stop on Ctrl-C or an exception.
//
// The calling thread works too, since a thread that only waits costs as much to wake as one that works; and it alone may
// ask Python whether Ctrl-C was pressed. Threads live for one call, so nothing of this survives into a forked child.
#pragma once

#include <functional>

namespace warploom {

// Called now and then within long work; throws to stop it.
using Checkpoint = std::function<void()>;

// Calls work(pause) on several threads, on fewer if the system has no more. Work calls `pause` now and then. On the calling
// thread that calls `checkpoint` every 50 ms. Where it or any work throws, the pauses of all others end their work.
void in_parallel(unsigned threads, const Checkpoint& checkpoint, const std::function<void(const Checkpoint& pause)>& work);

}  // namespace warploom
