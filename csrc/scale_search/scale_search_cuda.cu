#include <algorithm>
#include <type_traits>

#include "common/cuda.cuh"
#include "common/weights.cuh"
#include "scale_search/scale_search.h"

namespace clado {
namespace {

constexpr int kWarps = 8;

struct Shape {
  int64_t rows, columns, group_size, groups, blocks;  // blocks of 1024 in a whole group
  __host__ __device__ int64_t all() const { return rows * groups; }
  __device__ int64_t first(int64_t group) const { return group / groups * columns + group % groups * group_size; }
  __device__ int64_t length(int64_t group) const {
    const int64_t rest = columns - group % groups * group_size;
    return rest < group_size ? rest : group_size;
  }
};

// bottom = min(w, 0), top = max(w, 0); both NaN when something is not finite.
struct Extremes {
  float bottom, top;
  __device__ void merge(Extremes other) {
    if (other.bottom < bottom || other.bottom != other.bottom) bottom = other.bottom;
    if (other.top > top || other.top != other.top) top = other.top;
  }
};

// One warp per block.
template <class T>
__global__ void extremes_kernel(const T* __restrict__ weight, Shape shape, Extremes* __restrict__ extremes) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.y;
  if (index >= shape.all() * shape.blocks) return;
  const int64_t group = index / shape.blocks, start = index % shape.blocks * kBlock, length = shape.length(group);
  const T* from = weight + shape.first(group);
  float bottom = 0.0f, top = 0.0f, spoiled = 0.0f;
#pragma unroll 4
  for (int64_t i = start + threadIdx.x; i < length && i < start + kBlock; i += kBlockLanes) {
    const float w = to_float(from[i]);
    bottom = fminf(bottom, w), top = fmaxf(top, w);
    spoiled += w * 0.0f;
  }
  for (int half = 16; half > 0; half /= 2) {
    bottom = fminf(bottom, __shfl_down_sync(0xffffffffu, bottom, half));
    top = fmaxf(top, __shfl_down_sync(0xffffffffu, top, half));
    spoiled += __shfl_down_sync(0xffffffffu, spoiled, half);
  }
  if (threadIdx.x == 0) extremes[index] = spoiled != 0.0f ? Extremes{nanf(""), nanf("")} : Extremes{bottom, top};
}

// One block of threads per group merges its blocks.
__global__ void group_extremes_kernel(const Extremes* extremes, Shape shape, Extremes* out) {
  __shared__ Extremes parts[256];
  const int64_t group = blockIdx.x;
  Extremes mine{0.0f, 0.0f};
  for (int64_t i = threadIdx.x; i < shape.blocks; i += blockDim.x) mine.merge(extremes[group * shape.blocks + i]);
  parts[threadIdx.x] = mine;
  __syncthreads();
  for (int half = blockDim.x / 2; half > 0; half /= 2) {
    if (threadIdx.x < half) parts[threadIdx.x].merge(parts[threadIdx.x + half]);
    __syncthreads();
  }
  if (threadIdx.x == 0) out[group] = parts[0];
}

// One warp per block of at most 32 * PerLane weights: they stay in registers while all steps of all widths are rated.
template <int PerLane, class T>
__global__ void errors_kernel(const T* __restrict__ weight, Shape shape, BitList bits, int steps, bool symmetric,
                              const Extremes* __restrict__ group_extremes, float* __restrict__ errors) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.y;
  if (index >= shape.all() * shape.blocks) return;
  const int64_t group = index / shape.blocks, start = index % shape.blocks * kBlock, length = shape.length(group);
  const T* from = weight + shape.first(group);
  float w[PerLane];
#pragma unroll
  for (int j = 0; j < PerLane; ++j) {
    const int64_t i = start + j * kBlockLanes + threadIdx.x;
    w[j] = i < length ? to_float(from[i]) : 0.0f;
  }
  for (int b = 0; b < bits.count; ++b) {
    const Grid grid(group_extremes[group].bottom, group_extremes[group].top, bits.width[b], symmetric);
    for (int k = 0; k < steps; ++k) {
      const float inverse = 1.0f / grid.scale(k);
      float sum = 0.0f;
#pragma unroll
      for (int j = 0; j < PerLane; ++j) {
        const float x = w[j] * inverse, e = nearest(fminf(fmaxf(x, grid.low), grid.high)) - x;
        sum += e * e;
      }
      sum = sum_block_lanes(sum);
      if (threadIdx.x == 0) errors[(index * bits.count + b) * steps + k] = sum;
    }
  }
}

// One warp per group and width: a lane adds the errors of its steps in order, the least of all wins, the first among equals.
__global__ void choose_kernel(Shape shape, BitList bits, int steps, const Extremes* group_extremes, const float* errors,
                              float* scales, int8_t* zeros) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.y, group = index / bits.count;
  if (group >= shape.all()) return;
  const int b = static_cast<int>(index - group * bits.count);
  const float bottom = group_extremes[group].bottom, top = group_extremes[group].top;
  const Grid grid(bottom, top, bits.width[b], zeros == nullptr);
  double least = INFINITY;
  int best = 0;
  for (int k = threadIdx.x; k < steps; k += kBlockLanes) {
    double sum = 0.0;
    for (int64_t i = 0; i < shape.blocks; ++i)
      sum += static_cast<double>(errors[((group * shape.blocks + i) * bits.count + b) * steps + k]);
    const double scale = grid.scale(k), total = sum * (scale * scale);
    if (total < least) least = total, best = k;
  }
  for (int half = kBlockLanes / 2; half > 0; half /= 2) {
    const double other = __shfl_down_sync(0xffffffffu, least, half);
    const int k = __shfl_down_sync(0xffffffffu, best, half);
    if (other < least || (other == least && k < best)) least = other, best = k;
  }
  if (threadIdx.x != 0) return;
  const bool finite = bottom == bottom, nothing = bottom == 0.0f && top == 0.0f;
  scales[b * shape.all() + group] = !finite ? bottom : nothing ? 1.0f : grid.scale(best);
  if (zeros) zeros[b * shape.all() + group] = !finite || nothing ? int8_t{0} : static_cast<int8_t>(grid.zero);
}

Shape shape_of(int64_t rows, int64_t columns, int64_t group_size) {
  return {rows, columns, group_size, ceil_div(columns, group_size), blocks_of(std::min(columns, group_size))};
}

}  // namespace

int64_t scale_search_workspace(int64_t rows, int64_t columns, int64_t group_size, int num_bits, int steps) {
  const Shape shape = shape_of(rows, columns, group_size);
  const int64_t items = shape.all() * shape.blocks;
  return static_cast<int64_t>(sizeof(Extremes)) * (items + shape.all()) + 4 * items * num_bits * steps;
}

void scale_search_cuda(const void* weight, int dtype, float* scales, int8_t* zeros, int64_t rows, int64_t columns,
                       int64_t group_size, const int32_t* bits, int num_bits, int steps, void* workspace, int device,
                       void* stream) {
  const Shape shape = shape_of(rows, columns, group_size);
  const int64_t items = shape.all() * shape.blocks;
  if (items == 0) return;
  const DeviceGuard guard(device);
  const auto queue = static_cast<cudaStream_t>(stream);
  const BitList list(bits, num_bits);
  auto* extremes = static_cast<Extremes*>(workspace);
  Extremes* group_extremes = shape.blocks > 1 ? extremes + items : extremes;
  auto* errors = reinterpret_cast<float*>(extremes + items + shape.all());
  const dim3 warps(kBlockLanes, kWarps);
  const auto grid = static_cast<unsigned>(ceil_div(items, kWarps));
  const auto groups = static_cast<unsigned>(shape.all());
  with_type(static_cast<DType>(dtype), [&](auto type) {
    const auto* typed = static_cast<const decltype(type)*>(weight);
    extremes_kernel<<<grid, warps, 0, queue>>>(typed, shape, extremes);
    if (shape.blocks > 1) group_extremes_kernel<<<groups, 256, 0, queue>>>(extremes, shape, group_extremes);
    const auto rate = [&](auto per_lane) {
      errors_kernel<decltype(per_lane)::value><<<grid, warps, 0, queue>>>(typed, shape, list, steps, zeros == nullptr, group_extremes,
                                                                          errors);
    };
    const int64_t longest = std::min(columns, group_size);
    if (longest <= 4 * kBlockLanes)
      rate(std::integral_constant<int, 4>());
    else if (longest <= 12 * kBlockLanes)
      rate(std::integral_constant<int, 12>());
    else if (longest <= 24 * kBlockLanes)
      rate(std::integral_constant<int, 24>());
    else
      rate(std::integral_constant<int, kBlock / kBlockLanes>());
  });
  const auto choices = static_cast<unsigned>(ceil_div(shape.all() * num_bits, kWarps));
  choose_kernel<<<choices, warps, 0, queue>>>(shape, list, steps, group_extremes, errors, scales, zeros);
  check_launch("scale_search");
}

}  // namespace clado
