// OpenMP loop over independent work items; the thread count comes from the caller (torch's) and never changes a result.
#pragma once

#include <omp.h>

#include <cstdint>
#include <exception>

namespace clado {

// Threads worth waking for `work` element operations: a thread for every 32 Ki of them, as torch has it. Small inputs stay on the
// caller's thread, where no other can keep them waiting.
inline int threads_for(int64_t work, int threads) {
  const int64_t useful = 1 + work / (1 << 15);
  return useful < threads ? static_cast<int>(useful) : threads;
}

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

// fn(i, thread) for i in [0, n), for items of unequal work: whichever of up to `threads` threads is free takes the next one. What
// fn throws (it may allocate) is thrown here, after all have come to an end.
template <class Fn>
void parallel_uneven(int64_t n, int threads, Fn fn) {
  if (threads > n) threads = static_cast<int>(n);
  if (threads <= 1) {
    for (int64_t i = 0; i < n; ++i) fn(i, 0);
    return;
  }
  std::exception_ptr thrown;
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
  for (int64_t i = 0; i < n; ++i) {
    try {
      fn(i, omp_get_thread_num());
    } catch (...) {
#pragma omp critical
      thrown = std::current_exception();
    }
  }
  if (thrown) std::rethrow_exception(thrown);
}

}  // namespace clado
