#include "batched_ce/batched_ce.h"
#include "common/cuda.cuh"
#include "common/delta_loss.cuh"

namespace clado {
namespace {

constexpr int kRowsPerBlock = 4 * kRowWarps;

__device__ double increase_of(const WarpMoments& m, bool sound, int64_t y, double d_y) {
  if (!sound) return nan("");
  return y < 0 ? m.kl() : m.log1p_tr + (m.mean - d_y);
}

// float64: one warp per perturbation and sample.
__global__ void double_kernel(const double* logits, const double* delta, const int64_t* target, double* increase, int64_t rows,
                              int64_t samples, int64_t classes) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kRowWarps + threadIdx.y;
  if (row >= rows) return;
  const int64_t n = row % samples, y = target ? target[n] : -1;
  const double* z = logits + n * classes;
  const double* d = delta + row * classes;
  const double log_norm = warp_log_sum_exp(z, classes);
  const WarpMoments m = warp_moments(z, d, classes, log_norm);
  const bool inside = !target || (y >= 0 && y < classes);
  if (threadIdx.x == 0) increase[row] = increase_of(m, isfinite(log_norm) && inside, y, inside && target ? d[y] : 0.0);
}

// float32: one block per sample and kRowsPerBlock perturbations, a warp at a time; every change is read from memory once and
// from the cache a second time.
template <int N, bool Kept>
__global__ void float_kernel(const float* __restrict__ logits, const float* __restrict__ delta, const int64_t* target,
                             double* increase, int64_t perturbations, int64_t samples, int64_t classes) {
  __shared__ __align__(16) float kept[kKept];
  const int64_t n = blockIdx.x % samples, first = blockIdx.x / samples * kRowsPerBlock;
  CleanRow clean;
  clean.read(logits + n * classes, classes, kept);
  const int64_t y = target ? target[n] : -1, last = first + kRowsPerBlock;
  const bool inside = !target || (y >= 0 && y < classes);
  for (int64_t v = first + threadIdx.y; v < last && v < perturbations; v += kRowWarps) {
    const int64_t row = v * samples + n;
    const float* d = delta + row * classes;
    const WarpMoments m = clean.sound() ? warp_moments<N, Kept>(clean, d) : WarpMoments{};
    if (threadIdx.x == 0)
      increase[row] = increase_of(m, clean.sound() && inside, y, inside && target ? static_cast<double>(d[y]) : 0.0);
  }
}

}  // namespace

void batched_ce_cuda(const LogitChanges& changes, const int64_t* target, double* increase, int device, void* stream) {
  const int64_t perturbations = changes.perturbations, samples = changes.samples, classes = changes.classes;
  const int64_t rows = perturbations * samples;
  if (rows == 0) return;
  const DeviceGuard guard(device);
  const auto queue = static_cast<cudaStream_t>(stream);
  const dim3 warps(32, kRowWarps);
  if (changes.is_double) {
    const auto *z = static_cast<const double*>(changes.logits), *d = static_cast<const double*>(changes.delta);
    const auto blocks = static_cast<unsigned>(ceil_div(rows, kRowWarps));
    double_kernel<<<blocks, warps, 0, queue>>>(z, d, target, increase, rows, samples, classes);
  } else {
    const auto *z = static_cast<const float*>(changes.logits), *d = static_cast<const float*>(changes.delta);
    const auto blocks = static_cast<unsigned>(samples * ceil_div(perturbations, kRowsPerBlock));
    with_packs(z, d, classes, [&](auto n, auto kept) {
      float_kernel<decltype(n)::value, decltype(kept)::value><<<blocks, warps, 0, queue>>>(z, d, target, increase, perturbations,
                                                                                           samples, classes);
    });
  }
  check_launch("batched_ce");
}

}  // namespace clado
