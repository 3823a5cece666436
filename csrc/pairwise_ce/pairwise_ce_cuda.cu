#include <algorithm>

#include "common/cuda.cuh"
#include "common/delta_loss.cuh"
#include "pairwise_ce/pairwise_ce.h"

namespace clado {
namespace {

constexpr int kTile = 64;   // perturbations per side of a tile
constexpr int kDepth = 16;  // classes in shared memory at once
constexpr int kRowsPerBlock = 4 * kRowWarps;  // perturbations of one sample that a block makes rows of
constexpr int64_t kRowBytes = 256 << 20, kPartialBytes = 64 << 20;
constexpr int64_t kBlocks = 2048;  // of threads, enough to fill any GPU of today several times

// How the work is cut: samples whose rows are in memory together, and slices of them that run side by side.
struct Cut {
  int64_t together, tiles, slices;
  Cut(int64_t perturbations, int64_t samples, int64_t classes, int64_t element) {
    const int64_t one = std::max<int64_t>(1, perturbations * classes * element), side = ceil_div(perturbations, kTile);
    together = std::max<int64_t>(1, std::min(samples, kRowBytes / one));
    tiles = std::max<int64_t>(1, side * (side + 1) / 2);
    const int64_t fit = kPartialBytes / std::max<int64_t>(1, 16 * perturbations * perturbations);
    slices = std::max<int64_t>(1, std::min({together, ceil_div(kBlocks, tiles), fit}));
  }
};

// The rows lie first in the workspace, on whole packs; the slices' sums behind them.
int64_t row_bytes(const Cut& cut, int64_t perturbations, int64_t classes, int64_t element) {
  return ceil_div(cut.together * perturbations * classes * element, 16) * 16;
}

// ---- rows: row[c] = sqrt(p) * expm1(d - log E_p[e^d]) ----

// By one warp in double: rows of float64, and float32 ones that reach far.
template <class T>
__device__ void write_row(const T* z, const T* d, T* row, int64_t classes, double log_norm, double shift) {
  const bool fine = isfinite(log_norm) && isfinite(shift);
  for (int64_t c = threadIdx.x; c < classes; c += 32) {
    const double half = 0.5 * (static_cast<double>(z[c]) - log_norm), x = static_cast<double>(d[c]) - shift;
    const double value = half == -INFINITY ? 0.0 : x > 30.0 ? exp(half + x) : exp(half) * expm1(x);
    row[c] = fine ? static_cast<T>(value) : static_cast<T>(nan(""));
  }
}

// float64: one warp per sample and perturbation.
template <int, bool>
__global__ void rows_kernel(const double* logits, const double* delta, double* rows, int64_t first, int64_t count,
                            int64_t perturbations, int64_t samples, int64_t classes) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kRowWarps + threadIdx.y;
  if (index >= count * perturbations) return;
  const int64_t n = first + index / perturbations, v = index % perturbations;
  const double *z = logits + n * classes, *d = delta + (v * samples + n) * classes;
  const double log_norm = warp_log_sum_exp(z, classes);
  write_row(z, d, rows + index * classes, classes, log_norm, warp_moments(z, d, classes, log_norm).log_mean_exp());
}

// float32: one block per sample and kRowsPerBlock perturbations, a warp at a time.
template <int N, bool Kept>
__global__ void rows_kernel(const float* __restrict__ logits, const float* __restrict__ delta, float* __restrict__ rows,
                            int64_t first, int64_t count, int64_t perturbations, int64_t samples, int64_t classes) {
  __shared__ __align__(16) float kept[kKept];
  __shared__ __align__(16) float roots[kKept];
  const int64_t sample = blockIdx.x % count, n = first + sample, begin = blockIdx.x / count * kRowsPerBlock;
  const float* z = logits + n * classes;
  CleanRow clean;
  clean.read(z, classes, kept);
  const float scale = static_cast<float>(1.0 / sqrt(clean.norm));
  const auto root_of = [&](float logit) { return scale * expf(0.5f * (logit - clean.top)); };
  for (int64_t c = threadIdx.y * 32 + threadIdx.x; c < classes && c < kKept; c += 32 * kRowWarps) roots[c] = root_of(z[c]);
  __syncthreads();
  for (int64_t v = begin + threadIdx.y; v < begin + kRowsPerBlock && v < perturbations; v += kRowWarps) {
    const float* d = delta + (v * samples + n) * classes;
    float* row = rows + (sample * perturbations + v) * classes;
    const WarpMoments m = clean.sound() ? warp_moments<N, Kept>(clean, d) : WarpMoments{};
    const double shift = m.log_mean_exp();
    if (!clean.sound() || !isfinite(shift) || m.far) {
      write_row(z, d, row, classes, clean.log_norm, shift);
      continue;
    }
    const float high = static_cast<float>(shift), low = static_cast<float>(shift - static_cast<double>(high));
    by_range(m.reach + fabsf(high) + fabsf(low), [&](auto range) {
#pragma unroll 2
      for (int64_t c = threadIdx.x * N; c < classes; c += 32 * N) {
        Pack<float, N> root, x = load_pack<float, N>(d + c);
        if (Kept || c < kKept) {
          root = load_pack<float, N>(roots + c);
        } else {
          root = load_pack<float, N>(z + c);
#pragma unroll
          for (int k = 0; k < N; ++k) root.at[k] = root_of(root.at[k]);
        }
#pragma unroll
        for (int k = 0; k < N; ++k) {
          const float u = expm1_in<decltype(range)::value>((x.at[k] - high) - low);
          x.at[k] = root.at[k] > 0.0f ? root.at[k] * u : 0.0f;
        }
        *reinterpret_cast<Pack<float, N>*>(row + c) = x;
      }
    });
  }
}

// ---- tiles of the symmetric product ----

__device__ inline float multiply_add(float a, float b, float c) { return __fmaf_rn(a, b, c); }
__device__ inline double multiply_add(double a, double b, double c) { return __fma_rn(a, b, c); }
__device__ inline float log1p_of(float x) { return log1pf(x); }
__device__ inline double log1p_of(double x) { return log1p(x); }

// kDepth classes of 64 rows, class by class. Row v of class c lies at v ^ (c / 4 * 8): the four lanes that bring classes 0, 4, 8, 12
// of a row and the eight rows of a warp then write to different banks.
template <class T>
struct Slab {
  T at[kDepth][kTile];
  __device__ static int place(int c, int v) { return v ^ (c / 4 * 8); }
};

// What a thread brings from memory for the next slab: four classes of every kThreads / 4-th row.
template <class T, int Threads, int N>
struct Part {
  static constexpr int kRows = kTile / (Threads / 4);
  T at[kRows][4];

  __device__ void load(const T* sample, int64_t row, int64_t start, int64_t perturbations, int64_t classes) {
    const int64_t c = start + threadIdx.x % 4 * 4;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int64_t v = row + threadIdx.x / 4 + i * (Threads / 4);
      const T* from = sample + v * classes + c;
#pragma unroll
      for (int k = 0; k < 4; k += N) {
        Pack<T, N> x{};
        if (v < perturbations && c + k < classes) x = load_pack<T, N>(from + k);
#pragma unroll
        for (int j = 0; j < N; ++j) at[i][k + j] = x.at[j];
      }
    }
  }
  __device__ void store(Slab<T>& slab) const {
    const int c = threadIdx.x % 4 * 4;
#pragma unroll
    for (int i = 0; i < kRows; ++i)
#pragma unroll
      for (int k = 0; k < 4; ++k) slab.at[c + k][Slab<T>::place(c, threadIdx.x / 4 + i * (Threads / 4))] = at[i][k];
  }
};

// One thread block per tile of the upper triangle and slice of the samples, which it takes in order. A warp owns 4 * Rows x 32
// entries, a thread Rows x 4 of them; the next slab is on its way while one is multiplied.
template <class T, int Rows, int N>
__global__ void __launch_bounds__(4096 / (4 * Rows))
    tiles_kernel(const T* rows, double* partial, int64_t count, int64_t perturbations, int64_t classes, int64_t slices) {
  constexpr int kThreads = kTile * kTile / (4 * Rows);
  __shared__ Slab<T> left[2], right[2];
  const int64_t side = (perturbations + kTile - 1) / kTile;
  int64_t row = 0, rest = blockIdx.x;
  while (rest >= side - row) rest -= side - row++;
  const int64_t top = row * kTile, start_column = (row + rest) * kTile;
  const int64_t begin = count * blockIdx.y / slices, end = count * (blockIdx.y + 1) / slices;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int y = warp / 2 * (4 * Rows) + lane / 8 * 4, x = warp % 2 * 32 + lane % 8 * 4;  // rows y + 16 i + (0..3)
  // Nothing to do below the diagonal and beyond the last perturbation.
  const int64_t first_row = top + warp / 2 * (4 * Rows), first_column = start_column + warp % 2 * 32;
  const bool busy = first_row <= first_column + 31 && first_row < perturbations && first_column < perturbations;
  const T floor = static_cast<T>(5.9604645e-8f - 1.0f);
  double total[Rows][4] = {}, squares[Rows][4] = {};
  Part<T, kThreads, N> a, b;
  int now = 0;  // goes on from sample to sample: a slab is written again only when all have left it
  for (int64_t n = begin; n < end; ++n) {
    const T* sample = rows + n * perturbations * classes;
    T sum[Rows][4] = {};
    a.load(sample, top, 0, perturbations, classes);
    b.load(sample, start_column, 0, perturbations, classes);
    for (int64_t start = 0; start < classes; start += kDepth, now ^= 1) {
      a.store(left[now]);
      b.store(right[now]);
      __syncthreads();
      if (start + kDepth < classes) {
        a.load(sample, top, start + kDepth, perturbations, classes);
        b.load(sample, start_column, start + kDepth, perturbations, classes);
      }
      if (!busy) continue;
      T part[Rows][4] = {};  // one chain over thousands of classes would lose a digit
#pragma unroll
      for (int c = 0; c < kDepth; ++c) {
        Pack<T, 4> p[Rows / 4], q = load_pack<T, 4>(&right[now].at[c][Slab<T>::place(c, x)]);
#pragma unroll
        for (int i = 0; i < Rows / 4; ++i) p[i] = load_pack<T, 4>(&left[now].at[c][Slab<T>::place(c, y + 16 * i)]);
#pragma unroll
        for (int i = 0; i < Rows; ++i)
#pragma unroll
          for (int j = 0; j < 4; ++j) part[i][j] = multiply_add(p[i / 4].at[i % 4], q.at[j], part[i][j]);
      }
#pragma unroll
      for (int i = 0; i < Rows; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) sum[i][j] += part[i][j];
    }
    if (!busy) continue;
#pragma unroll
    for (int i = 0; i < Rows; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const double entry = static_cast<double>(log1p_of(sum[i][j] < floor ? floor : sum[i][j]));
        total[i][j] += entry;
        squares[i][j] = __fma_rn(entry, entry, squares[i][j]);
      }
  }
  double* out = partial + static_cast<int64_t>(blockIdx.y) * 2 * perturbations * perturbations;
#pragma unroll
  for (int i = 0; i < Rows; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int64_t v = top + y + i / 4 * 16 + i % 4, w = start_column + x + j;
      if (v > w || w >= perturbations) continue;
      out[v * perturbations + w] = total[i][j];
      out[(perturbations + v) * perturbations + w] = squares[i][j];
    }
}

// Adds the slices in order to both triangles.
__global__ void add_slices_kernel(const double* partial, double* total, double* squares, int64_t perturbations, int64_t slices,
                                  bool first) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x, size = perturbations * perturbations;
  if (index >= size) return;
  const int64_t v = index / perturbations, w = index % perturbations, upper = v <= w ? index : w * perturbations + v;
  double a = first ? 0.0 : total[index], b = first ? 0.0 : squares[index];
  for (int64_t s = 0; s < slices; ++s) {
    a += partial[2 * s * size + upper];
    b += partial[(2 * s + 1) * size + upper];
  }
  total[index] = a;
  squares[index] = b;
}

// `N` classes are read at a time, `Kept` as for CleanRow.
template <int N, bool Kept, class T>
void launch(const LogitChanges& changes, double* total, double* squares, void* workspace, cudaStream_t queue) {
  const auto *logits = static_cast<const T*>(changes.logits), *delta = static_cast<const T*>(changes.delta);
  const int64_t perturbations = changes.perturbations, samples = changes.samples, classes = changes.classes;
  constexpr bool kFloat = sizeof(T) == sizeof(float);
  constexpr int kRows = kFloat ? 8 : 4, kThreads = kTile * kTile / (4 * kRows);
  const Cut cut(perturbations, samples, classes, sizeof(T));
  auto* rows = static_cast<T*>(workspace);
  auto* partial = reinterpret_cast<double*>(static_cast<char*>(workspace) + row_bytes(cut, perturbations, classes, sizeof(T)));
  for (int64_t first = 0; first < samples; first += cut.together) {
    const int64_t count = std::min(cut.together, samples - first);
    const int64_t blocks = kFloat ? count * ceil_div(perturbations, kRowsPerBlock) : ceil_div(count * perturbations, kRowWarps);
    rows_kernel<N, Kept><<<static_cast<unsigned>(blocks), dim3(32, kRowWarps), 0, queue>>>(logits, delta, rows, first, count,
                                                                                         perturbations, samples, classes);
    check_launch("pairwise_ce");
    const dim3 grid(static_cast<unsigned>(cut.tiles), static_cast<unsigned>(cut.slices));
    tiles_kernel<T, kRows, N><<<grid, kThreads, 0, queue>>>(rows, partial, count, perturbations, classes, cut.slices);
    check_launch("pairwise_ce");
    const auto entries = static_cast<unsigned>(ceil_div(perturbations * perturbations, 256));
    add_slices_kernel<<<entries, 256, 0, queue>>>(partial, total, squares, perturbations, cut.slices, first == 0);
    check_launch("pairwise_ce");
  }
}

}  // namespace

int64_t pairwise_ce_workspace(int64_t perturbations, int64_t samples, int64_t classes, bool is_double) {
  const int64_t element = is_double ? 8 : 4;
  const Cut cut(perturbations, samples, classes, element);
  return row_bytes(cut, perturbations, classes, element) + 16 * cut.slices * perturbations * perturbations;
}

void pairwise_ce_cuda(const LogitChanges& changes, double* total, double* squares, void* workspace, int device, void* stream) {
  const DeviceGuard guard(device);
  const auto queue = static_cast<cudaStream_t>(stream);
  const auto bytes = static_cast<size_t>(changes.perturbations * changes.perturbations) * sizeof(double);
  if (changes.samples == 0) {
    cuda_check(cudaMemsetAsync(total, 0, bytes, queue), "pairwise_ce");
    cuda_check(cudaMemsetAsync(squares, 0, bytes, queue), "pairwise_ce");
  } else if (changes.perturbations > 0 && changes.is_double) {
    launch<1, false, double>(changes, total, squares, workspace, queue);
  } else if (changes.perturbations > 0) {
    const auto *z = static_cast<const float*>(changes.logits), *d = static_cast<const float*>(changes.delta);
    with_packs(z, d, changes.classes, [&](auto n, auto kept) {
      launch<decltype(n)::value, decltype(kept)::value, float>(changes, total, squares, workspace, queue);
    });
  }
}

}  // namespace clado
