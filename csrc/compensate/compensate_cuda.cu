#include "common/cuda.cuh"
#include "common/weights.cuh"
#include "compensate/compensate.h"

namespace clado {
namespace {

constexpr int kColumns = 32;  // rounded one after the other by a thread per stream; then all columns after them make up
constexpr int kThreads = 128;
constexpr int kSide = 16, kEach = 4, kTile = kSide * kEach;  // an update: 16 x 16 threads, each 4 columns of 4 streams

// The weights of factor f, turned: [factors, columns, streams] float32; a column is replaced by -e once it is rounded.
struct State {
  Compensation given;
  float* w;
  __device__ float* column(int64_t f, int64_t i) const { return w + (f * given.weight.columns + i) * given.streams(); }
  __device__ bool is_column(int64_t c) const { return c >= 0 && c < given.weight.columns; }
  __device__ int width(int64_t stream) const { return static_cast<int>(stream / given.rows()); }
  __device__ int64_t row(int64_t f, int64_t stream) const { return f * given.rows() + stream % given.rows(); }
};

template <class T>
__global__ void turn_kernel(const T* __restrict__ weight, State state) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t streams = state.given.streams(), columns = state.given.weight.columns;
  if (index >= state.given.factors * columns * streams) return;
  const int64_t f = index / streams / columns, from = state.given.column(f, index / streams % columns);
  const int64_t row = state.row(f, index % streams);
  state.w[index] = state.is_column(from) ? to_float(weight[row * state.given.weight.row_stride + from]) : NAN;
}

// A thread takes one stream through the columns [first, first + count).
__global__ void round_kernel(State state, int64_t first, int count, int64_t blocks, int8_t* codes, double* loss) {
  __shared__ float u[kColumns][kColumns];
  const Compensation& given = state.given;
  const int64_t columns = given.weight.columns, f = blockIdx.x / blocks;
  const int64_t stream = blockIdx.x % blocks * kThreads + threadIdx.x;
  for (int k = threadIdx.x; k < count * count; k += kThreads)
    u[k / count][k % count] = given.u(f, first + k / count, first + k % count);
  __syncthreads();
  if (stream >= given.streams()) return;
  const int width = state.width(stream), bits = given.bits.width[width];
  const int64_t output = width * given.weight.rows + state.row(f, stream), groups = given.weight.groups();
  float w[kColumns];
#pragma unroll
  for (int i = 0; i < kColumns; ++i) w[i] = i < count ? state.column(f, first + i)[stream] : 0.0f;
  double sum = first == 0 ? 0.0 : loss[output];
#pragma unroll
  for (int i = 0; i < kColumns; ++i) {
    if (i >= count) continue;
    const int64_t column = given.column(f, first + i);
    const bool inside = state.is_column(column);
    const int64_t at = output * groups + (inside ? column / given.weight.group_size : 0);
    const float scale = given.scales[at], zero = given.zeros ? static_cast<float>(given.zeros[at]) : 0.0f;
    const float low = static_cast<float>(lowest_code(bits)) - zero, high = static_cast<float>(highest_code(bits)) - zero;
    const float t = w[i] / scale, step = given.element ? round_element(t, given.element) : nearest(clamp_code(t, low, high));
    const float code = step + zero;
    const float error = (step * scale - w[i]) * (1.0f / u[i][i]);  // -e
    if (inside && !given.element) codes[output * columns + column] = code == code ? static_cast<int8_t>(code) : int8_t{0};
    if (inside && given.element) codes[output * columns + column] = t == t ? element_code(t, given.element) : int8_t{0};
    sum += static_cast<double>(error) * static_cast<double>(error);
    state.column(f, first + i)[stream] = error;
#pragma unroll
    for (int j = i + 1; j < kColumns; ++j)
      if (j < count) w[j] = __fmaf_rn(error, u[i][j], w[j]);
  }
  loss[output] = sum == sum ? sum : NAN;
}

// The columns from `from` on make up for the errors of the columns [first, first + count) before them.
__global__ void update_kernel(State state, int64_t first, int count, int64_t from, int64_t blocks) {
  __shared__ float e[kColumns][kTile], u[kColumns][kTile];
  const int64_t columns = state.given.weight.columns, streams = state.given.streams(), f = blockIdx.x / blocks;
  const int64_t stream = blockIdx.x % blocks * kTile, column = from + static_cast<int64_t>(blockIdx.y) * kTile;
  const int thread = threadIdx.y * kSide + threadIdx.x;
  for (int k = thread; k < count * kTile; k += kSide * kSide) {
    const int i = k / kTile, l = k % kTile;
    e[i][l] = stream + l < streams ? state.column(f, first + i)[stream + l] : 0.0f;
    u[i][l] = column + l < columns ? state.given.u(f, first + i, column + l) : 0.0f;
  }
  __syncthreads();
  float w[kEach][kEach];
#pragma unroll
  for (int c = 0; c < kEach; ++c)
#pragma unroll
    for (int s = 0; s < kEach; ++s) {
      const int64_t j = column + threadIdx.y + c * kSide, at = stream + threadIdx.x + s * kSide;
      w[c][s] = j < columns && at < streams ? state.column(f, j)[at] : 0.0f;
    }
  for (int i = 0; i < count; ++i)
#pragma unroll
    for (int c = 0; c < kEach; ++c)
#pragma unroll
      for (int s = 0; s < kEach; ++s)
        w[c][s] = __fmaf_rn(e[i][threadIdx.x + s * kSide], u[i][threadIdx.y + c * kSide], w[c][s]);
#pragma unroll
  for (int c = 0; c < kEach; ++c)
#pragma unroll
    for (int s = 0; s < kEach; ++s) {
      const int64_t j = column + threadIdx.y + c * kSide, at = stream + threadIdx.x + s * kSide;
      if (j < columns && at < streams) state.column(f, j)[at] = w[c][s];
    }
}

}  // namespace

int64_t compensate_workspace(int64_t rows, int64_t columns, int num_bits) { return 4 * rows * columns * num_bits; }

void compensate_cuda(const Compensation& given, int8_t* codes, double* loss, void* workspace, int device, void* stream) {
  const int64_t columns = given.weight.columns, streams = given.streams();
  if (given.weight.rows * columns == 0) return;
  const DeviceGuard guard(device);
  const auto queue = static_cast<cudaStream_t>(stream);
  const State state{given, static_cast<float*>(workspace)};
  with_type(given.weight.dtype, [&](auto type) {
    const auto* weight = static_cast<const decltype(type)*>(given.weight.data);
    const auto grid = static_cast<unsigned>(ceil_div(given.factors * columns * streams, kThreads));
    turn_kernel<<<grid, kThreads, 0, queue>>>(weight, state);
  });
  const int64_t blocks = ceil_div(streams, kThreads), tiles = ceil_div(streams, kTile);
  const dim3 square(kSide, kSide);
  for (int64_t first = 0; first < columns; first += kColumns) {
    const int64_t rest = columns - first - kColumns;
    const int count = static_cast<int>(rest < 0 ? columns - first : kColumns);
    const auto grid = static_cast<unsigned>(given.factors * blocks);
    round_kernel<<<grid, kThreads, 0, queue>>>(state, first, count, blocks, codes, loss);
    if (rest <= 0) break;
    const dim3 area(static_cast<unsigned>(given.factors * tiles), static_cast<unsigned>(ceil_div(rest, kTile)));
    update_kernel<<<area, square, 0, queue>>>(state, first, count, first + kColumns, tiles);
  }
  check_launch("compensate");
}

}  // namespace clado
