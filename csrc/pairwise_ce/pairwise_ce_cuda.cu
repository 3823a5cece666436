#include <algorithm>

#include "common/cuda.cuh"
#include "common/delta_loss.cuh"
#include "pairwise_ce/pairwise_ce.h"

namespace clado {
namespace {

constexpr int kWarps = 8;
constexpr int kTile = 64;      // perturbations per side of a tile
constexpr int kDepth = 16;     // classes in shared memory at once
constexpr int kPerThread = 4;  // a thread owns 4 x 4 entries of a tile, 16 x 16 threads
constexpr int64_t kRowBytes = 256 << 20;
constexpr int kMaxSlices = 32;

// How the work is cut: samples whose rows are in memory together, and slices of them that run side by side.
struct Cut {
  int64_t together, tiles;
  int slices;
  Cut(int64_t perturbations, int64_t samples, int64_t classes, int64_t element) {
    const int64_t one = std::max<int64_t>(1, perturbations * classes * element), side = ceil_div(perturbations, kTile);
    together = std::max<int64_t>(1, std::min(samples, kRowBytes / one));
    tiles = side * (side + 1) / 2;
    // About a thousand thread blocks fill any GPU of today.
    slices = static_cast<int>(std::min<int64_t>({kMaxSlices, together, std::max<int64_t>(1, 1024 / std::max<int64_t>(1, tiles))}));
  }
};

// One warp per sample and perturbation: row[c] = sqrt(p) * expm1(d - log E_p[e^d]).
template <class T>
__global__ void rows_kernel(const T* logits, const T* delta, T* rows, int64_t first, int64_t count, int64_t perturbations,
                            int64_t samples, int64_t classes) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.y;
  if (index >= count * perturbations) return;
  const int64_t n = first + index / perturbations, v = index % perturbations;
  const T* z = logits + n * classes;
  const T* d = delta + (v * samples + n) * classes;
  T* row = rows + index * classes;
  const double log_norm = warp_log_sum_exp(z, classes);
  const double shift = warp_moments(z, d, classes, log_norm).log_mean_exp();
  const bool fine = isfinite(log_norm) && isfinite(shift);
  for (int64_t c = threadIdx.x; c < classes; c += 32) {
    const double half = 0.5 * (static_cast<double>(z[c]) - log_norm), x = static_cast<double>(d[c]) - shift;
    const double value = half == -INFINITY ? 0.0 : x > 30.0 ? exp(half + x) : exp(half) * expm1(x);
    row[c] = fine ? static_cast<T>(value) : static_cast<T>(nan(""));
  }
}

__device__ inline float multiply_add(float a, float b, float c) { return __fmaf_rn(a, b, c); }
__device__ inline double multiply_add(double a, double b, double c) { return __fma_rn(a, b, c); }
__device__ inline float log1p_of(float x) { return log1pf(x); }
__device__ inline double log1p_of(double x) { return log1p(x); }

// One thread block per tile of the upper triangle and slice of the samples, which it takes in order.
template <class T>
__global__ void tiles_kernel(const T* rows, double* partial, int64_t count, int64_t perturbations, int64_t classes, int slices) {
  __shared__ T left[kDepth][kTile + 1], right[kDepth][kTile + 1];
  const int64_t side = (perturbations + kTile - 1) / kTile;
  int64_t row = 0, rest = blockIdx.x;
  while (rest >= side - row) rest -= side - row++;
  const int64_t column = row + rest;
  const int64_t begin = count * blockIdx.y / slices, end = count * (blockIdx.y + 1) / slices;
  const int x = threadIdx.x % 16, y = threadIdx.x / 16;
  const T floor = static_cast<T>(5.9604645e-8f - 1.0f);
  double total[kPerThread][kPerThread] = {}, squares[kPerThread][kPerThread] = {};
  for (int64_t n = begin; n < end; ++n) {
    const T* sample = rows + n * perturbations * classes;
    T sum[kPerThread][kPerThread] = {};
    for (int64_t start = 0; start < classes; start += kDepth) {
      for (int i = threadIdx.x; i < kDepth * kTile; i += 256) {
        const int c = i % kDepth, v = i / kDepth;
        const bool inside = start + c < classes;
        const int64_t a = row * kTile + v, b = column * kTile + v;
        left[c][v] = inside && a < perturbations ? sample[a * classes + start + c] : T(0);
        right[c][v] = inside && b < perturbations ? sample[b * classes + start + c] : T(0);
      }
      __syncthreads();
      T part[kPerThread][kPerThread] = {};  // one chain over thousands of classes would lose a digit
#pragma unroll
      for (int c = 0; c < kDepth; ++c)
#pragma unroll
        for (int i = 0; i < kPerThread; ++i)
#pragma unroll
          for (int j = 0; j < kPerThread; ++j) part[i][j] = multiply_add(left[c][y + 16 * i], right[c][x + 16 * j], part[i][j]);
#pragma unroll
      for (int i = 0; i < kPerThread; ++i)
#pragma unroll
        for (int j = 0; j < kPerThread; ++j) sum[i][j] += part[i][j];
      __syncthreads();
    }
#pragma unroll
    for (int i = 0; i < kPerThread; ++i)
#pragma unroll
      for (int j = 0; j < kPerThread; ++j) {
        const double a = static_cast<double>(log1p_of(sum[i][j] < floor ? floor : sum[i][j]));
        total[i][j] += a;
        squares[i][j] += a * a;
      }
  }
  double* out = partial + blockIdx.y * 2 * perturbations * perturbations;
  for (int i = 0; i < kPerThread; ++i)
    for (int j = 0; j < kPerThread; ++j) {
      const int64_t v = row * kTile + y + 16 * i, w = column * kTile + x + 16 * j;
      if (v > w || w >= perturbations) continue;
      out[v * perturbations + w] = total[i][j];
      out[(perturbations + v) * perturbations + w] = squares[i][j];
    }
}

// Adds the slices in order to both triangles.
__global__ void add_slices_kernel(const double* partial, double* total, double* squares, int64_t perturbations, int slices, bool first) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x, size = perturbations * perturbations;
  if (index >= size) return;
  const int64_t v = index / perturbations, w = index % perturbations, upper = v <= w ? index : w * perturbations + v;
  double a = first ? 0.0 : total[index], b = first ? 0.0 : squares[index];
  for (int s = 0; s < slices; ++s) {
    a += partial[2 * s * size + upper];
    b += partial[(2 * s + 1) * size + upper];
  }
  total[index] = a;
  squares[index] = b;
}

template <class T>
void launch(const T* logits, const T* delta, double* total, double* squares, void* workspace, int64_t perturbations, int64_t samples,
            int64_t classes, cudaStream_t queue) {
  const Cut cut(perturbations, samples, classes, sizeof(T));
  auto* partial = static_cast<double*>(workspace);
  auto* rows = reinterpret_cast<T*>(partial + 2 * cut.slices * perturbations * perturbations);
  const auto entries = static_cast<unsigned>(ceil_div(perturbations * perturbations, 256));
  for (int64_t first = 0; first < samples; first += cut.together) {
    const int64_t count = std::min(cut.together, samples - first);
    rows_kernel<<<static_cast<unsigned>(ceil_div(count * perturbations, kWarps)), dim3(32, kWarps), 0, queue>>>(
        logits, delta, rows, first, count, perturbations, samples, classes);
    check_launch("pairwise_ce");
    tiles_kernel<<<dim3(static_cast<unsigned>(cut.tiles), cut.slices), 256, 0, queue>>>(rows, partial, count, perturbations, classes,
                                                                                         cut.slices);
    check_launch("pairwise_ce");
    add_slices_kernel<<<entries, 256, 0, queue>>>(partial, total, squares, perturbations, cut.slices, first == 0);
    check_launch("pairwise_ce");
  }
}

}  // namespace

int64_t pairwise_ce_workspace(int64_t perturbations, int64_t samples, int64_t classes, bool is_double) {
  const int64_t element = is_double ? 8 : 4;
  const Cut cut(perturbations, samples, classes, element);
  return 16 * cut.slices * perturbations * perturbations + cut.together * perturbations * classes * element;
}

void pairwise_ce_cuda(const void* logits, const void* delta, double* total, double* squares, int64_t perturbations,
                      int64_t samples, int64_t classes, bool is_double, void* workspace, int device, void* stream) {
  const DeviceGuard guard(device);
  const auto queue = static_cast<cudaStream_t>(stream);
  const auto bytes = static_cast<size_t>(perturbations * perturbations) * sizeof(double);
  if (samples == 0) {
    cuda_check(cudaMemsetAsync(total, 0, bytes, queue), "pairwise_ce");
    cuda_check(cudaMemsetAsync(squares, 0, bytes, queue), "pairwise_ce");
  } else if (perturbations > 0 && is_double) {
    launch(static_cast<const double*>(logits), static_cast<const double*>(delta), total, squares, workspace, perturbations, samples,
           classes, queue);
  } else if (perturbations > 0) {
    launch(static_cast<const float*>(logits), static_cast<const float*>(delta), total, squares, workspace, perturbations, samples,
           classes, queue);
  }
}

}  // namespace clado
