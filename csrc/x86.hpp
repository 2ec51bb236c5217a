// The intrinsics of x86 and, where there are any, WARPLOOM_X86.
#pragma once

#if defined(__x86_64__) && defined(__GNUC__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12's own headers
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>
#define WARPLOOM_X86 1
#endif
