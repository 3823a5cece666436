#include <algorithm>
#include <type_traits>

#include "common/cuda.cuh"
#include "common/weights.cuh"
#include "scale_search/scale_search.h"

namespace clado {
namespace {

constexpr int kWarps = 8;
constexpr int kTeam = 16;  // warps that share a group: up to 16 blocks
constexpr int kPerLane = kBlock / kBlockLanes;
constexpr int kChunk = 8;  // steps rated before it is asked whether later ones can win

struct Shape {
  int64_t rows, columns, row_stride, group_size, groups, blocks;  // blocks of 1024 in a whole group
  int64_t rows_each;                                              // rows that share a row of importance
  __host__ __device__ int64_t all() const { return rows * groups; }
  __device__ int64_t first(int64_t group) const { return group / groups * row_stride + group % groups * group_size; }
  __device__ int64_t first_importance(int64_t group) const {
    return group / groups / rows_each * columns + group % groups * group_size;
  }
  __device__ int64_t length(int64_t group) const {
    const int64_t rest = columns - group % groups * group_size;
    return rest < group_size ? rest : group_size;
  }
};

// bottom = min(w, 0), top = max(w, 0); both NaN when something is not finite, or an importance negative. The largest importance
// beside a weight that is not 0; 0 where there is none.
struct Extremes {
  float bottom, top, importance;
  __device__ void merge(Extremes other) {
    if (other.bottom < bottom || other.bottom != other.bottom) bottom = other.bottom;
    if (other.top > top || other.top != other.top) top = other.top;
    importance = fmaxf(importance, other.importance);
  }
};

// A lane's part of a block of weights and, where Weighted, of their importance.
template <int PerLane, bool Weighted>
struct Part {
  float w[PerLane], h[Weighted ? PerLane : 1];

  template <class T>
  __device__ void load(const T* __restrict__ weight, const float* __restrict__ importance, const Shape& shape, int64_t group,
                       int64_t start) {
    const int64_t length = shape.length(group);
    const T* const weights = weight + shape.first(group);
#pragma unroll
    for (int j = 0; j < PerLane; ++j) {
      const int64_t i = start + j * kBlockLanes + threadIdx.x;
      w[j] = i < length ? to_float(weights[i]) : 0.0f;
    }
    if constexpr (Weighted) {
      const float* const from = importance + shape.first_importance(group);
#pragma unroll
      for (int j = 0; j < PerLane; ++j) {
        const int64_t i = start + j * kBlockLanes + threadIdx.x;
        h[j] = i < length ? from[i] : 0.0f;
      }
    }
  }

  // From importance to h; `largest` of the group.
  __device__ void level(float largest) {
    if constexpr (Weighted) {
      const float factor = leveller(largest);
#pragma unroll
      for (int j = 0; j < PerLane; ++j) h[j] = largest == 0.0f ? 1.0f : w[j] == 0.0f ? 0.0f : h[j] * factor;
    }
  }

  __device__ float counted(int j, float square) const {
    if constexpr (Weighted) return h[j] * square;
    return square;
  }
};

// Squared error of a block at one step, in units of the scale, in lane 0.
template <int PerLane, bool Weighted>
__device__ float block_error(const Part<PerLane, Weighted>& part, float inverse, const Grid& grid, int element) {
  float sum = 0.0f;
  if (is_float(element)) {
#pragma unroll
    for (int j = 0; j < PerLane; ++j) {
      const float x = part.w[j] * inverse, e = round_element(x, element) - x;
      sum += part.counted(j, e * e);
    }
  } else {
#pragma unroll
    for (int j = 0; j < PerLane; ++j) {
      const float x = part.w[j] * inverse, e = nearest(fminf(fmaxf(x, grid.low), grid.high)) - x;
      sum += part.counted(j, e * e);
    }
  }
  return sum_block_lanes(sum);
}

// The part of it that clipping makes.
template <int PerLane, bool Weighted>
__device__ float clipped_error(const Part<PerLane, Weighted>& part, float inverse, const Grid& grid) {
  float sum = 0.0f;
#pragma unroll
  for (int j = 0; j < PerLane; ++j) {
    const float x = part.w[j] * inverse, e = fminf(fmaxf(x, grid.low), grid.high) - x;
    sum += part.counted(j, e * e);
  }
  return sum_block_lanes(sum);
}

// Extremes of a block by its warp, in lane 0.
template <int PerLane, bool Weighted>
__device__ Extremes block_extremes(const Part<PerLane, Weighted>& part) {
  float bottom = 0.0f, top = 0.0f, spoiled = 0.0f, importance = 0.0f;
#pragma unroll
  for (int j = 0; j < PerLane; ++j) {
    bottom = fminf(bottom, part.w[j]), top = fmaxf(top, part.w[j]);
    spoiled += part.w[j] * 0.0f;
    if constexpr (Weighted) {
      spoiled += part.h[j] < 0.0f ? nanf("") : part.h[j] * 0.0f;
      importance = fmaxf(importance, part.w[j] == 0.0f ? 0.0f : part.h[j]);
    }
  }
  for (int half = 16; half > 0; half /= 2) {
    bottom = fminf(bottom, __shfl_down_sync(0xffffffffu, bottom, half));
    top = fmaxf(top, __shfl_down_sync(0xffffffffu, top, half));
    spoiled += __shfl_down_sync(0xffffffffu, spoiled, half);
    if constexpr (Weighted) importance = fmaxf(importance, __shfl_down_sync(0xffffffffu, importance, half));
  }
  return spoiled != 0.0f ? Extremes{nanf(""), nanf(""), 0.0f} : Extremes{bottom, top, importance};
}

// Targets that share their groups, and their outputs for one of them.
struct Run {
  Target at[kMostFormats];
  int count;

  __device__ float below(int b) const { return at[b].tensor_scale ? *at[b].tensor_scale : 1.0f; }
  __device__ Grid grid(int b, float bottom, float top, int steps) const {
    return {bottom, top, at[b].element, at[b].zeros == nullptr, at[b].rule, below(b), steps};
  }
  __device__ void set(int b, int64_t group, float scale, int zero) const {
    at[b].scales[group] = scale;
    if (at[b].zeros) at[b].zeros[group] = static_cast<int8_t>(zero);
  }
  // Of a group of zeros, or one that is not finite.
  __device__ void set_none(int b, int64_t group, float bottom) const {
    set(b, group, bottom != bottom ? bottom : Grid::of_zeros(at[b].rule, below(b)), 0);
  }
};

// ---- groups of up to kTeam blocks: all in one kernel ----

// One block of threads per group and target, one warp per block of it, whose weights stay in registers. All warps add the blocks'
// errors in order and so decide alike.
template <int PerLane, bool Weighted, class T>
__global__ void __launch_bounds__(32 * kTeam, 1)
    search_kernel(const T* __restrict__ weight, const float* __restrict__ importance, Shape shape, Run run, int steps) {
  __shared__ Extremes ends[kTeam];
  __shared__ float sums[2][kTeam][kChunk + 1];  // of the steps of a chunk, then what is clipped at its last one
  const int64_t group = blockIdx.x;
  const int target = blockIdx.y, element = run.at[target].element;
  const int warp = threadIdx.y, lane = threadIdx.x, warps = blockDim.y;
  const bool first = warp == 0 && lane == 0;
  Part<PerLane, Weighted> part;
  part.load(weight, importance, shape, group, static_cast<int64_t>(warp) * kBlock);
  const Extremes own = block_extremes(part);
  if (lane == 0) ends[warp] = own;
  __syncthreads();
  Extremes all{0.0f, 0.0f, 0.0f};
  for (int i = 0; i < warps; ++i) all.merge(ends[i]);
  if (all.bottom != all.bottom || (all.bottom == 0.0f && all.top == 0.0f)) {
    if (first) run.set_none(target, group, all.bottom);
    return;
  }
  const Grid grid = run.grid(target, all.bottom, all.top, steps);
  part.level(all.importance);
  const double counted = static_cast<double>(shape.length(group)) * (Weighted && all.importance > 0.0f ? kMostLevelled : 1);
  double least = INFINITY;
  int best = 0;
  for (int next = 0, turn = 0; next < grid.count; next += kChunk, turn ^= 1) {
    const int count = grid.count - next < kChunk ? grid.count - next : kChunk;
    for (int j = 0; j < count; ++j) {
      const float sum = block_error(part, 1.0f / grid.scale(next + j), grid, element);
      if (lane == 0) sums[turn][warp][j] = sum;
    }
    const float clipped = clipped_error(part, 1.0f / grid.scale(next + count - 1), grid);
    if (lane == 0) sums[turn][warp][kChunk] = clipped;
    __syncthreads();
    double error = 0.0;
    if (lane < count || lane == kChunk)
      for (int i = 0; i < warps; ++i) error += static_cast<double>(sums[turn][i][lane]);
    const double all_clipped = __shfl_sync(0xffffffffu, error, kChunk);
    const double scale = grid.scale(lane < count ? next + lane : next + count - 1);
    error *= scale * scale;
    bool better = false;
    for (int j = 0; j < count; ++j) {
      const double total = __shfl_sync(0xffffffffu, error, j);
      if (total < least) least = total, best = next + j, better = true;
    }
    // What is clipped only grows as the scale shrinks, and the error is at least that: later steps lose once it alone exceeds the
    // best error, with room for float32 (relative 1e-3, and 1e-4 of a step per element, more for large elements).
    const double last = grid.scale(next + count - 1);
    const double lost = (0.999 * sqrt(all_clipped) - static_cast<double>(grid.room()) * sqrt(counted)) * last;
    if (!better && lost > 0.0 && lost * lost > least) break;
  }
  if (first) run.set(target, group, grid.scale(best), grid.zero);
}

// ---- longer groups: extremes, errors of every block and step, choice ----

// One warp per block.
template <bool Weighted, class T>
__global__ void extremes_kernel(const T* __restrict__ weight, const float* __restrict__ importance, Shape shape,
                                Extremes* __restrict__ extremes) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.y;
  if (index >= shape.all() * shape.blocks) return;
  Part<kPerLane, Weighted> part;
  part.load(weight, importance, shape, index / shape.blocks, index % shape.blocks * kBlock);
  const Extremes own = block_extremes(part);
  if (threadIdx.x == 0) extremes[index] = own;
}

// One block of threads per group merges its blocks.
__global__ void group_extremes_kernel(const Extremes* extremes, Shape shape, Extremes* out) {
  __shared__ Extremes parts[256];
  const int64_t group = blockIdx.x;
  Extremes mine{0.0f, 0.0f, 0.0f};
  for (int64_t i = threadIdx.x; i < shape.blocks; i += blockDim.x) mine.merge(extremes[group * shape.blocks + i]);
  parts[threadIdx.x] = mine;
  __syncthreads();
  for (int half = blockDim.x / 2; half > 0; half /= 2) {
    if (threadIdx.x < half) parts[threadIdx.x].merge(parts[threadIdx.x + half]);
    __syncthreads();
  }
  if (threadIdx.x == 0) out[group] = parts[0];
}

// One warp per block: its weights stay in registers while all candidates of all targets are rated.
template <bool Weighted, class T>
__global__ void errors_kernel(const T* __restrict__ weight, const float* __restrict__ importance, Shape shape, Run run, int steps,
                              const Extremes* __restrict__ group_extremes, float* __restrict__ errors) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.y;
  if (index >= shape.all() * shape.blocks) return;
  const int64_t group = index / shape.blocks;
  Part<kPerLane, Weighted> part;
  part.load(weight, importance, shape, group, index % shape.blocks * kBlock);
  part.level(group_extremes[group].importance);
  const float bottom = group_extremes[group].bottom, top = group_extremes[group].top;
  if (bottom != bottom || (bottom == 0.0f && top == 0.0f)) return;
  for (int b = 0; b < run.count; ++b) {
    const Grid grid = run.grid(b, bottom, top, steps);
    for (int k = 0; k < grid.count; ++k) {
      const float sum = block_error(part, 1.0f / grid.scale(k), grid, run.at[b].element);
      if (threadIdx.x == 0) errors[(index * run.count + b) * most_candidates(steps) + k] = sum;
    }
  }
}

// One warp per group and target: a lane adds the errors of its candidates in order, the least of all wins, the first among equals.
__global__ void choose_kernel(Shape shape, Run run, int steps, const Extremes* group_extremes, const float* errors) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.y, group = index / run.count;
  if (group >= shape.all()) return;
  const int b = static_cast<int>(index - group * run.count);
  const float bottom = group_extremes[group].bottom, top = group_extremes[group].top;
  if (bottom != bottom || (bottom == 0.0f && top == 0.0f)) {
    if (threadIdx.x == 0) run.set_none(b, group, bottom);
    return;
  }
  const Grid grid = run.grid(b, bottom, top, steps);
  double least = INFINITY;
  int best = 0;
  for (int k = threadIdx.x; k < grid.count; k += kBlockLanes) {
    double sum = 0.0;
    for (int64_t i = 0; i < shape.blocks; ++i)
      sum += static_cast<double>(errors[((group * shape.blocks + i) * run.count + b) * most_candidates(steps) + k]);
    const double scale = grid.scale(k), total = sum * (scale * scale);
    if (total < least) least = total, best = k;
  }
  for (int half = kBlockLanes / 2; half > 0; half /= 2) {
    const double other = __shfl_down_sync(0xffffffffu, least, half);
    const int k = __shfl_down_sync(0xffffffffu, best, half);
    if (other < least || (other == least && k < best)) least = other, best = k;
  }
  if (threadIdx.x == 0) run.set(b, group, grid.scale(best), grid.zero);
}

Shape shape_of(const WeightView& weight, const Importance& importance, int64_t group_size) {
  const int64_t longest = std::min(weight.columns, group_size), groups = (weight.columns + group_size - 1) / group_size;
  return {weight.rows, weight.columns, weight.row_stride, group_size, groups, blocks_of(longest), importance.rows_each(weight)};
}

template <bool Weighted, class T>
void search(const T* weight, const float* importance, const Shape& shape, const Run& run, int steps, void* workspace,
            cudaStream_t queue) {
  const int64_t items = shape.all() * shape.blocks;
  const auto groups = static_cast<unsigned>(shape.all());
  if (shape.blocks <= kTeam) {
    const auto together = [&](auto per_lane) {
      const dim3 warps(kBlockLanes, static_cast<unsigned>(shape.blocks));
      search_kernel<decltype(per_lane)::value, Weighted>
          <<<dim3(groups, run.count), warps, 0, queue>>>(weight, importance, shape, run, steps);
    };
    const int64_t longest = std::min(shape.columns, shape.group_size);
    if (longest <= 4 * kBlockLanes)
      together(std::integral_constant<int, 4>());
    else if (longest <= 12 * kBlockLanes)
      together(std::integral_constant<int, 12>());
    else if (longest <= 24 * kBlockLanes)
      together(std::integral_constant<int, 24>());
    else
      together(std::integral_constant<int, kPerLane>());
    return;
  }
  auto* extremes = static_cast<Extremes*>(workspace);
  Extremes* group_extremes = extremes + items;
  auto* errors = reinterpret_cast<float*>(group_extremes + shape.all());
  const dim3 warps(kBlockLanes, kWarps);
  const auto grid = static_cast<unsigned>(ceil_div(items, kWarps));
  const auto choices = static_cast<unsigned>(ceil_div(shape.all() * run.count, kWarps));
  extremes_kernel<Weighted><<<grid, warps, 0, queue>>>(weight, importance, shape, extremes);
  group_extremes_kernel<<<groups, 256, 0, queue>>>(extremes, shape, group_extremes);
  errors_kernel<Weighted><<<grid, warps, 0, queue>>>(weight, importance, shape, run, steps, group_extremes, errors);
  choose_kernel<<<choices, warps, 0, queue>>>(shape, run, steps, group_extremes, errors);
}

}  // namespace

int64_t scale_search_workspace(int64_t rows, int64_t columns, int64_t group_size, int num_targets, int steps) {
  const Shape shape = shape_of({nullptr, DType::float32, rows, columns, columns, group_size}, {}, group_size);
  const int64_t items = shape.blocks > kTeam ? shape.all() * shape.blocks : 0;
  return static_cast<int64_t>(sizeof(Extremes)) * (items + shape.all()) + 4 * items * num_targets * most_candidates(steps);
}

void scale_search_cuda(const WeightView& weight, const Importance& importance, const TargetList& targets, int steps, void* workspace,
                       int device, void* stream) {
  if (weight.rows * weight.columns == 0) return;
  const DeviceGuard guard(device);
  for (int first = 0, last = 0; first < targets.count; first = last) {
    last = run_of(targets, first);
    Run run{{}, last - first};
    std::copy(targets.at + first, targets.at + last, run.at);
    const Shape shape = shape_of(weight, importance, run.at[0].group_size);
    with_type(weight.dtype, [&](auto type) {
      const auto* typed = static_cast<const decltype(type)*>(weight.data);
      const auto of = importance.data ? search<true, decltype(type)> : search<false, decltype(type)>;
      of(typed, importance.data, shape, run, steps, workspace, static_cast<cudaStream_t>(stream));
    });
  }
  check_launch("scale_search");
}

}  // namespace clado
