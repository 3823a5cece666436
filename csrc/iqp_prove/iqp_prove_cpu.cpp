#include "iqp_prove/iqp_prove.h"

#include <deque>
#include <limits>
#include <memory>

#include "common/local_search.h"
#include "common/parallel.h"

namespace clado {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr int kTogether = 32;  // nodes expanded at a time; more would be taken before better ones are known
constexpr int64_t kAlone = int64_t{1} << 25;  // nodes x V² that stay on the caller's thread: some tens of milliseconds
constexpr size_t kQueueBytes = size_t{512} << 20;  // beyond this much, the newest node is taken instead of the best

// out[v] += s * a[v]
CLADO_INLINE void add_scaled_body(double* out, const double* a, double s, int64_t n) {
  for (int64_t v = 0; v < n; ++v) out[v] += s * a[v];
}
CLADO_SIMD_KERNEL(add_scaled, (double* out, const double* a, double s, int64_t n), (out, a, s, n))

// Room for the descent in one layer: its candidates, their slopes, how far x moved, and curvatures. Few candidates are served
// from the stack by loops whose bound the compiler knows, which saves a twentieth of a proof; any number from memory.
constexpr int kFew = 8;
struct Few {
  int64_t candidate[kFew];
  double slope[kFew], moved[kFew], curve[kFew][kFew];
};
struct Many {
  std::vector<int64_t> candidate;
  std::vector<double> slope, moved;
  std::vector<std::vector<double>> curve;
  explicit Many(size_t most = 0) : candidate(most), slope(most), moved(most), curve(most, std::vector<double>(most)) {}
};

struct Node {
  double bound;
  int64_t order;
  std::vector<uint8_t> alive;
  std::vector<float> x;
  std::vector<double> multipliers;
};

struct Later {
  bool operator()(const std::unique_ptr<Node>& a, const std::unique_ptr<Node>& b) const {
    return a->bound != b->bound ? a->bound > b->bound : a->order < b->order;
  }
};

// The convex relaxation over the candidates that are alive.
class Relaxation {
 public:
  Relaxation(const IqpProgram& program, const IqpForm& form, Clock::time_point end)
      : p_(program), f_(form), end_(end), size_(program.starts[program.layers]), x_(size_), gradient_(size_), reduced_(size_),
        use_(program.budgets * size_), limit_(program.budgets), residual_(program.budgets), lambda_(program.budgets),
        mu_(program.budgets), stiffness_(program.budgets), quiet_(size_) {
    for (int64_t r = 0; r < p_.budgets; ++r) {
      const int64_t* row = p_.rows + r * size_;
      double unit = std::max(1.0, std::abs(static_cast<double>(p_.limits[r])));
      for (int64_t v = 0; v < size_; ++v) unit = std::max(unit, std::abs(static_cast<double>(row[v])));
      for (int64_t v = 0; v < size_; ++v) use_[r * size_ + v] = static_cast<double>(row[v]) / unit;
      limit_[r] = static_cast<double>(p_.limits[r]) / unit;
      units_.push_back(unit);
    }
    for (int64_t v = 0; v < size_; ++v) {
      const double* row = quadratic(v);
      quiet_[v] = std::all_of(row, row + size_, [](double q) { return q == 0; });
    }
    int64_t most = 0;
    for (int64_t i = 0; i < p_.layers; ++i) most = std::max(most, p_.starts[i + 1] - p_.starts[i]);
    if (most > kFew) many_ = Many(most);
    set_stiffness();
  }

  double unit(int64_t r) const { return units_[r]; }
  const std::vector<double>& x() const { return x_; }
  const std::vector<double>& multipliers() const { return best_mu_; }
  double bound() const { return bound_; }
  // By how much the bound rises where candidate v is taken.
  double reduced_cost(int64_t v) const { return reduced_[v]; }

  // Sets x to `start` on the candidates alive (spread evenly where nothing is left), and everything that follows from it.
  template <class T>
  void set(const std::vector<uint8_t>& alive, const std::vector<T>& start, const std::vector<double>& multipliers) {
    alive_ = &alive;
    active_.clear();
    for (int64_t i = 0; i < p_.layers; ++i) {
      double sum = 0;
      int64_t count = 0;
      for (int64_t v = p_.starts[i]; v < p_.starts[i + 1]; ++v) {
        x_[v] = alive[v] ? std::max(0.0, static_cast<double>(start[v])) : 0;
        sum += x_[v], count += alive[v];
      }
      for (int64_t v = p_.starts[i]; v < p_.starts[i + 1]; ++v)
        if (alive[v]) x_[v] = sum > 1e-3 ? x_[v] / sum : 1.0 / static_cast<double>(count);
      if (count > 1) active_.push_back(i);
    }
    restore();
    gradient_ = linear_;
    for (int64_t v = 0; v < size_; ++v)
      if (x_[v] != 0 && !quiet_[v]) add_scaled(gradient_.data(), quadratic(v), x_[v], size_);
    lambda_ = multipliers;
    for (int64_t r = 0; r < p_.budgets; ++r) {
      residual_[r] = -limit_[r];
      for (int64_t v = 0; v < size_; ++v) residual_[r] += use_[r * size_ + v] * x_[v];
    }
    bound_ = -kInfinity;
  }

  // Sweeps until the bound reaches `cutoff`, is within `patience` of what x allows (relative to what is missing to `cutoff`),
  // stops rising, or `sweeps` or the time are over.
  void ascend(double cutoff, int sweeps, double patience, int period) {
    measure();
    double before = bound_;
    for (int k = 1; k <= sweeps && bound_ < cutoff && Clock::now() < end_; ++k) {
      for (int64_t i : active_) update(i);
      for (int64_t r = 0; r < p_.budgets; ++r) lambda_[r] = multiplier(r);
      measure();
      const double missing = cutoff - bound_;
      if (gap_ < patience * missing && last_ > bound_ - patience * missing) return;
      if (k % period == 0) {
        if (bound_ - before < 0.05 * missing) return;
        before = bound_;
      }
    }
  }

  // How much branching on a layer promises: the sum over its candidates of log(rise of the bound when it is taken), where the
  // rise is the reduced cost plus the curvature on the way from x.
  double promise(int64_t i) const {
    double self = 0, sum = 0;
    for (int64_t v = p_.starts[i]; v < p_.starts[i + 1]; ++v)
      for (int64_t w = p_.starts[i]; w < p_.starts[i + 1]; ++w) self += x_[v] * x_[w] * quadratic(v)[w];
    for (int64_t v = p_.starts[i]; v < p_.starts[i + 1]; ++v) {
      if (!(*alive_)[v]) continue;
      double cross = 0;
      for (int64_t w = p_.starts[i]; w < p_.starts[i + 1]; ++w) cross += x_[w] * quadratic(v)[w];
      sum += std::log(std::max(1e-9, reduced_[v] + (quadratic(v)[v] - 2 * cross + self) / 2));
    }
    return sum;
  }

  const std::vector<int64_t>& active() const { return active_; }

 private:
  const double* quadratic(int64_t v) const { return f_.quadratic + v * size_; }
  double multiplier(int64_t r) const { return std::max(0.0, lambda_[r] + stiffness_[r] * residual_[r]); }

  // The linear part at this node: with x_v = 1 the product x_v x_w that was removed is x_w.
  void restore() {
    linear_.assign(f_.linear, f_.linear + size_);
    if (!f_.removed) return;
    fixed_.clear();
    for (int64_t i = 0; i < p_.layers; ++i) {
      int64_t count = 0, last = -1;
      for (int64_t v = p_.starts[i]; v < p_.starts[i + 1]; ++v)
        if ((*alive_)[v]) last = v, ++count;
      if (count == 1) fixed_.push_back(last);
    }
    for (int64_t v : fixed_) add_scaled(linear_.data(), f_.removed + v * size_, 1.0, size_);
    for (int64_t v : fixed_) linear_[v] = f_.linear[v] + (linear_[v] - f_.linear[v]) / 2;  // a pair of fixed ones counts once
  }

  // Penalty weights that match the curvature of a typical exchange inside a layer.
  void set_stiffness() {
    double curvature = 0;
    std::vector<double> change(p_.budgets, 0.0);
    for (int64_t i = 0; i < p_.layers; ++i)
      for (int64_t v = p_.starts[i]; v + 1 < p_.starts[i + 1]; ++v) {
        curvature += quadratic(v)[v] + quadratic(v + 1)[v + 1] - 2 * quadratic(v)[v + 1];
        for (int64_t r = 0; r < p_.budgets; ++r) change[r] += std::pow(use_[r * size_ + v + 1] - use_[r * size_ + v], 2);
      }
    for (int64_t r = 0; r < p_.budgets; ++r) {
      const double start = f_.multipliers[r] * units_[r];
      stiffness_[r] = change[r] > 0 ? (0.1 * curvature) / change[r] + 10 * start : 0;
    }
  }

  // Exact enough minimisation over one layer's simplex by pairwise exchanges.
  void update(int64_t i) {
    if (p_.starts[i + 1] - p_.starts[i] > kFew) return update(i, many_);
    Few few;
    update(i, few);
  }
  template <class Room>
  CLADO_INLINE void update(int64_t i, Room& room) {
    auto& [v, h, moved, curve] = room;
    int n = 0;
    for (int64_t c = p_.starts[i]; c < p_.starts[i + 1]; ++c)
      if ((*alive_)[c]) v[n++] = c;
    for (int64_t r = 0; r < p_.budgets; ++r) mu_[r] = multiplier(r);
    for (int a = 0; a < n; ++a) {
      moved[a] = 0;
      h[a] = gradient_[v[a]];
      for (int64_t r = 0; r < p_.budgets; ++r) h[a] += mu_[r] * use_[r * size_ + v[a]];
      for (int b = 0; b < n; ++b) {
        curve[a][b] = quadratic(v[a])[v[b]];
        for (int64_t r = 0; r < p_.budgets; ++r)
          curve[a][b] += stiffness_[r] * use_[r * size_ + v[a]] * use_[r * size_ + v[b]];
      }
    }
    for (int step = 0; step < 3 * n; ++step) {
      int low = 0, high = -1;
      for (int a = 0; a < n; ++a) {
        if (h[a] < h[low]) low = a;
        if (x_[v[a]] > 0 && (high < 0 || h[a] > h[high])) high = a;
      }
      const double slope = h[high] - h[low];
      if (slope <= 1e-11 * (std::abs(h[high]) + std::abs(h[low]))) break;
      const double bend = curve[low][low] + curve[high][high] - 2 * curve[low][high];
      const double full = x_[v[high]];
      const double t = bend * full > slope ? slope / bend : full;
      x_[v[high]] = t == full ? 0 : full - t;
      x_[v[low]] += t;
      moved[high] -= t, moved[low] += t;
      for (int a = 0; a < n; ++a) h[a] += t * (curve[a][low] - curve[a][high]);
    }
    for (int a = 0; a < n; ++a) {
      if (moved[a] == 0) continue;
      if (!quiet_[v[a]]) add_scaled(gradient_.data(), quadratic(v[a]), moved[a], size_);
      for (int64_t r = 0; r < p_.budgets; ++r) residual_[r] += moved[a] * use_[r * size_ + v[a]];
    }
  }

  // The bound at x and the present multipliers; kept with its reduced costs when it is the best so far.
  void measure() {
    double curved = 0, least = 0, excess = 0, fixed = 0;
    for (int64_t r = 0; r < p_.budgets; ++r) mu_[r] = multiplier(r), fixed -= mu_[r] * limit_[r];
    for (int64_t v = 0; v < size_; ++v) curved += x_[v] * (gradient_[v] - linear_[v]);
    scratch_.resize(size_);
    for (int64_t i = 0; i < p_.layers; ++i) {
      double smallest = kInfinity;
      for (int64_t v = p_.starts[i]; v < p_.starts[i + 1]; ++v) {
        if (!(*alive_)[v]) continue;
        double h = gradient_[v];
        for (int64_t r = 0; r < p_.budgets; ++r) h += mu_[r] * use_[r * size_ + v];
        scratch_[v] = h;
        smallest = std::min(smallest, h);
      }
      least += smallest;
      for (int64_t v = p_.starts[i]; v < p_.starts[i + 1]; ++v) {
        scratch_[v] = (*alive_)[v] ? scratch_[v] - smallest : kInfinity;
        if (x_[v] > 0) excess += x_[v] * scratch_[v];
      }
    }
    last_ = f_.constant - curved / 2 + least + fixed - f_.slack;
    gap_ = excess;
    if (last_ > bound_) bound_ = last_, reduced_.swap(scratch_), best_mu_ = mu_;
  }

  IqpProgram p_;
  IqpForm f_;
  Clock::time_point end_;
  int64_t size_;
  const std::vector<uint8_t>* alive_ = nullptr;
  std::vector<double> x_, linear_, gradient_, reduced_, scratch_, use_, limit_, residual_, lambda_, mu_, best_mu_, stiffness_, units_;
  std::vector<uint8_t> quiet_;
  std::vector<int64_t> active_, fixed_;
  Many many_;
  double bound_ = -kInfinity, last_ = -kInfinity, gap_ = 0;
};

// What became of a node: its children, none where it was closed, and the best feasible choice met on the way, if any.
struct Grown {
  std::vector<std::unique_ptr<Node>> children;
  std::vector<int64_t> choice;
  double value = kInfinity;
  bool late = false;  // there was no time to expand it
};

// Everything one thread needs to expand nodes.
class Expansion {
 public:
  Expansion(const IqpProgram& program, const IqpForm& form, double tolerance, Clock::time_point end)
      : p_(program), size_(program.starts[program.layers]), relaxation_(program, form, end), local_(program, end), tolerance_(tolerance) {}

  double unit(int64_t r) const { return relaxation_.unit(r); }

  // A choice from outside.
  Grown given(const int64_t* choice) {
    grown_ = Grown();
    local_.set(std::vector<int64_t>(choice, choice + p_.layers));
    offer();
    return std::move(grown_);
  }

  // Bounds the node, removes candidates that are in no choice below `cutoff`, and branches. `rounded`: looks for a choice near
  // the relaxation's; `left`: of the root, receives what is alive.
  Grown expand(Node& node, double cutoff, bool rounded, std::vector<uint8_t>* left) {
    grown_ = Grown(), given_ = cutoff;
    grown_.late = !left && local_.late();
    if (!grown_.late) grow(node, rounded, left);
    if (left) *left = node.alive;
    return std::move(grown_);
  }

 private:
  double cutoff() const { return std::min(given_, grown_.value - tolerance_); }

  void offer() {
    if (local_.feasible() && local_.value() < grown_.value) grown_.choice = local_.choice(), grown_.value = local_.value();
  }

  // Removes candidates that overrun a budget beside the cheapest of all other layers; false when a layer runs empty.
  bool reach(std::vector<uint8_t>& alive) {
    for (bool changed = true; changed;) {
      changed = false;
      for (int64_t r = 0; r < p_.budgets; ++r) {
        const int64_t* row = p_.rows + r * size_;
        least_.assign(p_.layers, std::numeric_limits<int64_t>::max());
        int64_t total = 0;
        for (int64_t i = 0; i < p_.layers; ++i) {
          for (int64_t v = p_.starts[i]; v < p_.starts[i + 1]; ++v)
            if (alive[v]) least_[i] = std::min(least_[i], row[v]);
          if (least_[i] == std::numeric_limits<int64_t>::max()) return false;
          total += least_[i];
        }
        if (total > p_.limits[r]) return false;
        for (int64_t v = 0; v < size_; ++v)
          if (alive[v] && total - least_[local_.layer(v)] + row[v] > p_.limits[r]) alive[v] = 0, changed = true;
      }
    }
    return true;
  }

  bool every_layer(const std::vector<uint8_t>& alive) const {
    for (int64_t i = 0; i < p_.layers; ++i)
      if (std::none_of(alive.begin() + p_.starts[i], alive.begin() + p_.starts[i + 1], [](uint8_t a) { return a != 0; })) return false;
    return true;
  }

  void round() {
    std::vector<int64_t> choice(p_.layers);
    for (int64_t i = 0; i < p_.layers; ++i)
      choice[i] = std::max_element(relaxation_.x().begin() + p_.starts[i], relaxation_.x().begin() + p_.starts[i + 1]) -
                  relaxation_.x().begin();
    local_.set(choice);
    if (local_.repair()) local_.improve();
    offer();
  }

  void grow(Node& node, bool rounded, bool root) {
    std::vector<uint8_t>& alive = node.alive;
    std::vector<double> x(node.x.begin(), node.x.end());
    double bound = node.bound;
    for (int pass = 0; pass < (root ? 6 : 3); ++pass) {
      if (!every_layer(alive) || !reach(alive)) return;
      relaxation_.set(alive, x, pass == 0 ? node.multipliers : relaxation_.multipliers());
      if (root) relaxation_.ascend(cutoff(), 1000, 0.01, 30);
      else relaxation_.ascend(cutoff(), 40, 0.3, 8);
      bound = std::max(bound, relaxation_.bound());
      x = relaxation_.x();
      if (root || (pass == 0 && rounded)) round();
      if (relaxation_.active().empty()) return round();
      bool removed = false;
      for (int64_t v = 0; v < size_; ++v)
        if (alive[v] && relaxation_.bound() + relaxation_.reduced_cost(v) >= cutoff()) alive[v] = 0, removed = true;
      if (bound >= cutoff()) return;
      if (!removed) break;
    }
    if (every_layer(alive) && reach(alive)) branch(alive, x, bound);
  }

  void branch(const std::vector<uint8_t>& alive, const std::vector<double>& x, double bound) {
    int64_t pick = -1;
    double most = -kInfinity;
    for (int64_t i : relaxation_.active()) {
      int64_t count = 0;
      for (int64_t v = p_.starts[i]; v < p_.starts[i + 1]; ++v) count += alive[v];
      const double score = relaxation_.promise(i);
      if (count > 1 && score > most) pick = i, most = score;
    }
    if (pick < 0) return leaf(alive);  // everything became fixed by the last removal
    for (int64_t v = p_.starts[pick]; v < p_.starts[pick + 1]; ++v) {
      if (!alive[v]) continue;
      auto child = std::make_unique<Node>();
      child->bound = std::max(bound, relaxation_.bound() + relaxation_.reduced_cost(v));
      child->alive = alive;
      for (int64_t w = p_.starts[pick]; w < p_.starts[pick + 1]; ++w) child->alive[w] = w == v;
      child->x.assign(x.begin(), x.end());
      child->multipliers = relaxation_.multipliers();
      grown_.children.push_back(std::move(child));
    }
  }

  void leaf(const std::vector<uint8_t>& alive) {
    std::vector<int64_t> choice(p_.layers);
    for (int64_t v = 0; v < size_; ++v)
      if (alive[v]) choice[local_.layer(v)] = v;
    local_.set(choice);
    offer();
  }

  IqpProgram p_;
  int64_t size_;
  Relaxation relaxation_;
  LocalSearch local_;
  std::vector<int64_t> least_;
  Grown grown_;
  double tolerance_, given_ = kInfinity;
};

// The open nodes and the best choice. Nodes are expanded so many at a time, whatever the number of threads, and what becomes of
// them is taken in their order: the tree is the same on any machine.
class Tree {
 public:
  Tree(const IqpProgram& program, const IqpForm& form, double tolerance, int64_t nodes, double seconds, int threads)
      : p_(program), form_(form), size_(program.starts[program.layers]), end_(after(seconds)), tolerance_(tolerance), most_(nodes) {
    for (int k = 0; k < std::max(1, std::min(threads, kTogether)); ++k) workers_.emplace_back(program, form, tolerance, end_);
  }

  IqpProof run(int64_t* choice, uint8_t* alive) {
    if (choice[0] >= 0) take(workers_[0].given(choice));
    auto root = std::make_unique<Node>();
    root->bound = -kInfinity, root->order = 0;
    root->alive.assign(size_, 1);
    root->x.assign(form_.point, form_.point + size_);
    for (int64_t r = 0; r < p_.budgets; ++r) root->multipliers.push_back(form_.multipliers[r] * workers_[0].unit(r));
    std::vector<uint8_t> left;
    ++count_;
    take(workers_[0].expand(*root, cutoff(), true, &left));
    std::copy(left.begin(), left.end(), alive);
    while (!empty() && count_ < most_ && Clock::now() < end_) expand_some();
    double bound = best_.empty() ? kInfinity : best_value_ - tolerance_;
    const bool finished = empty();
    for (const auto& node : heap_) bound = std::min(bound, node->bound);
    for (const auto& node : stack_) bound = std::min(bound, node->bound);
    if (best_.empty()) choice[0] = -1;
    else std::copy(best_.begin(), best_.end(), choice);
    return {bound, count_, finished};
  }

 private:
  double cutoff() const { return best_.empty() ? kInfinity : best_value_ - tolerance_; }
  bool empty() const { return heap_.empty() && stack_.empty(); }

  void expand_some() {
    std::vector<std::unique_ptr<Node>> nodes;
    const auto room = static_cast<size_t>(std::min<int64_t>(kTogether, most_ - count_));
    while (nodes.size() < room && !empty()) {
      std::unique_ptr<Node> node = next();
      if (node->bound < cutoff()) nodes.push_back(std::move(node));
    }
    std::vector<Grown> grown(nodes.size());
    const double limit = cutoff();
    const int threads = count_ * size_ * size_ < kAlone ? 1 : static_cast<int>(workers_.size());
    parallel_uneven(static_cast<int64_t>(nodes.size()), threads, [&](int64_t k, int thread) {
      grown[k] = workers_[thread].expand(*nodes[k], limit, (count_ + k + 1) % 50 == 0, nullptr);
    });
    for (size_t k = 0; k < nodes.size(); ++k) {
      if (grown[k].late) put(std::move(nodes[k]));
      else take(std::move(grown[k])), ++count_;
    }
  }

  void take(Grown grown) {
    if (!grown.choice.empty() && (best_.empty() || grown.value < best_value_)) best_ = grown.choice, best_value_ = grown.value;
    for (auto& child : grown.children) {
      child->order = ++made_;
      put(std::move(child));
    }
  }

  void put(std::unique_ptr<Node> node) {
    const size_t bytes = static_cast<size_t>(size_) * (sizeof(float) + 1) + 128;
    if (heap_.size() * bytes > kQueueBytes) {
      stack_.push_back(std::move(node));
    } else {
      heap_.push_back(std::move(node));
      std::push_heap(heap_.begin(), heap_.end(), Later());
    }
  }

  std::unique_ptr<Node> next() {
    std::unique_ptr<Node> node;
    if (!stack_.empty()) {
      node = std::move(stack_.back());
      stack_.pop_back();
    } else {
      std::pop_heap(heap_.begin(), heap_.end(), Later());
      node = std::move(heap_.back());
      heap_.pop_back();
    }
    return node;
  }

  IqpProgram p_;
  IqpForm form_;
  int64_t size_;
  Clock::time_point end_;
  std::deque<Expansion> workers_;
  double tolerance_;
  int64_t most_;
  std::vector<std::unique_ptr<Node>> heap_, stack_;
  std::vector<int64_t> best_;
  double best_value_ = kInfinity;
  int64_t count_ = 0, made_ = 0;
};

}  // namespace

IqpProof iqp_prove_cpu(const IqpProgram& program, const IqpForm& form, int64_t* choice, uint8_t* alive, double tolerance,
                       int64_t nodes, double seconds, int threads) {
  return Tree(program, form, tolerance, nodes, seconds, threads).run(choice, alive);
}

}  // namespace clado
