#include "scale_search/scale_search.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "common/parallel.h"
#include "common/weights_cpu.h"

namespace clado {
namespace {

// Steps that share one load of the weights; more would spill the accumulators of AVX2.
constexpr int kTogether = 2;

CLADO_INLINE void absmax_body(const float* w, int padded, float* result) {
  Float16x largest{};
  Float16x spoiled{};  // becomes NaN with NaN or infinity
  for (int i = 0; i < padded; i += kLanes) {
    const Float16x v = load(w + i), a = abs(v);
    largest = a > largest ? a : largest;
    spoiled += v * 0.0f;
  }
  float x[kLanes];
  store(x, largest);
  *result = *std::max_element(x, x + kLanes);
  if (sum_halves(spoiled) != 0.0f) *result = std::numeric_limits<float>::quiet_NaN();
}

// errors[k] = squared error of the block under scale 1 / inverse[k], in units of that scale.
CLADO_INLINE void block_errors_body(const float* w, int padded, const float* inverse, int steps, float low,
                                    float high, float* errors) {
  for (int k = 0; k < steps; k += kTogether) {
    Float16x sum[kTogether][2] = {};
    float inv[kTogether];
    for (int t = 0; t < kTogether; ++t) inv[t] = inverse[std::min(k + t, steps - 1)];
    for (int i = 0; i < padded; i += kBlockLanes)
      for (int half = 0; half < 2; ++half) {
        const Float16x v = load(w + i + kLanes * half);
        for (int t = 0; t < kTogether; ++t) {
          const Float16x x = v * inv[t], e = round_even(clamp(x, low, high)) - x;
          sum[t][half] += e * e;
        }
      }
    for (int t = 0; t < kTogether && k + t < steps; ++t) errors[k + t] = sum_block_lanes(sum[t][0], sum[t][1]);
  }
}

CLADO_SIMD_KERNEL(absmax, (const float* w, int padded, float* result), (w, padded, result))
CLADO_SIMD_KERNEL(block_errors,
                  (const float* w, int padded, const float* inverse, int steps, float low, float high, float* errors),
                  (w, padded, inverse, steps, low, high, errors))

inline int padded_to_lanes(int count) { return (count + kBlockLanes - 1) / kBlockLanes * kBlockLanes; }

struct Grid {
  float scale[kMaxSteps], inverse[kMaxSteps];
  Grid(float largest, int bits, int steps) {
    const float first = largest / static_cast<float>(highest_code(bits));
    for (int k = 0; k < steps; ++k) {
      scale[k] = std::max(first * (static_cast<float>(100 - k) / 100.0f), FLT_MIN);
      inverse[k] = 1.0f / scale[k];
    }
  }
  float best(const double* sums, int steps) const {
    double errors[kMaxSteps];
    for (int k = 0; k < steps; ++k) errors[k] = sums[k] * (static_cast<double>(scale[k]) * static_cast<double>(scale[k]));
    return scale[std::min_element(errors, errors + steps) - errors];
  }
};

struct Group {
  const void* weight;
  DType dtype;
  int64_t first, length;
  int count(int64_t block) const { return static_cast<int>(std::min<int64_t>(kBlock, length - block * kBlock)); }
  void read(int64_t block, float* out) const { read_block(weight, dtype, first + block * kBlock, count(block), out); }
};

// The scales of one group; the blocks of a long group are shared by the threads, a panel of them at a time.
void search_group(const Group& group, float* scales, int64_t stride, const int32_t* bits, int num_bits, int steps, int threads) {
  constexpr int64_t kPanel = 64;
  const int64_t blocks = blocks_of(group.length);
  std::vector<float> largest(static_cast<size_t>(blocks));
  parallel_for(blocks, threads, [&](int64_t block) {
    alignas(64) float w[kBlock];
    group.read(block, w);
    absmax(w, padded_to_lanes(group.count(block)), &largest[static_cast<size_t>(block)]);
  });
  float whole = 0.0f;
  for (const float x : largest) whole = x > whole || x != x ? x : whole;  // NaN stays
  std::vector<Grid> grids;
  for (int b = 0; b < num_bits; ++b) grids.emplace_back(whole, bits[b], steps);
  std::vector<double> total(static_cast<size_t>(num_bits * steps), 0.0);
  if (steps > 1 && whole > 0.0f) {
    std::vector<float> panel(static_cast<size_t>(std::min(kPanel, blocks) * num_bits * steps));
    for (int64_t start = 0; start < blocks; start += kPanel) {
      const int64_t count = std::min(kPanel, blocks - start);
      parallel_for(count, threads, [&](int64_t i) {
        alignas(64) float w[kBlock];
        group.read(start + i, w);
        const int padded = padded_to_lanes(group.count(start + i));
        for (int b = 0; b < num_bits; ++b)
          block_errors(w, padded, grids[static_cast<size_t>(b)].inverse, steps,
                       static_cast<float>(lowest_code(bits[b])), static_cast<float>(highest_code(bits[b])),
                       &panel[static_cast<size_t>((i * num_bits + b) * steps)]);
      });
      for (int64_t i = 0; i < count; ++i)
        for (int j = 0; j < num_bits * steps; ++j)
          total[static_cast<size_t>(j)] += static_cast<double>(panel[static_cast<size_t>(i * num_bits * steps + j)]);
    }
  }
  for (int b = 0; b < num_bits; ++b)
    scales[b * stride] = whole == 0.0f   ? 1.0f
                         : whole != whole ? whole
                                          : grids[static_cast<size_t>(b)].best(&total[static_cast<size_t>(b * steps)], steps);
}

}  // namespace

void scale_search_cpu(const void* weight, int dtype, float* scales, int64_t rows, int64_t columns, int64_t group_size,
                      const int32_t* bits, int num_bits, int steps, int threads) {
  const int64_t groups = (columns + group_size - 1) / group_size, all = rows * groups;
  const auto group_at = [&](int64_t index) {
    const int64_t row = index / groups, start = index % groups * group_size;
    return Group{weight, static_cast<DType>(dtype), row * columns + start, std::min(group_size, columns - start)};
  };
  if (all >= 4 * threads || threads == 1) {
    parallel_for(all, threads, [&](int64_t i) { search_group(group_at(i), scales + i, all, bits, num_bits, steps, 1); });
  } else {
    for (int64_t i = 0; i < all; ++i) search_group(group_at(i), scales + i, all, bits, num_bits, steps, threads);
  }
}

}  // namespace clado
