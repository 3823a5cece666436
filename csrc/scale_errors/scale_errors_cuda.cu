#include <algorithm>

#include "common/cuda.cuh"
#include "common/weights.cuh"
#include "scale_errors/scale_errors.h"

namespace clado {
namespace {

constexpr int kWarps = 8;
constexpr int kPerLane = kBlock / kBlockLanes;

struct Shape {
  int64_t rows, columns, row_stride, group_size, groups, blocks;  // blocks of 1024 in a whole group
  __host__ __device__ int64_t all() const { return rows * groups; }
};

Shape shape_of(const WeightView& weight) {
  const int64_t longest = std::min(weight.columns, weight.group_size);
  return {weight.rows, weight.columns, weight.row_stride, weight.group_size, weight.groups(), blocks_of(longest)};
}

// One warp per block: its weights stay in registers while all candidates are rated. parts: [groups, blocks, count].
template <class T>
__global__ void block_errors_kernel(const T* __restrict__ weight, Shape shape, const float* __restrict__ scales, int64_t count,
                                    float low, float high, float* __restrict__ parts) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.y;
  if (index >= shape.all() * shape.blocks) return;
  const int64_t group = index / shape.blocks, column = group % shape.groups * shape.group_size;
  const int64_t rest = shape.columns - column, length = rest < shape.group_size ? rest : shape.group_size;
  const T* const from = weight + group / shape.groups * shape.row_stride + column;
  float w[kPerLane];
#pragma unroll
  for (int j = 0; j < kPerLane; ++j) {
    const int64_t i = index % shape.blocks * kBlock + j * kBlockLanes + threadIdx.x;
    w[j] = i < length ? to_float(from[i]) : 0.0f;
  }
  for (int64_t c = 0; c < count; ++c) {
    const float scale = scales[c * shape.all() + group], inverse = inverse_or_zero(scale);
    float sum = 0.0f;
#pragma unroll
    for (int j = 0; j < kPerLane; ++j) {
      const float e = nearest(clamp_code(w[j] * inverse, low, high)) * scale - w[j];
      sum += e * e;
    }
    sum = sum_block_lanes(sum);
    if (threadIdx.x == 0) parts[index * count + c] = sum;
  }
}

// One thread per group and candidate adds its blocks in order.
__global__ void sum_kernel(const float* __restrict__ parts, Shape shape, int64_t count, double* __restrict__ errors) {
  const int64_t at = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (at >= shape.all() * count) return;
  const int64_t group = at % shape.all(), c = at / shape.all();
  const int64_t rest = shape.columns - group % shape.groups * shape.group_size;
  const int64_t length = rest < shape.group_size ? rest : shape.group_size;
  double sum = 0.0;
  for (int64_t i = 0; i < blocks_of(length); ++i) sum += static_cast<double>(parts[(group * shape.blocks + i) * count + c]);
  errors[at] = sum == sum ? sum : static_cast<double>(nanf(""));
}

}  // namespace

int64_t scale_errors_workspace(int64_t rows, int64_t columns, int64_t group_size, int64_t count) {
  const Shape shape = shape_of({nullptr, DType::float32, rows, columns, columns, group_size});
  return 4 * shape.all() * shape.blocks * count;
}

void scale_errors_cuda(const WeightView& weight, const float* scales, int64_t count, int low, int high, double* errors,
                       void* workspace, int device, void* stream) {
  const Shape shape = shape_of(weight);
  if (shape.all() * shape.blocks * count == 0) return;
  const DeviceGuard guard(device);
  const auto queue = static_cast<cudaStream_t>(stream);
  auto* parts = static_cast<float*>(workspace);
  const auto grid = static_cast<unsigned>(ceil_div(shape.all() * shape.blocks, kWarps));
  with_type(weight.dtype, [&](auto type) {
    block_errors_kernel<<<grid, dim3(kBlockLanes, kWarps), 0, queue>>>(static_cast<const decltype(type)*>(weight.data), shape, scales,
                                                                    count, static_cast<float>(low), static_cast<float>(high), parts);
  });
  sum_kernel<<<static_cast<unsigned>(ceil_div(shape.all() * count, 256)), 256, 0, queue>>>(parts, shape, count, errors);
  check_launch("scale_errors");
}

}  // namespace clado
