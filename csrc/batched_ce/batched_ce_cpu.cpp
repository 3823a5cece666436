#include "batched_ce/batched_ce.h"

#include "common/delta_loss.h"
#include "common/parallel.h"

namespace clado {
namespace {

// Perturbations of one sample that a work item takes: enough to share the softmax, few enough to share the threads.
constexpr int64_t kShare = 32;

template <class T>
void run(const LogitChanges& changes, const int64_t* target, double* increase, int threads) {
  const auto *logits = static_cast<const T*>(changes.logits), *delta = static_cast<const T*>(changes.delta);
  const int64_t perturbations = changes.perturbations, samples = changes.samples, classes = changes.classes;
  const int64_t shares = (perturbations + kShare - 1) / kShare;
  parallel_for(samples * shares, threads_for(perturbations * samples * classes, threads), [&](int64_t index) {
    const int64_t n = index / shares, first = index % shares * kShare;
    const CleanRow<T> clean(logits + n * classes, classes);
    for (int64_t v = first; v < perturbations && v < first + kShare; ++v) {
      const T* d = delta + (v * samples + n) * classes;
      const DeltaMoments m = moments(clean, d, v + 1 < perturbations ? d + samples * classes : d);
      increase[v * samples + n] = target ? m.log1p_tr + (m.mean - static_cast<double>(d[target[n]])) : m.kl();
    }
  });
}

}  // namespace

bool batched_ce_cpu(const LogitChanges& changes, const int64_t* target, double* increase, int threads) {
  if (target)
    for (int64_t n = 0; n < changes.samples; ++n)
      if (target[n] < 0 || target[n] >= changes.classes) return false;
  changes.is_double ? run<double>(changes, target, increase, threads) : run<float>(changes, target, increase, threads);
  return true;
}

}  // namespace clado
