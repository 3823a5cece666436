#include "batched_ce/batched_ce.h"
#include "common/cuda.cuh"
#include "common/delta_loss.cuh"

namespace clado {
namespace {

constexpr int kWarps = 8;

// One warp per perturbation and sample.
template <class T>
__global__ void batched_ce_kernel(const T* logits, const T* delta, const int64_t* target, double* increase, int64_t rows,
                                  int64_t samples, int64_t classes) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.y;
  if (row >= rows) return;
  const int64_t n = row % samples;
  const T* z = logits + n * classes;
  const T* d = delta + row * classes;
  const double log_norm = warp_log_sum_exp(z, classes);
  const WarpMoments m = warp_moments(z, d, classes, log_norm);
  if (threadIdx.x != 0) return;
  double out = m.kl();
  if (target) {
    const int64_t y = target[n];
    out = y >= 0 && y < classes ? m.log1p_tr + (m.mean - static_cast<double>(d[y])) : nan("");
  }
  increase[row] = isfinite(log_norm) ? out : nan("");
}

template <class T>
void launch(const void* logits, const void* delta, const int64_t* target, double* increase, int64_t rows, int64_t samples,
            int64_t classes, void* stream) {
  batched_ce_kernel<T><<<static_cast<unsigned>(ceil_div(rows, kWarps)), dim3(32, kWarps), 0, static_cast<cudaStream_t>(stream)>>>(
      static_cast<const T*>(logits), static_cast<const T*>(delta), target, increase, rows, samples, classes);
  check_launch("batched_ce");
}

}  // namespace

void batched_ce_cuda(const void* logits, const void* delta, const int64_t* target, double* increase, int64_t perturbations,
                     int64_t samples, int64_t classes, bool is_double, int device, void* stream) {
  const int64_t rows = perturbations * samples;
  if (rows == 0) return;
  const DeviceGuard guard(device);
  if (is_double)
    launch<double>(logits, delta, target, increase, rows, samples, classes, stream);
  else
    launch<float>(logits, delta, target, increase, rows, samples, classes, stream);
}

}  // namespace clado
