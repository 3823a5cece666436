#include "iqp_search/iqp_search.h"

#include <limits>

#include "common/local_search.h"

namespace clado {
namespace {

class Portfolio {
 public:
  Portfolio(const IqpProgram& program, int64_t seed, int64_t work, double seconds, double target)
      : p_(program), search_(program, after(seconds)), random_(static_cast<uint64_t>(seed)), work_(work), target_(target) {}

  bool run(int64_t* choice) {
    if (choice[0] >= 0) offer_start(std::vector<int64_t>(choice, choice + p_.layers));
    cheapest();
    const int starts = 12;
    for (int k = 0; k < starts && !over(); ++k) priced_start();
    while (feasible_ && !over()) {
      anneal();
      for (int k = 0; k < 4 && !over(); ++k) iterate();
      for (int k = 0; k < 4 && !over(); ++k) priced_start();
    }
    for (int k = 0; k < 200 && !feasible_ && !over(); ++k) priced_start();
    std::copy(best_.begin(), best_.end(), choice);
    return feasible_;
  }

 private:
  bool over() { return search_.work() + steps_ / search_.size() >= work_ || (feasible_ && best_value_ <= target_) || search_.late(); }

  void offer() {
    if (search_.feasible()) {
      if (!feasible_ || search_.value() < best_value_) best_ = search_.choice(), best_value_ = search_.value(), feasible_ = true;
    } else if (!feasible_ && search_.violation() < best_violation_) {
      best_ = search_.choice(), best_violation_ = search_.violation();
    }
  }

  void offer_start(const std::vector<int64_t>& choice) {
    search_.set(choice);
    if (search_.repair()) search_.improve();
    offer();
  }

  // The choice that uses least of all budgets together.
  void cheapest() {
    std::vector<int64_t> choice(p_.layers);
    for (int64_t i = 0; i < p_.layers; ++i) {
      double least = std::numeric_limits<double>::infinity();
      for (int64_t v = p_.starts[i]; v < p_.starts[i + 1]; ++v) {
        double use = 0;
        for (int64_t r = 0; r < p_.budgets; ++r) use += static_cast<double>(p_.rows[r * search_.size() + v]) / search_.unit(r);
        if (use < least) least = use, choice[i] = v;
      }
    }
    search_.set(choice);
    offer();
    offer_start(choice);
  }

  std::vector<int64_t> random_choice() {
    std::vector<int64_t> choice(p_.layers);
    for (int64_t i = 0; i < p_.layers; ++i) choice[i] = p_.starts[i] + random_.below(p_.starts[i + 1] - p_.starts[i]);
    return choice;
  }

  // Prices rise from a random start until the descent meets the budgets, then halve the interval a few times.
  void priced_start() {
    const int64_t size = search_.size();
    std::vector<double> direction(size, 0.0), prices(size);
    for (int64_t r = 0; r < p_.budgets; ++r) {
      const double weight = (r == 0 ? 1.0 : 2.0 * random_.uniform()) / search_.unit(r);
      for (int64_t v = 0; v < size; ++v) direction[v] += weight * static_cast<double>(p_.rows[r * size + v]);
    }
    double typical = 0;
    for (int64_t v = 0; v < size; ++v) typical += std::abs(p_.matrix[v * size + v]);
    double low = 0, high = (0.1 + random_.uniform()) * typical / static_cast<double>(p_.layers);
    search_.set(random_choice());
    bool inside = false;
    for (int k = 0; k < 16; ++k) {
      const double price = inside ? (low + high) / 2 : (k == 0 ? 0.0 : high);
      for (int64_t v = 0; v < size; ++v) prices[v] = price * direction[v];
      search_.descend(prices);
      if (search_.feasible()) {
        const std::vector<int64_t> kept = search_.choice();
        search_.improve();
        offer();
        if (price == 0.0 || inside) {
          if (price == 0.0 || high - low < 0.05 * high) return;
        }
        search_.set(kept);
        inside = true, high = price;
      } else {
        if (inside) low = price;
        else if (k > 0) low = high, high *= 4;
      }
      if (over()) return;
    }
    if (search_.repair()) search_.improve();
    offer();
  }

  // From the best choice: kick a few layers, repair, improve; keep what is not much worse.
  void iterate() {
    search_.set(best_);
    std::vector<int64_t> current = best_;
    double current_value = best_value_;
    const int rounds = 25;
    for (int k = 0; k < rounds && !over(); ++k) {
      const int64_t kicks = 2 + random_.below(std::max<int64_t>(2, std::min<int64_t>(12, p_.layers / 5)));
      for (int64_t n = 0; n < kicks; ++n) {
        const int64_t i = random_.below(p_.layers), v = p_.starts[i] + random_.below(p_.starts[i + 1] - p_.starts[i]);
        if (v != search_.choice()[i]) search_.move(v);
      }
      if (search_.repair()) {
        search_.improve();
        offer();
        const double slack = 0.02 * random_.uniform() * random_.uniform() * (std::abs(best_value_) + 1e-300);
        if (search_.value() < current_value + slack) {
          current = search_.choice(), current_value = search_.value();
          continue;
        }
      }
      search_.set(current);
    }
  }

  // Metropolis over feasible one-layer moves and pair exchanges, from the best choice, cooling geometrically.
  void anneal() {
    if (p_.layers < 2) return;
    search_.set(best_);
    double typical = 0;
    for (int64_t v = 0; v < search_.size(); ++v) typical += std::abs(search_.change(v));
    typical /= static_cast<double>(search_.size());
    const int64_t steps = 60 * search_.size();
    double temperature = 0.3 * typical * (0.3 + random_.uniform());
    const double cooling = std::pow(1e-3, 1.0 / static_cast<double>(steps));
    for (int64_t k = 0; k < steps; ++k, temperature *= cooling) {
      ++steps_;
      if (k % 256 == 0 && over()) break;
      const int64_t v = random_.below(search_.size()), i = search_.layer(v);
      if (v == search_.choice()[i]) continue;
      const double threshold = -temperature * std::log(1.0 - random_.uniform());
      if (search_.fits(v)) {
        if (search_.change(v) <= threshold) search_.move(v);
        continue;
      }
      const int64_t w = random_.below(search_.size()), j = search_.layer(w);
      if (i == j || w == search_.choice()[j] || !search_.fits(v, w)) continue;
      if (search_.change(v, w) <= threshold) search_.move(v), search_.move(w);
    }
    search_.set(search_.choice());  // clears the rounding of many moves
    search_.improve();
    offer();
  }

  IqpProgram p_;
  LocalSearch search_;
  Random random_;
  int64_t work_, steps_ = 0;
  double target_;
  std::vector<int64_t> best_;
  double best_value_ = std::numeric_limits<double>::infinity();
  double best_violation_ = std::numeric_limits<double>::infinity();
  bool feasible_ = false;
};

}  // namespace

bool iqp_search_cpu(const IqpProgram& program, int64_t* choice, int64_t seed, int64_t work, double seconds, double target) {
  return Portfolio(program, seed, work, seconds, target).run(choice);
}

}  // namespace clado
