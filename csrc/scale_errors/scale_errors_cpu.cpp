#include "scale_errors/scale_errors.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "common/parallel.h"
#include "common/weights_cpu.h"

namespace clado {
namespace {

constexpr int kTogether = 2;  // candidates that share one load of the weights
constexpr int64_t kChunk = 64;  // candidates whose scales are gathered at a time

// errors[k] of a block under scales[k].
template <class F>
CLADO_INLINE void block_errors_body(const float* w, int padded, const float* scales, int count, float low, float high,
                                    float* errors) {
  for (int k = 0; k < count; k += kTogether) {
    F sum[kTogether][2];
    float scale[kTogether], inverse[kTogether];
    for (int t = 0; t < kTogether; ++t) {
      scale[t] = scales[std::min(k + t, count - 1)];
      inverse[t] = inverse_or_zero(scale[t]);
    }
    for (int i = 0; i < padded; i += kBlockLanes)
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
        const F v = F::load(w + i + kLanes * half);
#pragma GCC unroll 2
        for (int t = 0; t < kTogether; ++t) {
          const F e = round_even(clamp(v * inverse[t], low, high)) * scale[t] - v;
          sum[t][half] += e * e;
        }
      }
    for (int t = 0; t < kTogether && k + t < count; ++t) errors[k + t] = sum_block_lanes(sum[t][0], sum[t][1]);
  }
}
CLADO_LANES_KERNEL(read_block, (const void* weight, DType dtype, int count, float* out, int* padded),
                   (weight, dtype, count, out, padded))
CLADO_LANES_KERNEL(block_errors,
                   (const float* w, int padded, const float* scales, int count, float low, float high, float* errors),
                   (w, padded, scales, count, low, high, errors))

}  // namespace

void scale_errors_cpu(const WeightView& weight, const float* scales, int64_t count, int low, int high, double* errors,
                      int threads) {
  const int64_t groups = weight.groups(), all = weight.rows * groups;
  const int64_t blocks = blocks_of(std::min(weight.columns, weight.group_size));  // of a whole group
  if (all * blocks == 0 || count == 0) {
    std::fill(errors, errors + count * all, 0.0);
    return;
  }
  std::vector<float> parts(static_cast<size_t>(blocks > 1 ? all * blocks * count : 0));
  parallel_for(all * blocks, threads_for(weight.rows * weight.columns * count, threads), [&](int64_t i) {
    const int64_t index = i / blocks, row = index / groups, first = index % groups * weight.group_size;
    const int64_t length = std::min(weight.group_size, weight.columns - first), start = i % blocks * kBlock;
    if (start >= length) return;  // the last group may be shorter
    alignas(64) float w[kBlock];
    float own[kChunk], sums[kChunk];
    int padded = 0;
    read_block(weight.at(row, first + start), weight.dtype, static_cast<int>(std::min<int64_t>(kBlock, length - start)), w, &padded);
    for (int64_t c = 0; c < count; c += kChunk) {
      const int here = static_cast<int>(std::min(kChunk, count - c));
      for (int k = 0; k < here; ++k) own[k] = scales[(c + k) * all + index];
      block_errors(w, padded, own, here, static_cast<float>(low), static_cast<float>(high), sums);
      for (int k = 0; k < here; ++k) {
        if (blocks > 1)
          parts[static_cast<size_t>(i * count + c + k)] = sums[k];
        else
          errors[(c + k) * all + index] = settled(static_cast<double>(sums[k]));
      }
    }
  });
  for (int64_t index = 0; blocks > 1 && index < all; ++index)
    for (int64_t c = 0; c < count; ++c) {
      double sum = 0.0;
      for (int64_t part = 0; part < blocks; ++part)
        sum += static_cast<double>(parts[static_cast<size_t>((index * blocks + part) * count + c)]);
      errors[c * all + index] = settled(sum);
    }
}

}  // namespace clado
