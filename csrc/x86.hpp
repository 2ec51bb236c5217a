// The intrinsics of x86 and, where there are any, WARPLOOM_X86.
#pragma once

#if defined(__x86_64__) && defined(__GNUC__)
#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12's own headers
#endif
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>
#define WARPLOOM_X86 1
#endif
