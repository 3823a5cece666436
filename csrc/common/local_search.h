// One choice with everything that moves need: gradients, use of the budgets, value. Shared by iqp_search and iqp_prove.
#pragma once

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <vector>

#include "common/iqp_program.h"
#include "common/simd.h"

namespace clado {

// out[v] += a[v] - b[v]
CLADO_INLINE void add_difference_body(double* out, const double* a, const double* b, int64_t n) {
  for (int64_t v = 0; v < n; ++v) out[v] += a[v] - b[v];
}
CLADO_SIMD_KERNEL(add_difference, (double* out, const double* a, const double* b, int64_t n), (out, a, b, n))

// out[v] = base[v] + a[v] - b[v]
CLADO_INLINE void sum_difference_body(double* out, const double* base, const double* a, const double* b, int64_t n) {
  for (int64_t v = 0; v < n; ++v) out[v] = base[v] + (a[v] - b[v]);
}
CLADO_SIMD_KERNEL(sum_difference, (double* out, const double* base, const double* a, const double* b, int64_t n),
                  (out, base, a, b, n))

class Random {  // splitmix64
 public:
  explicit Random(uint64_t seed) : state_(seed) {}
  uint64_t next() {
    uint64_t z = (state_ += 0x9e3779b97f4a7c15ull);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return z ^ (z >> 31);
  }
  int64_t below(int64_t n) { return static_cast<int64_t>(next() % static_cast<uint64_t>(n)); }
  double uniform() { return static_cast<double>(next() >> 11) * 0x1.0p-53; }

 private:
  uint64_t state_;
};

using Clock = std::chrono::steady_clock;

// The moment `seconds` from now.
inline Clock::time_point after(double seconds) {
  return Clock::now() + std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(std::min(seconds, 1e6)));
}

// Past `end` every loop stops where it is, with a choice that is consistent.
class LocalSearch {
 public:
  LocalSearch(const IqpProgram& program, Clock::time_point end)
      : p_(program), end_(end), size_(program.starts[program.layers]), choice_(program.layers), layer_(size_), gradient_(size_), one_(size_),
        joint_(size_), use_(program.budgets), unit_(program.budgets) {
    double total = 0;
    for (int64_t i = 0; i < p_.layers; ++i)
      for (int64_t v = p_.starts[i]; v < p_.starts[i + 1]; ++v) layer_[v] = i, total += std::abs(own(v));
    epsilon_ = 1e-13 * total;
    for (int64_t r = 0; r < p_.budgets; ++r) {
      double largest = std::max(1.0, std::abs(static_cast<double>(p_.limits[r])));
      for (int64_t v = 0; v < size_; ++v) largest = std::max(largest, std::abs(static_cast<double>(row(r)[v])));
      unit_[r] = largest;
    }
  }

  int64_t size() const { return size_; }
  int64_t layer(int64_t v) const { return layer_[v]; }
  int64_t work() const { return work_; }
  double value() const { return value_; }
  double unit(int64_t r) const { return unit_[r]; }
  const std::vector<int64_t>& choice() const { return choice_; }
  const double* gradient() const { return gradient_.data(); }

  void set(const std::vector<int64_t>& choice) {
    choice_ = choice;
    for (int64_t v = 0; v < size_; ++v) gradient_[v] = own(v) / 2;
    for (int64_t i = 0; i < p_.layers; ++i) {
      const double* from = matrix(choice_[i]);
      for (int64_t v = 0; v < size_; ++v) gradient_[v] += from[v];
      gradient_[choice_[i]] -= from[choice_[i]];
    }
    work_ += p_.layers;
    value_ = 0;
    for (int64_t i = 0; i < p_.layers; ++i) value_ += gradient_[choice_[i]] / 2 + own(choice_[i]) / 4;
    for (int64_t r = 0; r < p_.budgets; ++r) {
      use_[r] = 0;
      for (int64_t i = 0; i < p_.layers; ++i) use_[r] += row(r)[choice_[i]];
    }
  }

  void move(int64_t v) {
    const int64_t i = layer_[v], old = choice_[i], low = p_.starts[i], count = p_.starts[i + 1] - low;
    value_ += gradient_[v] - gradient_[old];
    saved_.assign(gradient_.begin() + low, gradient_.begin() + low + count);
    add_difference(gradient_.data(), matrix(v), matrix(old), size_);
    std::copy(saved_.begin(), saved_.end(), gradient_.begin() + low);
    for (int64_t r = 0; r < p_.budgets; ++r) use_[r] += row(r)[v] - row(r)[old];
    choice_[i] = v;
    work_ += 2;
  }

  bool feasible() const {
    for (int64_t r = 0; r < p_.budgets; ++r)
      if (use_[r] > p_.limits[r]) return false;
    return true;
  }

  // Sum over budgets of the relative excess.
  double violation() const {
    double sum = 0;
    for (int64_t r = 0; r < p_.budgets; ++r) sum += std::max<double>(0, static_cast<double>(use_[r] - p_.limits[r])) / unit_[r];
    return sum;
  }

  // Layer by layer the best candidate at `prices` ([V], what a candidate costs on top of its loss), until nothing changes.
  void descend(const std::vector<double>& prices) {
    for (int sweep = 0; sweep < 50 && !late(); ++sweep) {
      bool changed = false;
      for (int64_t i = 0; i < p_.layers; ++i) {
        int64_t best = choice_[i];
        for (int64_t v = p_.starts[i]; v < p_.starts[i + 1]; ++v)
          if (gradient_[v] + prices[v] < gradient_[best] + prices[best] - epsilon_) best = v;
        if (best != choice_[i]) move(best), changed = true;
      }
      if (!changed) return;
    }
  }

  // One-layer moves with the least loss per violation removed until every budget holds; false when stuck or late.
  bool repair() {
    while (!feasible()) {
      if (late()) return false;
      const double now = violation();
      int64_t best = -1;
      double best_rate = 0;
      for (int64_t v = 0; v < size_; ++v) {
        const double removed = now - violation_after(v);
        if (removed <= 1e-15 * now) continue;
        const double change = gradient_[v] - gradient_[choice_[layer_[v]]];
        const double rate = change > 0 ? change / removed : change * removed;
        if (best < 0 || rate < best_rate) best = v, best_rate = rate;
      }
      if (best < 0) return false;
      move(best);
    }
    return true;
  }

  // Best feasible one-layer moves and pair exchanges until none helps. The choice must be feasible.
  void improve() {
    do {
      while (!late() && best_single()) {
      }
    } while (any_pair());
  }

  bool fits(int64_t v) const {
    for (int64_t r = 0; r < p_.budgets; ++r)
      if (use_[r] + row(r)[v] - row(r)[choice_[layer_[v]]] > p_.limits[r]) return false;
    return true;
  }

  bool fits(int64_t v, int64_t w) const {
    for (int64_t r = 0; r < p_.budgets; ++r) {
      const int64_t* use = row(r);
      if (use_[r] + use[v] - use[choice_[layer_[v]]] + use[w] - use[choice_[layer_[w]]] > p_.limits[r]) return false;
    }
    return true;
  }

  bool late() const { return Clock::now() >= end_; }

  double change(int64_t v) const { return gradient_[v] - gradient_[choice_[layer_[v]]]; }

  double change(int64_t v, int64_t w) const {
    const int64_t a = choice_[layer_[v]], b = choice_[layer_[w]];
    return change(v) + change(w) + matrix(v)[w] - matrix(v)[b] - matrix(a)[w] + matrix(a)[b];
  }

 private:
  double own(int64_t v) const { return p_.matrix[v * size_ + v]; }
  const double* matrix(int64_t v) const { return p_.matrix + v * size_; }
  const int64_t* row(int64_t r) const { return p_.rows + r * size_; }

  double violation_after(int64_t v) const {
    double sum = 0;
    for (int64_t r = 0; r < p_.budgets; ++r) {
      const int64_t after = use_[r] + row(r)[v] - row(r)[choice_[layer_[v]]] - p_.limits[r];
      sum += std::max<double>(0, static_cast<double>(after)) / unit_[r];
    }
    return sum;
  }

  bool best_single() {
    int64_t best = -1;
    double least = -epsilon_;
    for (int64_t i = 0; i < p_.layers; ++i)
      for (int64_t v = p_.starts[i]; v < p_.starts[i + 1]; ++v)
        if (gradient_[v] - gradient_[choice_[i]] < least && fits(v)) best = v, least = gradient_[v] - gradient_[choice_[i]];
    if (best >= 0) move(best);
    return best >= 0;
  }

  // For each layer in turn the best exchange with a later one; true after the first that helps.
  bool any_pair() {
    for (int64_t i = 0; i < p_.layers && !late(); ++i) {
      for (int64_t j = 0; j < p_.layers; ++j)
        for (int64_t w = p_.starts[j]; w < p_.starts[j + 1]; ++w) one_[w] = gradient_[w] - gradient_[choice_[j]];
      int64_t first = -1, second = -1;
      double least = -epsilon_;
      for (int64_t v = p_.starts[i]; v < p_.starts[i + 1]; ++v) {
        if (v == choice_[i]) continue;
        const double* to = matrix(v);
        const double* from = matrix(choice_[i]);
        sum_difference(joint_.data(), one_.data(), to, from, size_);
        work_ += 2;
        for (int64_t j = i + 1; j < p_.layers; ++j) {
          const double base = one_[v] - (to[choice_[j]] - from[choice_[j]]);
          for (int64_t w = p_.starts[j]; w < p_.starts[j + 1]; ++w)
            if (base + joint_[w] < least && w != choice_[j] && fits(v, w)) first = v, second = w, least = base + joint_[w];
        }
      }
      if (first >= 0) {
        move(first), move(second);
        return true;
      }
    }
    return false;
  }

  IqpProgram p_;
  Clock::time_point end_;
  int64_t size_, work_ = 0;
  double value_ = 0, epsilon_ = 0;
  std::vector<int64_t> choice_, layer_;
  std::vector<double> gradient_, one_, joint_, saved_;
  std::vector<int64_t> use_;
  std::vector<double> unit_;
};

}  // namespace clado
