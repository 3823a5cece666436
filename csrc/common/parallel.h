// OpenMP loop over independent work items; the thread count comes from the caller (torch's) and never changes a result.
#pragma once

#include <omp.h>

#include <cstdint>

namespace clado {

// fn(i) for i in [0, n), on up to `threads` threads, never more threads than items. fn must not throw.
template <class Fn>
void parallel_for(int64_t n, int threads, Fn fn) {
  if (threads > n) threads = static_cast<int>(n);
  if (threads <= 1) {
    for (int64_t i = 0; i < n; ++i) fn(i);
    return;
  }
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t i = 0; i < n; ++i) fn(i);
}

}  // namespace clado
