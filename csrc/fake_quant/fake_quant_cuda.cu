#include <type_traits>

#include "common/cuda.cuh"
#include "common/weights.cuh"
#include "fake_quant/fake_quant.h"
#include "scale_search/scale_search.h"

namespace clado {
namespace {

constexpr int kThreads = 128;

// The nearest step of a weight, zero point aside: see fake_quant.h.
__device__ float step_of(float w, float scale, float low, float high) { return nearest(clamp_code(w / scale, low, high)); }

// One format in one group of a row.
struct Width {
  float scale, inverse, low, high;
  float zero;
  bool plain;  // the inverse is a normal float

  __device__ void load(const Format& to, int64_t at) {
    scale = to.scales[at], inverse = 1.0f / scale;
    if (is_float(to.element)) return;
    plain = scale >= 1.1754944e-38f && scale <= 8.5070592e37f;  // 2^-126 .. 2^126
    zero = to.zeros ? static_cast<float>(to.zeros[at]) : 0.0f;
    low = static_cast<float>(lowest_code(to.element)) - zero, high = static_cast<float>(highest_code(to.element)) - zero;
  }

  // Steps of V weights. The product with the inverse is off by less than 2^-22 of itself, so it rounds as the true quotient does
  // unless it lies that close to the middle of two steps; those, and what is not finite, are divided.
  template <int V>
  __device__ void steps(const float* w, bool finite, int bits, float* out) const {
    const float close = 0.5f - static_cast<float>(1 << bits) * 2.3841858e-7f;
    bool sure = finite && plain;
#pragma unroll
    for (int k = 0; k < V; ++k) {
      const float t = fminf(fmaxf(w[k] * inverse, low), high);
      out[k] = nearest(t);
      sure &= fabsf(t - out[k]) < close;
    }
    if (sure) return;
#pragma unroll
    for (int k = 0; k < V; ++k) out[k] = step_of(w[k], scale, low, high);
  }
};

// Values or codes of a weight in up to `Most` formats, Mixed: floats among them, or groups that differ. Every block of 1024 elements
// of a row is read once, V elements at a time, by a team of 32 / V threads: each adds the errors of V neighbouring lanes of the fixed
// order (common/weights.h). A group covers whole runs of V elements.
template <class T, class Out, int V, int Most, bool Mixed>
__global__ void quantize_kernel(const T* __restrict__ weight, WeightView shape, FormatList formats, Out* __restrict__ out,
                                float* __restrict__ block_errors) {
  constexpr int kTeam = kBlockLanes / V;
  constexpr bool kCodes = std::is_same_v<Out, int8_t>;
  const int64_t rows = shape.rows, columns = shape.columns;
  const int64_t blocks = blocks_of(columns), index = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / kTeam;
  const int64_t row = index / blocks, start = (index - row * blocks) * kBlock;
  const int64_t end = row >= rows ? 0 : start + kBlock < columns ? start + kBlock : columns;
  const bool small = columns <= 0x7fffffff;
  const auto group_of = [&](int64_t c, int64_t size) {
    return small ? static_cast<uint32_t>(c) / static_cast<uint32_t>(size) : c / size;
  };
  Width width[Most];
  float sum[Most][V] = {};
  int64_t group_end[Mixed ? Most : 1] = {}, c = start + threadIdx.x % kTeam * V;
  Pack<T, V> next{};
  if (c < end) next = load_pack<T, V>(weight + row * shape.row_stride + c);
  for (; c < end; c += kBlockLanes) {
    const Pack<T, V> now = next;
    if (c + kBlockLanes < end) next = load_pack<T, V>(weight + row * shape.row_stride + c + kBlockLanes);
    if constexpr (!Mixed) {
      if (c >= group_end[0]) {
        const Format& first = formats.at[0];
        const int64_t group = group_of(c, first.group_size), at = row * first.groups(columns) + group;
        group_end[0] = (group + 1) * first.group_size;
#pragma unroll
        for (int b = 0; b < Most; ++b)
          if (b < formats.count) width[b].load(formats.at[b], at);
      }
    }
    float w[V];
    bool finite = true;
#pragma unroll
    for (int k = 0; k < V; ++k) {
      w[k] = to_float(now.at[k]);
      finite &= fabsf(w[k]) < INFINITY;
    }
#pragma unroll
    for (int b = 0; b < Most; ++b) {
      if (b >= formats.count) break;
      const Format& to = formats.at[b];
      const bool floats = Mixed && is_float(to.element);
      if constexpr (Mixed) {
        if (c >= group_end[b]) {
          const int64_t group = group_of(c, to.group_size);
          group_end[b] = (group + 1) * to.group_size;
          width[b].load(to, row * to.groups(columns) + group);
        }
      }
      float step[V];
      if (floats) {
#pragma unroll
        for (int k = 0; k < V; ++k) step[k] = w[k] / width[b].scale;
      } else {
        width[b].template steps<V>(w, finite, to.element, step);
      }
      Pack<Out, V> stored;
      if constexpr (kCodes) {
#pragma unroll
        for (int k = 0; k < V; ++k)
          stored.at[k] = step[k] != step[k] ? int8_t{0}
                         : floats           ? element_code(step[k], to.element)
                                            : static_cast<int8_t>(static_cast<int>(step[k] + width[b].zero));
      } else {
#pragma unroll
        for (int k = 0; k < V; ++k) step[k] = (floats ? round_element(step[k], to.element) : step[k]) * width[b].scale;
        stored = rounded<Out, V>(step);
#pragma unroll
        for (int k = 0; k < V; ++k) {
          const float e = to_float(stored.at[k]) - w[k];
          sum[b][k] += e * e;
        }
      }
      store_pack(out + (b * rows + row) * columns + c, stored);
    }
  }
  if constexpr (!kCodes) {
#pragma unroll
    for (int b = 0; b < Most; ++b) {
      if (b >= formats.count) break;
#pragma unroll
      for (int half = kBlockLanes / 2; half >= V; half /= 2)
#pragma unroll
        for (int k = 0; k < V; ++k) sum[b][k] += __shfl_down_sync(0xffffffffu, sum[b][k], half / V);
#pragma unroll
      for (int half = V / 2; half > 0; half /= 2)
#pragma unroll
        for (int k = 0; k < half; ++k) sum[b][k] += sum[b][k + half];
      if (threadIdx.x % kTeam == 0 && row < rows) block_errors[(b * rows + row) * blocks + start / kBlock] = sum[b][0];
    }
  }
}

// One thread per row and width adds its blocks in order.
__global__ void sum_blocks_kernel(const float* block_errors, double* sqerr, int64_t count, int64_t blocks) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= count) return;
  double sum = 0.0;
  for (int64_t block = 0; block < blocks; ++block) sum += static_cast<double>(block_errors[i * blocks + block]);
  sqerr[i] = sum;
}

// Of up to kMostWidths formats.
template <class T, class Out>
void launch_few(const WeightView& weight, const FormatList& formats, Out* out, float* block_errors, cudaStream_t queue) {
  const int64_t blocks = weight.rows * blocks_of(weight.columns);
  constexpr int kVector = 16 / sizeof(T);
  const auto even = [](int64_t elements) { return elements % kVector == 0; };
  bool mixed = false, whole = even(weight.columns) && even(weight.row_stride);
  for (int b = 0; b < formats.count; ++b) {
    const int64_t size = formats.at[b].group_size;
    mixed = mixed || is_float(formats.at[b].element) || size != formats.at[0].group_size;
    whole = whole && (size >= weight.columns || even(size));
  }
  const auto run = [&](auto size, auto most, auto any) {
    constexpr int kEach = decltype(size)::value, kMost = decltype(most)::value;
    const int64_t threads = blocks * (kBlockLanes / kEach);
    quantize_kernel<T, Out, kEach, kMost, decltype(any)::value>
        <<<static_cast<unsigned>(ceil_div(threads, kThreads)), kThreads, 0, queue>>>(static_cast<const T*>(weight.data), weight,
                                                                                     formats, out, block_errors);
    check_launch("fake_quant");
  };
  const auto few = [&](auto size, auto any) {
    const std::integral_constant<int, 3> three;
    const std::integral_constant<int, kMostWidths> most;
    formats.count <= 3 ? run(size, three, any) : run(size, most, any);
  };
  const auto all = [&](auto size) { mixed ? few(size, std::true_type()) : few(size, std::false_type()); };
  if (whole && is_aligned(weight.data, 16) && is_aligned(out, kVector * sizeof(Out)))
    all(std::integral_constant<int, kVector>());
  else
    all(std::integral_constant<int, 1>());
}

// The weight is read once for every kMostWidths formats: more of them would not fit a thread's registers.
template <class T, class Out>
void launch(const WeightView& weight, const FormatList& formats, Out* out, float* block_errors, cudaStream_t queue) {
  const int64_t blocks = blocks_of(weight.columns);
  if (weight.rows * blocks == 0) return;
  for (int first = 0; first < formats.count; first += kMostWidths) {
    FormatList part;
    for (; part.count < kMostWidths && first + part.count < formats.count; ++part.count)
      part.at[part.count] = formats.at[first + part.count];
    float* const errors = block_errors ? block_errors + first * weight.rows * blocks : nullptr;
    launch_few<T>(weight, part, out + first * weight.rows * weight.columns, errors, queue);
  }
}

}  // namespace

int64_t fake_quant_workspace(int64_t rows, int64_t columns, int num_formats) {
  return static_cast<int64_t>(sizeof(float)) * num_formats * rows * blocks_of(columns);
}

void fake_quant_cuda(const WeightView& weight, const FormatList& formats, void* values, double* sqerr, void* workspace, int device,
                     void* stream) {
  const DeviceGuard guard(device);
  const auto queue = static_cast<cudaStream_t>(stream);
  auto* block_errors = static_cast<float*>(workspace);
  with_type(weight.dtype, [&](auto type) {
    launch<decltype(type)>(weight, formats, static_cast<decltype(type)*>(values), block_errors, queue);
  });
  const int64_t sums = weight.rows * formats.count;
  if (sums == 0) return;
  sum_blocks_kernel<<<static_cast<unsigned>(ceil_div(sums, kThreads)), kThreads, 0, queue>>>(block_errors, sqerr, sums,
                                                                                           blocks_of(weight.columns));
  check_launch("fake_quant");
}

void quantize_weight_cuda(const WeightView& weight, const BitList& bits, int steps, float* scales, int8_t* zeros, void* values,
                          double* sqerr, void* search_workspace, void* workspace, int device, void* stream) {
  scale_search_cuda(weight, {}, targets_of(weight, bits, scales, zeros), steps, search_workspace, device, stream);
  fake_quant_cuda(weight, formats_of(weight, bits, scales, zeros), values, sqerr, workspace, device, stream);
}

void quantize_cuda(const WeightView& weight, const FormatList& formats, int8_t* codes, int device, void* stream) {
  const DeviceGuard guard(device);
  with_type(weight.dtype, [&](auto type) {
    launch<decltype(type)>(weight, formats, codes, nullptr, static_cast<cudaStream_t>(stream));
  });
}

}  // namespace clado
