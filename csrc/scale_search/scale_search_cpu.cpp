#include "scale_search/scale_search.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>
#include <vector>

#include "common/parallel.h"
#include "common/weights_cpu.h"

namespace clado {
namespace {

constexpr int kTogether = 2;    // steps that share one load of the weights
constexpr int kChunk = 8;       // steps between two looks at whether later ones can still win
constexpr int kKept = 16;       // blocks of a group that are kept as float32 between chunks
constexpr int64_t kPanel = 64;  // blocks of a long group whose errors are kept at a time

constexpr int padded_count(int count) { return (count + kBlockLanes - 1) / kBlockLanes * kBlockLanes; }

// A block of weights as float32, padded with zeros to whole lanes; returns the padded count.
template <class F, DType D>
CLADO_INLINE int read_typed(const void* weight, int count, float* out) {
  const int whole = count / kLanes * kLanes;
  for (int i = 0; i < whole; i += kLanes) store(out + i, load_weights<F, D>(weight, i));
  const int padded = padded_count(count);
  if (padded > whole) {
    alignas(64) char tail[2 * kBlockLanes * 4] = {};
    std::memcpy(tail, weights_at<D>(weight, whole), static_cast<size_t>((count - whole) * kWeightBytes<D>));
    for (int i = whole; i < padded; i += kLanes) store(out + i, load_weights<F, D>(tail, i - whole));
  }
  return padded;
}

template <class F>
CLADO_INLINE void read_block_body(const void* weight, DType dtype, int count, float* out, int* padded) {
  *padded = dtype == DType::float32   ? read_typed<F, DType::float32>(weight, count, out)
            : dtype == DType::float16 ? read_typed<F, DType::float16>(weight, count, out)
                                      : read_typed<F, DType::bfloat16>(weight, count, out);
}

// bottom = min(w, 0), top = max(w, 0), both NaN when something is not finite.
template <class F>
CLADO_INLINE void extremes_body(const float* w, int padded, float* bottom, float* top) {
  F least, largest, spoiled;  // the last becomes NaN with NaN or infinity
  for (int i = 0; i < padded; i += kLanes) {
    const F v = F::load(w + i);
    least = select(v < least, v, least);
    largest = select(v > largest, v, largest);
    spoiled += v * 0.0f;
  }
  float x[kLanes];
  store(x, least), *bottom = *std::min_element(x, x + kLanes);
  store(x, largest), *top = *std::max_element(x, x + kLanes);
  if (sum_halves(spoiled) != 0.0f) *bottom = *top = std::numeric_limits<float>::quiet_NaN();
}

// Importance of a block times `factor`, 0 beside weights of zero, whose error is 0 however large it is; *largest of these.
template <class F>
CLADO_INLINE void read_importance_body(const float* importance, const float* w, int count, float factor, float* out,
                                       float* largest) {
  F top;
  for (int i = 0; i < padded_count(count); i += kLanes) {
    const F h = select(F::load(w + i) == 0.0f, F{}, F::load_part(importance + i, count - i) * factor);
    store(out + i, h);
    top = select(h > top, h, top);
  }
  *largest = max_lanes(top);
}

// The nearest value of element E, 0 for integers between the limits.
template <int E, class F>
CLADO_INLINE F round_step(F x, float low, float high) {
  if constexpr (E == 0) return round_even(clamp(x, low, high));
  return round_element<E>(x);
}

// errors[k] = squared error of the block under scale 1 / inverse[k], in units of that scale, every element's times its h where
// Weighted; *clipped = the part of the last one that comes from elements beyond the limits.
template <class F, bool Weighted, int E>
CLADO_INLINE void rate(const float* w, const float* h, int padded, const float* inverse, int steps, float low, float high,
                       float* errors, float* clipped) {
  for (int k = 0; k < steps; k += kTogether) {
    F sum[kTogether][2];
    float inv[kTogether];
    for (int t = 0; t < kTogether; ++t) inv[t] = inverse[std::min(k + t, steps - 1)];
    for (int i = 0; i < padded; i += kBlockLanes)
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
        const F v = F::load(w + i + kLanes * half);
        F importance;
        if constexpr (Weighted) importance = F::load(h + i + kLanes * half);
#pragma GCC unroll 2
        for (int t = 0; t < kTogether; ++t) {
          const F x = v * inv[t], e = round_step<E>(x, low, high) - x;
          if constexpr (Weighted)
            sum[t][half] += importance * (e * e);
          else
            sum[t][half] += e * e;
        }
      }
    for (int t = 0; t < kTogether && k + t < steps; ++t) errors[k + t] = sum_block_lanes(sum[t][0], sum[t][1]);
  }
  F beyond;
  for (int i = 0; i < padded; i += kLanes) {
    const F x = F::load(w + i) * inverse[steps - 1], e = clamp(x, low, high) - x;
    if constexpr (Weighted)
      beyond += F::load(h + i) * (e * e);
    else
      beyond += e * e;
  }
  *clipped = sum_halves(beyond);
}
template <class F>
CLADO_INLINE void block_errors_body(const float* w, int padded, const float* inverse, int steps, float low, float high,
                                    float* errors, float* clipped) {
  rate<F, false, 0>(w, nullptr, padded, inverse, steps, low, high, errors, clipped);
}
template <class F>
CLADO_INLINE void weighted_errors_body(const float* w, const float* h, int padded, const float* inverse, int steps, float low,
                                       float high, float* errors, float* clipped) {
  rate<F, true, 0>(w, h, padded, inverse, steps, low, high, errors, clipped);
}
// Of a float element; `h` null: all count alike.
template <class F>
CLADO_INLINE void float_errors_body(int element, const float* w, const float* h, int padded, const float* inverse, int steps,
                                    float largest, float* errors, float* clipped) {
  const auto rated = [&](auto e) __attribute__((always_inline)) {
    constexpr int kElement = decltype(e)::value;
    if (h)
      rate<F, true, kElement>(w, h, padded, inverse, steps, -largest, largest, errors, clipped);
    else
      rate<F, false, kElement>(w, nullptr, padded, inverse, steps, -largest, largest, errors, clipped);
  };
  if (element == kE2M1) return rated(std::integral_constant<int, kE2M1>());
  if (element == kE4M3) return rated(std::integral_constant<int, kE4M3>());
  rated(std::integral_constant<int, kE5M2>());
}

CLADO_LANES_KERNEL(read_block, (const void* weight, DType dtype, int count, float* out, int* padded),
                   (weight, dtype, count, out, padded))
CLADO_LANES_KERNEL(extremes, (const float* w, int padded, float* bottom, float* top), (w, padded, bottom, top))
CLADO_LANES_KERNEL(block_errors,
                   (const float* w, int padded, const float* inverse, int steps, float low, float high, float* errors,
                    float* clipped),
                   (w, padded, inverse, steps, low, high, errors, clipped))
CLADO_LANES_KERNEL(read_importance,
                   (const float* importance, const float* w, int count, float factor, float* out, float* largest),
                   (importance, w, count, factor, out, largest))
CLADO_LANES_KERNEL(weighted_errors,
                   (const float* w, const float* h, int padded, const float* inverse, int steps, float low, float high,
                    float* errors, float* clipped),
                   (w, h, padded, inverse, steps, low, high, errors, clipped))
CLADO_LANES_KERNEL(float_errors,
                   (int element, const float* w, const float* h, int padded, const float* inverse, int steps, float largest,
                    float* errors, float* clipped),
                   (element, w, h, padded, inverse, steps, largest, errors, clipped))

struct Group {
  const void* weight;       // its first element
  const float* importance;  // of that; or null
  DType dtype;
  int64_t length;
  const void* at(int64_t block) const {
    return static_cast<const char*>(weight) + block * kBlock * weight_bytes(dtype);
  }
  int count(int64_t block) const { return static_cast<int>(std::min<int64_t>(kBlock, length - block * kBlock)); }
  int read(int64_t block, float* out) const {
    int padded = 0;
    read_block(at(block), dtype, count(block), out, &padded);
    return padded;
  }
  // h of a block whose weights are w; returns the largest.
  float weigh(int64_t block, const float* w, float factor, float* out) const {
    float largest = 0.0f;
    read_importance(importance + block * kBlock, w, count(block), factor, out, &largest);
    return largest;
  }
};

// The search of one target: steps are rated in order, a chunk at a time, until no later one can win.
class Search {
 public:
  // `counted`: the sum of what the elements count, or more.
  Search(const Grid& grid, int64_t counted) : grid_(grid), counted_(static_cast<double>(counted)), steps_(grid.count) {}

  bool over() const { return next_ >= steps_; }
  int chunk() const { return std::min(kChunk, steps_ - next_); }
  const Grid& grid() const { return grid_; }
  void inverses(float* out) const {
    for (int j = 0; j < chunk(); ++j) out[j] = 1.0f / grid_.scale(next_ + j);
  }

  // `sums`: of the chunk's steps, then the clipped part of its last one; in units of the scale.
  void take(const double* sums) {
    const int count = chunk();
    bool better = false;
    for (int j = 0; j < count; ++j) {
      const double scale = static_cast<double>(grid_.scale(next_ + j)), error = sums[j] * (scale * scale);
      if (best_ < 0 || error < least_) best_ = next_ + j, least_ = error, better = true;
    }
    // What is clipped only grows as the scale shrinks, and the error is at least that: later steps lose once it alone exceeds
    // the best error, with room for float32 (relative 1e-3, and 1e-4 of a step per element, more for large elements).
    const double scale = static_cast<double>(grid_.scale(next_ + count - 1));
    const double lost = (0.999 * std::sqrt(sums[count]) - static_cast<double>(grid_.room()) * std::sqrt(counted_)) * scale;
    next_ = !better && lost > 0 && lost * lost > least_ ? steps_ : next_ + count;
  }
  float best() const { return grid_.scale(best_); }

 private:
  Grid grid_;
  double counted_;
  int steps_, next_ = 0, best_ = -1;
  double least_ = 0.0;
};

// A run of targets with the same groups, and where they take what is found for one group.
struct Run {
  const Target* targets;
  int count;
  int64_t at;  // of the group among all

  Grid grid(int b, float bottom, float top, int steps) const {
    const Target& to = targets[b];
    return {bottom, top, to.element, to.zeros == nullptr, to.rule, to.tensor_scale ? *to.tensor_scale : 1.0f, steps};
  }
  void set(int b, float s, int z) const {
    targets[b].scales[at] = s;
    if (targets[b].zeros) targets[b].zeros[at] = static_cast<int8_t>(z);
  }
  // Of a group of zeros, or one that holds NaN or infinity.
  void set_all(float bottom) const {
    for (int b = 0; b < count; ++b) {
      const float below = targets[b].tensor_scale ? *targets[b].tensor_scale : 1.0f;
      set(b, bottom != bottom ? bottom : Grid::of_zeros(targets[b].rule, below), 0);
    }
  }
};

// Room of the calling thread for at least `count` of T; one room per Tag.
template <class T, int Tag>
T* room(int64_t count) {
  static thread_local std::vector<T> kept;
  if (kept.size() < static_cast<size_t>(count)) kept.resize(static_cast<size_t>(count));
  return kept.data();
}

// The scales of one group; the blocks of a long group are shared by the threads, a panel of them at a time.
template <bool Weighted>
void search_group(const Group& group, const Run& run, int steps, int threads) {
  const int64_t blocks = blocks_of(group.length);
  const bool keep = blocks <= kKept;
  alignas(64) static thread_local float kept[(Weighted ? 2 : 1) * kKept * kBlock];
  float* const shared = kept;  // of the calling thread, as the rooms below
  [[maybe_unused]] float* const shared_importance = Weighted ? kept + kKept * kBlock : nullptr;
  float *const bottoms = room<float, 0>(blocks), *const tops = room<float, 1>(blocks), *const largest = room<float, 2>(blocks);
  int* const padded = room<int, 0>(blocks);
  parallel_for(blocks, threads, [&](int64_t i) {
    alignas(64) float own[kBlock];
    float* w = keep ? shared + i * kBlock : own;
    padded[i] = group.read(i, w);
    extremes(w, padded[i], &bottoms[i], &tops[i]);
    if constexpr (Weighted) {
      alignas(64) float importance[kBlock];
      largest[i] = group.weigh(i, w, 1.0f, importance);
    }
  });
  float bottom = 0.0f, top = 0.0f;
  for (int64_t i = 0; i < blocks; ++i) {
    bottom = bottoms[i] < bottom || bottoms[i] != bottoms[i] ? bottoms[i] : bottom;  // NaN stays
    top = tops[i] > top || tops[i] != tops[i] ? tops[i] : top;
  }
  if (bottom != bottom || (bottom == 0.0f && top == 0.0f)) return run.set_all(bottom);
  [[maybe_unused]] float factor = 1.0f;
  if constexpr (Weighted) {
    const float most = *std::max_element(largest, largest + blocks);
    if (most == 0.0f) return search_group<false>(group, run, steps, threads);
    factor = leveller(most);
    for (int64_t i = 0; keep && i < blocks; ++i) group.weigh(i, shared + i * kBlock, factor, shared_importance + i * kBlock);
  }
  float* const panel = room<float, 3>(std::min(kPanel, blocks) * (kChunk + 1));
  for (int b = 0; b < run.count; ++b) {
    const int element = run.targets[b].element;
    const Grid grid = run.grid(b, bottom, top, steps);
    if (grid.count == 1) {
      run.set(b, grid.scale(0), grid.zero);
      continue;
    }
    Search search(grid, (Weighted ? kMostLevelled : 1) * group.length);
    while (!search.over()) {
      float inverse[kChunk];
      search.inverses(inverse);
      const int count = search.chunk();
      double sums[kChunk + 1] = {};
      for (int64_t start = 0; start < blocks; start += kPanel) {
        const int64_t here = std::min(kPanel, blocks - start);
        parallel_for(here, threads, [&](int64_t i) {
          alignas(64) float own[kBlock];
          const float* w = keep ? shared + (start + i) * kBlock : own;
          if (!keep) group.read(start + i, own);
          float* errors = panel + i * (kChunk + 1);
          const int size = padded[start + i];
          alignas(64) [[maybe_unused]] float own_importance[Weighted ? kBlock : 1];
          const float* h = nullptr;
          if constexpr (Weighted) {
            h = keep ? shared_importance + (start + i) * kBlock : own_importance;
            if (!keep) group.weigh(start + i, w, factor, own_importance);
          }
          if (is_float(element))
            float_errors(element, w, h, size, inverse, count, grid.high, errors, errors + count);
          else if (Weighted)
            weighted_errors(w, h, size, inverse, count, grid.low, grid.high, errors, errors + count);
          else
            block_errors(w, size, inverse, count, grid.low, grid.high, errors, errors + count);
        });
        for (int64_t i = 0; i < here; ++i)
          for (int j = 0; j <= count; ++j) sums[j] += static_cast<double>(panel[i * (kChunk + 1) + j]);
      }
      search.take(sums);
    }
    run.set(b, search.best(), grid.zero);
  }
}

// Group `index` of all that the run [first, last) of targets has.
void search_group(const WeightView& weight, const Importance& importance, const TargetList& targets, int first, int last,
                  int64_t index, int steps, int threads) {
  const Target& to = targets.at[first];
  const int64_t groups = to.groups(weight.columns), row = index / groups, start = index % groups * to.group_size;
  const Group part{weight.at(row, start), importance.at(weight, row, start), weight.dtype,
                   std::min(to.group_size, weight.columns - start)};
  const auto search = part.importance && steps > 1 ? search_group<true> : search_group<false>;
  search(part, {targets.at + first, last - first, index}, steps, threads);
}

// fn(first, last) of every run of targets that share their groups.
template <class Fn>
void for_each_run(const TargetList& targets, Fn fn) {
  for (int first = 0, last = 0; first < targets.count; first = last) fn(first, last = run_of(targets, first));
}

void search_row(const WeightView& weight, const Importance& importance, const TargetList& targets, int64_t row, int steps) {
  for_each_run(targets, [&](int first, int last) {
    const int64_t groups = targets.at[first].groups(weight.columns);
    for (int64_t g = 0; g < groups; ++g) search_group(weight, importance, targets, first, last, row * groups + g, steps, 1);
  });
}

bool sound(const float* importance, int64_t count) {
  bool spoiled = false;
  for (int64_t i = 0; i < count; ++i) spoiled |= !(importance[i] >= 0.0f) | !(importance[i] <= FLT_MAX);
  return !spoiled;
}

}  // namespace

void scale_search_row_cpu(const WeightView& weight, int64_t row, const TargetList& targets, int steps) {
  search_row(weight, {}, targets, row, steps);
}

bool scale_search_cpu(const WeightView& weight, const Importance& importance, const TargetList& targets, int steps, int threads) {
  if (importance.data && !sound(importance.data, importance.count * weight.columns)) return false;
  threads = threads_for(weight.rows * weight.columns * targets.count * steps, threads);
  if (weight.rows >= 4 * threads) {  // row by row, so that the weight comes from memory once
    parallel_for(weight.rows, threads, [&](int64_t row) { search_row(weight, importance, targets, row, steps); });
    return true;
  }
  for_each_run(targets, [&](int first, int last) {
    const int64_t all = weight.rows * targets.at[first].groups(weight.columns);
    const auto one = [&](int64_t i, int workers) { search_group(weight, importance, targets, first, last, i, steps, workers); };
    if (all >= 4 * threads || threads == 1) {
      parallel_for(all, threads, [&](int64_t i) { one(i, 1); });
    } else {
      for (int64_t i = 0; i < all; ++i) one(i, threads);
    }
  });
  return true;
}

}  // namespace clado
