// All pairs of two sets of perturbations on the GPU: a thread block makes a tile of 64 x 64 entries, from a depth of 16 elements of
// both sides in shared memory at a time. What blocks make of a sample goes to memory in float64 and is added in a fixed order.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "common/cuda.cuh"
#include "common/pairs.h"

namespace clado {

constexpr int kTile = 64;   // perturbations per side of a tile
constexpr int kDepth = 16;  // elements in shared memory at once
constexpr int64_t kPartialBytes = 64 << 20;
constexpr int64_t kBlocks = 2048;  // of threads, enough to fill any GPU of today several times

// Both sides, and their tiles: the upper triangle of them where the two are one.
struct Sides {
  int64_t left, right;
  bool symmetric;
  explicit Sides(const Pairs& pairs) : left(pairs.perturbations), right(pairs.others), symmetric(pairs.symmetric()) {}
  int64_t entries() const { return left * right; }
  int64_t tiles() const {
    const int64_t rows = ceil_div(left, kTile), columns = ceil_div(right, kTile);
    return std::max<int64_t>(1, symmetric ? rows * (rows + 1) / 2 : rows * columns);
  }
  // The first row and column of a tile.
  __device__ void at(int64_t tile, int64_t* row, int64_t* column) const {
    const int64_t columns = (right + kTile - 1) / kTile;
    int64_t r = 0;
    if (symmetric) {
      while (tile >= columns - r) tile -= columns - r++;
      tile += r;
    } else {
      r = tile / columns;
      tile -= r * columns;
    }
    *row = r * kTile;
    *column = tile * kTile;
  }
};

// The entries of a tile that a thread owns: Rows x 4 of them, rows y + 16 i + (0..3) and columns x + (0..3).
template <int Rows>
struct Entries {
  static constexpr int kThreads = kTile * kTile / (4 * Rows);
  int64_t top, start;  // of the tile
  int y, x;
  bool busy;  // a warp has nothing to do below the diagonal and beyond the last perturbation
  __device__ Entries(const Sides& sides, int64_t tile) {
    sides.at(tile, &top, &start);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    y = warp / 2 * (4 * Rows) + lane / 8 * 4;
    x = warp % 2 * 32 + lane % 8 * 4;
    const int64_t row = top + warp / 2 * (4 * Rows), column = start + warp % 2 * 32;
    busy = (!sides.symmetric || row <= column + 31) && row < sides.left && column < sides.right;
  }
  // out[v][w] = values, for the entries that are asked for.
  __device__ void store(const Sides& sides, const double (&values)[Rows][4], double* out) const {
#pragma unroll
    for (int i = 0; i < Rows; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int64_t v = top + y + i / 4 * 16 + i % 4, w = start + x + j;
        if (v < sides.left && w < sides.right && !(sides.symmetric && v > w)) out[v * sides.right + w] = values[i][j];
      }
  }
};

__device__ inline float multiply_add(float a, float b, float c) { return __fmaf_rn(a, b, c); }
__device__ inline double multiply_add(double a, double b, double c) { return __fma_rn(a, b, c); }
__device__ inline float log1p_of(float x) { return log1pf(x); }
__device__ inline double log1p_of(double x) { return log1p(x); }
// log1p of a sum that rounding may have brought to -1 or below.
template <class T>
__device__ T log1p_floored(T x) {
  const T floor = static_cast<T>(5.9604645e-8f - 1.0f);
  return log1p_of(x < floor ? floor : x);
}

// kDepth elements of 64 rows, element by element. Row v of element c lies at v ^ (c / 4 * 8): the four lanes that bring elements
// 0, 4, 8, 12 of a row and the eight rows of a warp then write to different banks.
template <class T>
struct Slab {
  T at[kDepth][kTile];
  __device__ static int place(int c, int v) { return v ^ (c / 4 * 8); }
};

// What a thread brings from memory for the next slab: four elements, `first` to first + 3, of every kThreads / 4-th row.
template <class T, int Threads, int N>
struct Part {
  static constexpr int kRows = kTile / (Threads / 4);
  T at[kRows][4];

  __device__ static int first() { return threadIdx.x % 4 * 4; }
  // Rows from `row` on, of `count`, `stride` apart, elements from `start` on, up to `end`.
  __device__ void load(const T* rows, int64_t stride, int64_t row, int64_t count, int64_t start, int64_t end) {
    const int64_t c = start + first();
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int64_t v = row + threadIdx.x / 4 + i * (Threads / 4);
      const T* from = rows + v * stride + c;
#pragma unroll
      for (int k = 0; k < 4; k += N) {
        Pack<T, N> x{};
        if (v < count && c + k < end) x = load_pack<T, N>(from + k);
#pragma unroll
        for (int j = 0; j < N; ++j) at[i][k + j] = x.at[j];
      }
    }
  }
  // With value(k, x) in place of element k of the four.
  template <class Value>
  __device__ void store(Slab<T>& slab, Value value) const {
    const int c = first();
#pragma unroll
    for (int i = 0; i < kRows; ++i)
#pragma unroll
      for (int k = 0; k < 4; ++k)
        slab.at[c + k][Slab<T>::place(c, threadIdx.x / 4 + i * (Threads / 4))] = value(k, at[i][k]);
  }
  __device__ void store(Slab<T>& slab) const {
    store(slab, [](int, T x) { return x; });
  }
};

// part[i][j] = run(c, a, b, part[i][j]) for the thread's entries, where a and b are what element c of a slab has for them.
template <class T, int Rows, class Run>
__device__ void for_entries(const Slab<T>& left, const Slab<T>& right, const Entries<Rows>& own, int c, T (&part)[Rows][4], Run run) {
  Pack<T, 4> p[Rows / 4], q = load_pack<T, 4>(&right.at[c][Slab<T>::place(c, own.x)]);
#pragma unroll
  for (int i = 0; i < Rows / 4; ++i) p[i] = load_pack<T, 4>(&left.at[c][Slab<T>::place(c, own.y + 16 * i)]);
#pragma unroll
  for (int i = 0; i < Rows; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j) part[i][j] = run(c, p[i / 4].at[i % 4], q.at[j], part[i][j]);
}
// part += the product of two slabs.
template <class T, int Rows>
__device__ void add_product(const Slab<T>& left, const Slab<T>& right, const Entries<Rows>& own, T (&part)[Rows][4]) {
#pragma unroll
  for (int c = 0; c < kDepth; ++c)
    for_entries(left, right, own, c, part, [](int, T a, T b, T sum) { return multiply_add(a, b, sum); });
}

// How samples are cut: so many together, each in parts that thread blocks make side by side; a sum of float64 per part and entry.
struct PartCut {
  int64_t samples, parts;
  // Samples of `depth` elements, not worth a block of their own below `least`.
  PartCut(const Sides& sides, int64_t all, int64_t depth, int64_t least) {
    const int64_t fit = std::max<int64_t>(1, kPartialBytes / std::max<int64_t>(1, 8 * sides.entries()));
    samples = std::max<int64_t>(1, std::min({all, fit, kBlocks}));
    parts = std::min({ceil_div(kBlocks, sides.tiles() * samples), ceil_div(depth, least), fit / samples});
    parts = std::max<int64_t>(1, parts);
  }
};

// Adds what the parts of some samples came to: a = scale * (running + parts in order), total += a, squares += a^2, in both
// triangles. The last sample of an unfinished group stays in `running`, from which the next group goes on.
struct SampleSums {
  double *total, *squares, *running;
  double scale;
};
static __global__ void add_samples_kernel(const double* partial, SampleSums sums, Sides sides, int64_t samples, int64_t parts,
                                          bool first, bool goes_on, bool unfinished) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x, size = sides.left * sides.right;
  if (index >= size) return;
  const int64_t v = index / sides.right, w = index % sides.right, upper = sides.symmetric && v > w ? w * sides.right + v : index;
  double total = first ? 0.0 : sums.total[index], squares = first ? 0.0 : sums.squares[index];
  double a = goes_on ? sums.running[index] : 0.0;
  for (int64_t n = 0; n < samples; ++n) {
    for (int64_t k = 0; k < parts; ++k) a += partial[(n * parts + k) * size + upper];
    if (unfinished) break;
    const double value = sums.scale * a;
    total += value;
    squares += value * value;
    a = 0.0;
  }
  if (unfinished) sums.running[index] = a;
  sums.total[index] = total;
  sums.squares[index] = squares;
}

// The sums over no rows.
inline void clear_sums(const char* op, const Pairs& pairs, double* total, double* squares, cudaStream_t queue) {
  const auto bytes = static_cast<size_t>(pairs.perturbations * pairs.others) * sizeof(double);
  cuda_check(cudaMemsetAsync(total, 0, bytes, queue), op);
  cuda_check(cudaMemsetAsync(squares, 0, bytes, queue), op);
}

// ---- sums over the elements of a sample: no rows have to be made first ----

constexpr int kSlabs = 8;  // whose products meet in T before they are added in double

// One thread block per tile and part of a sample. `Work` has Element and, per thread and slab,
//   read(from, rest)                         what it needs of elements `from` to from + 3, of which `rest` are there
//   value(k, x)                              what stands in a slab for a change x of the k-th of the four
//   factor(k)                                what add needs of it
//   add(left, right, own, factors, part)     part += what two slabs make of each other
template <class Work, int Rows, int N>
__global__ void __launch_bounds__(4096 / (4 * Rows))
    elements_kernel(Work work, const typename Work::Element* delta, const typename Work::Element* other, double* partial, Sides sides,
                    int64_t first, int64_t samples, int64_t width, int64_t parts) {
  using T = typename Work::Element;
  constexpr int kThreads = Entries<Rows>::kThreads;
  __shared__ Slab<T> left[2], right[2];
  __shared__ T factors[2][kDepth];
  const Entries<Rows> own(sides, blockIdx.x);
  const int64_t n = first + blockIdx.y / parts, piece = blockIdx.y % parts, slabs = (width + kDepth - 1) / kDepth;
  const int64_t begin = slabs * piece / parts * kDepth, last = slabs * (piece + 1) / parts * kDepth;
  const int64_t end = last < width ? last : width, stride = samples * width;
  const T *rows = delta + n * width, *columns = (sides.symmetric ? delta : other) + n * width;
  double sum[Rows][4] = {};
  T part[Rows][4] = {};
  Part<T, kThreads, N> a, b;
  a.load(rows, stride, own.top, sides.left, begin, end);
  b.load(columns, stride, own.start, sides.right, begin, end);
  int now = 0, chain = 0;
  for (int64_t start = begin; start < end; start += kDepth, now ^= 1) {
    const int c = Part<T, kThreads, N>::first();
    work.read(n * width + start + c, end - start - c);
    const auto value = [&](int k, T x) { return work.value(k, x); };
    a.store(left[now], value);
    b.store(right[now], value);
    if (threadIdx.x < 4)
      for (int k = 0; k < 4; ++k) factors[now][c + k] = work.factor(k);
    __syncthreads();
    if (start + kDepth < end) {
      a.load(rows, stride, own.top, sides.left, start + kDepth, end);
      b.load(columns, stride, own.start, sides.right, start + kDepth, end);
    }
    if (!own.busy) continue;
    Work::add(left[now], right[now], own, factors[now], part);
    if (++chain % kSlabs != 0 && start + kDepth < end) continue;
#pragma unroll
    for (int i = 0; i < Rows; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) sum[i][j] += static_cast<double>(part[i][j]), part[i][j] = T(0);
  }
  if (own.busy) own.store(sides, sum, partial + static_cast<int64_t>(blockIdx.y) * sides.left * sides.right);
}

// All samples: each [width] of the changes' rows, which are [samples, width] in memory.
template <int Rows, int N, class Work>
void launch_elements(const char* op, const Work& work, const Pairs& pairs, int64_t samples, int64_t width, double scale, double* total,
                     double* squares, void* workspace, cudaStream_t queue) {
  using T = typename Work::Element;
  const Sides sides(pairs);
  const PartCut cut(sides, samples, width, kSlabs * kDepth);
  const auto *delta = static_cast<const T*>(pairs.delta), *other = static_cast<const T*>(pairs.other);
  auto* partial = static_cast<double*>(workspace);
  for (int64_t first = 0; first < samples; first += cut.samples) {
    const int64_t count = std::min(cut.samples, samples - first);
    const dim3 grid(static_cast<unsigned>(sides.tiles()), static_cast<unsigned>(count * cut.parts));
    elements_kernel<Work, Rows, N><<<grid, Entries<Rows>::kThreads, 0, queue>>>(work, delta, other, partial, sides, first, samples,
                                                                               width, cut.parts);
    check_launch(op);
    const auto blocks = static_cast<unsigned>(ceil_div(sides.entries(), 256));
    add_samples_kernel<<<blocks, 256, 0, queue>>>(partial, SampleSums{total, squares, nullptr, scale}, sides, count, cut.parts,
                                                  first == 0, false, false);
    check_launch(op);
  }
}
inline int64_t elements_workspace(const Pairs& pairs, int64_t samples, int64_t width) {
  const Sides sides(pairs);
  const PartCut cut(sides, samples, width, kSlabs * kDepth);
  return 8 * sides.entries() * cut.samples * cut.parts;
}
// launch(N) as a type: elements read at a time, of rows `width` apart.
template <class T, class Launch>
void with_width(const Pairs& pairs, int64_t width, Launch launch) {
  constexpr int most = 16 / sizeof(T);
  if (width % most == 0 && is_aligned(pairs.delta, 16) && is_aligned(pairs.other, 16))
    launch(std::integral_constant<int, most>());
  else
    launch(std::integral_constant<int, 1>());
}

}  // namespace clado
