#include <algorithm>

#include "common/cuda.cuh"
#include "common/delta_loss.cuh"
#include "common/pairs.cuh"
#include "pairwise_ce/pairwise_ce.h"

namespace clado {
namespace {

constexpr int kRowsPerBlock = 4 * kRowWarps;  // perturbations of one row that a block makes rows of
constexpr int64_t kRowBytes = 256 << 20;

// How the work is cut: rows whose u are in memory together, either those of whole samples or some of one sample; a sample, or a
// group of samples of one row, in parts that run side by side.
struct Cut {
  int64_t together, span, parts;  // span: rows that the parts share
  Cut(const Pairs& pairs, int64_t per_sample) {
    const Sides sides(pairs);
    const int64_t sums = per_sample == 1 ? 2 : 1, all = sides.left + (sides.symmetric ? 0 : sides.right);
    const int64_t one = std::max<int64_t>(1, all * pairs.width * (pairs.is_double ? 8 : 4));
    const int64_t fit = std::max<int64_t>(1, kPartialBytes / std::max<int64_t>(1, 8 * sums * sides.entries()));
    together = std::max<int64_t>(1, std::min(pairs.rows, kRowBytes / one));
    if (per_sample > 1 && together >= per_sample)
      together = per_sample * std::max<int64_t>(1, std::min({together / per_sample, fit, kBlocks}));
    span = per_sample == 1 ? together : std::min(together, per_sample);
    const int64_t samples = ceil_div(together, span);
    parts = std::max<int64_t>(1, std::min({span, ceil_div(kBlocks, sides.tiles() * samples), fit / samples}));
  }
  int64_t sums() const { return ceil_div(together, span) * parts; }
};

// The rows of u lie first in the workspace, on whole packs; the parts' sums behind them, then those of an unfinished sample.
int64_t row_bytes(const Cut& cut, const Pairs& pairs) {
  const int64_t all = pairs.perturbations + (pairs.symmetric() ? 0 : pairs.others);
  return ceil_div(cut.together * all * pairs.width * (pairs.is_double ? 8 : 4), 16) * 16;
}

// The changes of both sides, those of `other` behind the others.
template <class T>
struct Changes {
  const T *delta, *other;
  int64_t perturbations, all, rows, classes;
  explicit Changes(const Pairs& pairs)
      : delta(static_cast<const T*>(pairs.delta)),
        other(static_cast<const T*>(pairs.other)),
        perturbations(pairs.perturbations),
        all(pairs.perturbations + (pairs.symmetric() ? 0 : pairs.others)),
        rows(pairs.rows),
        classes(pairs.width) {}
  __device__ const T* row(int64_t v, int64_t n) const {
    return v < perturbations ? delta + (v * rows + n) * classes : other + ((v - perturbations) * rows + n) * classes;
  }
};

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

// Rows of weight 0 are left out.
// float64: one warp per row and perturbation.
template <int, bool>
__global__ void rows_kernel(const double* logits, const double* weight, Changes<double> changes, double* rows, int64_t first,
                            int64_t count) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kRowWarps + threadIdx.y, classes = changes.classes;
  if (index >= count * changes.all) return;
  const int64_t n = first + index / changes.all;
  if (weight && weight[n] == 0.0) return;
  const double *z = logits + n * classes, *d = changes.row(index % changes.all, n);
  const double log_norm = warp_log_sum_exp(z, classes);
  write_row(z, d, rows + index * classes, classes, log_norm, warp_moments(z, d, classes, log_norm).log_mean_exp());
}

// float32: one block per row and kRowsPerBlock perturbations, a warp at a time.
template <int N, bool Kept>
__global__ void rows_kernel(const float* __restrict__ logits, const double* weight, Changes<float> changes,
                            float* __restrict__ rows, int64_t first, int64_t count) {
  const int64_t classes = changes.classes;
  __shared__ __align__(16) float kept[kKept];
  __shared__ __align__(16) float roots[kKept];
  const int64_t sample = blockIdx.x % count, n = first + sample, begin = blockIdx.x / count * kRowsPerBlock;
  if (weight && weight[n] == 0.0) return;
  const float* z = logits + n * classes;
  CleanRow clean;
  clean.read(z, classes, kept);
  const float scale = static_cast<float>(1.0 / sqrt(clean.norm));
  const auto root_of = [&](float logit) { return scale * expf(0.5f * (logit - clean.top)); };
  for (int64_t c = threadIdx.y * 32 + threadIdx.x; c < classes && c < kKept; c += 32 * kRowWarps) roots[c] = root_of(z[c]);
  __syncthreads();
  for (int64_t v = begin + threadIdx.y; v < begin + kRowsPerBlock && v < changes.all; v += kRowWarps) {
    const float* d = changes.row(v, n);
    float* row = rows + (sample * changes.all + v) * classes;
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

// ---- tiles of the product ----

// One thread block per tile and part of a span of rows, which it takes in order; the next slab is on its way while one is
// multiplied. `Whole`: every row is a sample, whose square is added too.
template <class T, int Rows, int N, bool Whole>
__global__ void __launch_bounds__(4096 / (4 * Rows))
    tiles_kernel(const T* rows, const double* weight, double* partial, Sides sides, int64_t classes, int64_t count, int64_t span,
                 int64_t parts) {
  constexpr int kThreads = Entries<Rows>::kThreads;
  __shared__ Slab<T> left[2], right[2];
  const Entries<Rows> own(sides, blockIdx.x);
  const int64_t start_row = blockIdx.y / parts * span, piece = blockIdx.y % parts, rest = count - start_row;
  const int64_t size = rest < span ? rest : span, begin = start_row + size * piece / parts;
  const int64_t end = start_row + size * (piece + 1) / parts, second = sides.symmetric ? 0 : sides.left;
  double total[Rows][4] = {}, squares[Rows][4] = {};
  Part<T, kThreads, N> a, b;
  int now = 0;  // goes on from row to row: a slab is written again only when all have left it
  for (int64_t n = begin; n < end; ++n) {
    const double factor = weight ? weight[n] : 1.0;
    if (factor == 0.0) continue;
    const T *of_left = rows + n * (second + sides.right) * classes, *of_right = of_left + second * classes;
    T sum[Rows][4] = {};
    a.load(of_left, classes, own.top, sides.left, 0, classes);
    b.load(of_right, classes, own.start, sides.right, 0, classes);
    for (int64_t start = 0; start < classes; start += kDepth, now ^= 1) {
      a.store(left[now]);
      b.store(right[now]);
      __syncthreads();
      if (start + kDepth < classes) {
        a.load(of_left, classes, own.top, sides.left, start + kDepth, classes);
        b.load(of_right, classes, own.start, sides.right, start + kDepth, classes);
      }
      if (!own.busy) continue;
      T part[Rows][4] = {};  // one chain over thousands of classes would lose a digit
      add_product(left[now], right[now], own, part);
#pragma unroll
      for (int i = 0; i < Rows; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) sum[i][j] += part[i][j];
    }
    if (!own.busy) continue;
#pragma unroll
    for (int i = 0; i < Rows; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const double entry = factor * static_cast<double>(log1p_floored(sum[i][j]));
        total[i][j] += entry;
        if constexpr (Whole) squares[i][j] = __fma_rn(entry, entry, squares[i][j]);
      }
  }
  double* out = partial + static_cast<int64_t>(blockIdx.y) * (Whole ? 2 : 1) * sides.left * sides.right;
  own.store(sides, total, out);
  if constexpr (Whole) own.store(sides, squares, out + sides.left * sides.right);
}

// Adds the parts of samples of one row in order to both triangles.
__global__ void add_parts_kernel(const double* partial, double* total, double* squares, Sides sides, int64_t parts, bool first) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x, size = sides.left * sides.right;
  if (index >= size) return;
  const int64_t v = index / sides.right, w = index % sides.right, upper = sides.symmetric && v > w ? w * sides.right + v : index;
  double a = first ? 0.0 : total[index], b = first ? 0.0 : squares[index];
  for (int64_t s = 0; s < parts; ++s) {
    a += partial[2 * s * size + upper];
    b += partial[(2 * s + 1) * size + upper];
  }
  total[index] = a;
  squares[index] = b;
}

// `N` classes are read at a time, `Kept` as for CleanRow.
template <int N, bool Kept, class T>
void launch(const Pairs& pairs, const LogitRows& given, double* total, double* squares, void* workspace, cudaStream_t queue) {
  const auto* logits = static_cast<const T*>(given.logits);
  const Changes<T> changes(pairs);
  const Sides sides(pairs);
  constexpr bool kFloat = sizeof(T) == sizeof(float);
  constexpr int kRows = kFloat ? 8 : 4;
  const Cut cut(pairs, given.per_sample);
  auto* rows = static_cast<T*>(workspace);
  auto* partial = reinterpret_cast<double*>(static_cast<char*>(workspace) + row_bytes(cut, pairs));
  auto* running = partial + cut.sums() * sides.entries();
  const auto entries = static_cast<unsigned>(ceil_div(sides.entries(), 256));
  for (int64_t first = 0; first < pairs.rows;) {
    // Some rows of one sample end with it at the latest.
    const int64_t left_of_sample = given.per_sample - first % given.per_sample;
    const int64_t count = std::min({cut.together, pairs.rows - first, cut.span < given.per_sample ? left_of_sample : pairs.rows});
    const int64_t blocks = kFloat ? count * ceil_div(changes.all, kRowsPerBlock) : ceil_div(count * changes.all, kRowWarps);
    rows_kernel<N, Kept><<<static_cast<unsigned>(blocks), dim3(32, kRowWarps), 0, queue>>>(logits, given.weight, changes, rows, first,
                                                                                         count);
    check_launch("pairwise_ce");
    const double* weight = given.weight ? given.weight + first : nullptr;
    const int64_t samples = ceil_div(count, cut.span);
    const dim3 grid(static_cast<unsigned>(sides.tiles()), static_cast<unsigned>(samples * cut.parts));
    if (given.per_sample == 1) {
      tiles_kernel<T, kRows, N, true><<<grid, Entries<kRows>::kThreads, 0, queue>>>(rows, weight, partial, sides, pairs.width, count,
                                                                                    cut.span, cut.parts);
      check_launch("pairwise_ce");
      add_parts_kernel<<<entries, 256, 0, queue>>>(partial, total, squares, sides, cut.parts, first == 0);
    } else {
      tiles_kernel<T, kRows, N, false><<<grid, Entries<kRows>::kThreads, 0, queue>>>(rows, weight, partial, sides, pairs.width,
                                                                                     count, cut.span, cut.parts);
      check_launch("pairwise_ce");
      const SampleSums sums{total, squares, running, 1.0};
      add_samples_kernel<<<entries, 256, 0, queue>>>(partial, sums, sides, samples, cut.parts, first == 0,
                                                     first % given.per_sample != 0, (first + count) % given.per_sample != 0);
    }
    check_launch("pairwise_ce");
    first += count;
  }
}

}  // namespace

int64_t pairwise_ce_workspace(const Pairs& pairs, int64_t per_sample) {
  const Cut cut(pairs, per_sample);
  const int64_t sums = cut.sums() * (per_sample == 1 ? 2 : 1) + (cut.span < per_sample ? 1 : 0);
  return row_bytes(cut, pairs) + 8 * sums * Sides(pairs).entries();
}

void pairwise_ce_cuda(const Pairs& pairs, const LogitRows& rows, double* total, double* squares, void* workspace, int device,
                      void* stream) {
  const DeviceGuard guard(device);
  const auto queue = static_cast<cudaStream_t>(stream);
  if (pairs.perturbations == 0 || pairs.others == 0) return;
  if (pairs.rows == 0) return clear_sums("pairwise_ce", pairs, total, squares, queue);
  if (pairs.is_double) return launch<1, false, double>(pairs, rows, total, squares, workspace, queue);
  const auto *z = static_cast<const float*>(rows.logits), *d = static_cast<const float*>(pairs.delta);
  const auto* other = static_cast<const float*>(pairs.other);
  with_packs(z, is_aligned(other, 16) ? d : other, pairs.width, [&](auto n, auto kept) {
    launch<decltype(n)::value, decltype(kept)::value, float>(pairs, rows, total, squares, workspace, queue);
  });
}

}  // namespace clado
