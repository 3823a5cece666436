#include "compensate/compensate.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "common/parallel.h"
#include "common/weights_cpu.h"

namespace clado {
namespace {

constexpr int kVectors = 3, kTile = kVectors * kLanes;  // streams that go through the columns together
constexpr int kPanel = 8;      // columns of the factor that lie side by side
constexpr int kLeaf = 16;      // columns that are rounded one after the other ...
constexpr int kStretch = 128;  // ... and those that share one update of all columns after them

constexpr int64_t rounded_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// ---- the factor, by panels: 8 columns side by side, their rows down to the diagonal ----

constexpr int64_t panel_start(int64_t panel) { return kPanel * kPanel / 2 * panel * (panel + 1); }
constexpr int64_t packed_size(int64_t columns) { return panel_start(rounded_up(columns, kLeaf) / kPanel); }

void pack_panel(const Compensation& given, int64_t f, int64_t panel, float* packed) {
  float* out = packed + panel_start(panel);
  const int64_t first = panel * kPanel, columns = given.weight.columns;
  for (int64_t i = 0; i < first + kPanel; ++i)
    for (int64_t j = first; j < first + kPanel; ++j) *out++ = i <= j && j < columns ? given.u(f, i, j) : 0.0f;
}

// ---- a tile: [columns, 48 streams] float32; a column is replaced by -e once it is rounded ----

// What the streams of a tile round by, as vectors of 48.
struct Steps {
  const float* scale;  // [groups, 48], as the next three
  const float* zero;
  const float* low;
  const float* high;
  const int64_t* group;   // of every column
  const float* inverse;   // 1 / U_ii of every column
  int element;            // a float element; 0: integers
};

template <class Int>
CLADO_INLINE void store_bytes(int8_t* codes, Int code) {
  int32_t whole[kLanes];
  store(whole, code);
  for (int l = 0; l < kLanes; ++l) codes[l] = static_cast<int8_t>(whole[l]);
}
template <class F>
CLADO_INLINE void store_codes(int8_t* codes, F code) {
  store_bytes(codes, convert<int32_t>(select(code == code, code, F{})));
}
template <int E, class F>
CLADO_INLINE F round_float(F t, int8_t* codes) {
  store_bytes(codes, element_code<E>(t));
  return round_element<E>(t);
}

// Rounds the columns [first, last) of a leaf, each once it has made up for those before it.
template <class F, int V, bool Floats>
CLADO_INLINE void round_leaf(float* tile, const float* packed, int64_t first, int64_t last, const Steps& steps, int8_t* codes,
                             double* loss) {
  for (int64_t i = first; i < last; ++i) {
    float* x = tile + i * kTile;
    const int64_t at = steps.group[i] * kTile;
    F e[V];
#pragma GCC unroll 3
    for (int v = 0; v < V; ++v) {
      const F w = F::load(x + v * kLanes), scale = F::load(steps.scale + at + v * kLanes);
      int8_t* const code = codes + i * kTile + v * kLanes;
      F step;
      if (!Floats) {
        const F low = F::load(steps.low + at + v * kLanes), high = F::load(steps.high + at + v * kLanes);
        step = round_even(clamp(w / scale, low, high));
        store_codes(code, step + F::load(steps.zero + at + v * kLanes));
      } else if (steps.element == kE2M1) {
        step = round_float<kE2M1>(w / scale, code);
      } else if (steps.element == kE4M3) {
        step = round_float<kE4M3>(w / scale, code);
      } else {
        step = round_float<kE5M2>(w / scale, code);
      }
      e[v] = (step * scale - w) * F(steps.inverse[i]);  // -e
      store(x + v * kLanes, e[v]);
    }
    for (int64_t j = i + 1; j < last; ++j) {
      const F u = packed[panel_start(j / kPanel) + i * kPanel + j % kPanel];
      float* y = tile + j * kTile;
#pragma GCC unroll 3
      for (int v = 0; v < V; ++v) store(y + v * kLanes, multiply_add(e[v], u, F::load(y + v * kLanes)));
    }
    for (int l = 0; l < V * kLanes; ++l) loss[l] += static_cast<double>(x[l]) * static_cast<double>(x[l]);
  }
}

// The columns [from, to) make up for the errors of the columns [first, last) before them; from and to are multiples of a panel.
template <class F, int V>
CLADO_INLINE void update(float* tile, const float* packed, int64_t first, int64_t last, int64_t from, int64_t to) {
  constexpr int kColumns = F::kWidth == 64 ? kPanel : F::kWidth == 32 ? 4 : 2, kTogether = F::kWidth == 64 ? V : 1;
  for (int64_t j = from; j < to; j += kColumns)
    for (int v = 0; v < V; v += kTogether) {
      const float* u = packed + panel_start(j / kPanel) + first * kPanel + j % kPanel;
      const float* e = tile + first * kTile + v * kLanes;
      float* x = tile + j * kTile + v * kLanes;
      F sum[kColumns][kTogether];
#pragma GCC unroll 8
      for (int c = 0; c < kColumns; ++c)
#pragma GCC unroll 3
        for (int t = 0; t < kTogether; ++t) sum[c][t] = F::load(x + c * kTile + t * kLanes);
      for (int64_t i = first; i < last; ++i, u += kPanel, e += kTile) {
        F error[kTogether];
#pragma GCC unroll 3
        for (int t = 0; t < kTogether; ++t) error[t] = F::load(e + t * kLanes);
#pragma GCC unroll 8
        for (int c = 0; c < kColumns; ++c) {
          const F factor = u[c];
#pragma GCC unroll 3
          for (int t = 0; t < kTogether; ++t) sum[c][t] = multiply_add(error[t], factor, sum[c][t]);
        }
      }
#pragma GCC unroll 8
      for (int c = 0; c < kColumns; ++c)
#pragma GCC unroll 3
        for (int t = 0; t < kTogether; ++t) store(x + c * kTile + t * kLanes, sum[c][t]);
    }
}

// A tile of V vectors of streams from the first column to the last; Floats: of a float element.
template <class F, int V, bool Floats>
CLADO_INLINE void pass(float* tile, const float* packed, int64_t columns, const Steps& steps, int8_t* codes, double* loss) {
  const int64_t padded = rounded_up(columns, kLeaf);
  for (int64_t stretch = 0; stretch < columns; stretch += kStretch) {
    const int64_t end = std::min(stretch + kStretch, padded);
    for (int64_t leaf = stretch; leaf < std::min(end, columns); leaf += kLeaf) {
      const int64_t last = std::min(leaf + kLeaf, columns);
      round_leaf<F, V, Floats>(tile, packed, leaf, last, steps, codes, loss);
      update<F, V>(tile, packed, leaf, last, leaf + kLeaf, end);
    }
    update<F, V>(tile, packed, stretch, std::min(end, columns), end, padded);
  }
}
template <class F, bool Floats>
CLADO_INLINE void pass_vectors(float* tile, const float* packed, int64_t columns, int vectors, const Steps& steps, int8_t* codes,
                               double* loss) {
  if (vectors == 1) return pass<F, 1, Floats>(tile, packed, columns, steps, codes, loss);
  if (vectors == 2) return pass<F, 2, Floats>(tile, packed, columns, steps, codes, loss);
  return pass<F, 3, Floats>(tile, packed, columns, steps, codes, loss);
}
template <class F>
CLADO_INLINE void pass_tile_body(float* tile, const float* packed, int64_t columns, int vectors, const Steps& steps, int8_t* codes,
                                 double* loss) {
  pass_vectors<F, false>(tile, packed, columns, vectors, steps, codes, loss);
}
template <class F>
CLADO_INLINE void pass_floats_body(float* tile, const float* packed, int64_t columns, int vectors, const Steps& steps,
                                   int8_t* codes, double* loss) {
  pass_vectors<F, true>(tile, packed, columns, vectors, steps, codes, loss);
}

// A row as float32, padded to whole lanes.
template <class F, DType D>
CLADO_INLINE void read_typed(const void* row, int64_t count, float* out) {
  const int64_t whole = count / kLanes * kLanes;
  for (int64_t i = 0; i < whole; i += kLanes) store(out + i, load_weights<F, D>(row, i));
  if (whole == count) return;
  alignas(64) char tail[kLanes * 4] = {};
  std::memcpy(tail, weights_at<D>(row, whole), static_cast<size_t>((count - whole) * kWeightBytes<D>));
  store(out + whole, load_weights<F, D>(tail, 0));
}
template <class F>
CLADO_INLINE void read_row_body(const void* row, DType dtype, int64_t count, float* out) {
  if (dtype == DType::float32) return read_typed<F, DType::float32>(row, count, out);
  if (dtype == DType::float16) return read_typed<F, DType::float16>(row, count, out);
  return read_typed<F, DType::bfloat16>(row, count, out);
}

CLADO_LANES_KERNEL(pass_tile,
                   (float* tile, const float* packed, int64_t columns, int vectors, const Steps& steps, int8_t* codes,
                    double* loss),
                   (tile, packed, columns, vectors, steps, codes, loss))
CLADO_LANES_KERNEL(pass_floats,
                   (float* tile, const float* packed, int64_t columns, int vectors, const Steps& steps, int8_t* codes,
                    double* loss),
                   (tile, packed, columns, vectors, steps, codes, loss))
CLADO_LANES_KERNEL(read_row, (const void* row, DType dtype, int64_t count, float* out), (row, dtype, count, out))

// ---- from the weight to tiles and back ----

// What a tile takes, apart from the factor; reused by a thread from tile to tile.
struct Room {
  std::vector<float> tile, rows, scale, zero, low, high, inverse;
  std::vector<int64_t> group;
  std::vector<int8_t> codes;
  double loss[kTile];
};

struct Tile {
  const Compensation& given;
  const float* packed;  // of its factor
  int64_t f, first;     // factor, first stream
  Room& room;

  int streams() const { return static_cast<int>(std::min<int64_t>(kTile, given.streams() - first)); }
  int vectors() const { return (streams() + kLanes - 1) / kLanes; }
  int width(int lane) const { return static_cast<int>((first + lane) / given.rows()); }
  int64_t row(int lane) const { return f * given.rows() + (first + lane) % given.rows(); }
  int64_t output(int lane) const { return width(lane) * given.weight.rows + row(lane); }

  // The weights, turned: sixteen rows at a time.
  void read() const {
    const int64_t columns = given.weight.columns, padded = rounded_up(columns, kLeaf);
    const int64_t apart = padded + kLanes;  // a line more: sixteen rows of n pages each would share one set of the cache
    room.tile.assign(static_cast<size_t>(padded * kTile), 0.0f);
    room.rows.resize(static_cast<size_t>(apart * kLanes));
    for (int v = 0; v < vectors(); ++v) {
      const int count = std::min(kLanes, streams() - v * kLanes);
      for (int l = 0; l < count; ++l)
        read_row(given.weight.at(row(v * kLanes + l), 0), given.weight.dtype, columns, &room.rows[static_cast<size_t>(l * apart)]);
      for (int64_t i = 0; i < columns; ++i) {
        const float* from = room.rows.data() + given.column(f, i);
        float* to = room.tile.data() + i * kTile + v * kLanes;
        for (int l = 0; l < count; ++l) to[l] = from[l * apart];
      }
    }
  }

  // Scales and limits of every group; the lanes without a stream are zeros at scale 1.
  void prepare() const {
    const int64_t groups = given.weight.groups(), columns = given.weight.columns;
    const auto all = static_cast<size_t>(groups * kTile);
    room.scale.assign(all, 1.0f), room.zero.assign(all, 0.0f), room.low.assign(all, 0.0f), room.high.assign(all, 0.0f);
    for (int lane = 0; lane < streams(); ++lane)
      for (int64_t g = 0; g < groups; ++g) {
        const auto at = static_cast<size_t>(g * kTile + lane);
        const int64_t from = output(lane) * groups + g;
        const int bits = given.bits.width[width(lane)];
        room.scale[at] = given.scales[from];
        room.zero[at] = given.zeros ? static_cast<float>(given.zeros[from]) : 0.0f;
        room.low[at] = static_cast<float>(lowest_code(bits)) - room.zero[at];
        room.high[at] = static_cast<float>(highest_code(bits)) - room.zero[at];
      }
    room.group.resize(static_cast<size_t>(columns)), room.inverse.resize(static_cast<size_t>(columns));
    for (int64_t i = 0; i < columns; ++i) {
      room.group[static_cast<size_t>(i)] = given.column(f, i) / given.weight.group_size;
      room.inverse[static_cast<size_t>(i)] = 1.0f / packed[panel_start(i / kPanel) + i * kPanel + i % kPanel];
    }
    room.codes.resize(static_cast<size_t>(columns * kTile));
    std::fill_n(room.loss, kTile, 0.0);
  }

  void write(int8_t* codes, double* loss) const {
    const int64_t columns = given.weight.columns;
    for (int lane = 0; lane < streams(); ++lane) {
      int8_t* to = codes + output(lane) * columns;
      const int8_t* from = room.codes.data() + lane;
      for (int64_t i = 0; i < columns; ++i) to[given.column(f, i)] = from[i * kTile];
      const double sum = room.loss[lane];
      loss[output(lane)] = sum == sum ? sum : NAN;  // one of several NaN by chance: always the same
    }
  }

  void run(int8_t* codes, double* loss) const {
    read();
    prepare();
    const Steps steps{room.scale.data(), room.zero.data(),  room.low.data(),
                      room.high.data(),  room.group.data(), room.inverse.data(), given.element};
    const auto run = given.element ? pass_floats : pass_tile;
    run(room.tile.data(), packed, given.weight.columns, vectors(), steps, room.codes.data(), room.loss);
    write(codes, loss);
  }
};

bool is_permutation(const int64_t* order, int64_t count) {
  std::vector<char> seen(static_cast<size_t>(count));
  for (int64_t i = 0; i < count; ++i) {
    if (order[i] < 0 || order[i] >= count || seen[static_cast<size_t>(order[i])]) return false;
    seen[static_cast<size_t>(order[i])] = 1;
  }
  return true;
}

}  // namespace

bool compensate_cpu(const Compensation& given, int8_t* codes, double* loss, int threads) {
  const int64_t columns = given.weight.columns, factors = given.factors;
  for (int64_t f = 0; given.order && f < factors; ++f)
    if (!is_permutation(given.order + f * columns, columns)) return false;
  if (given.weight.rows == 0) return true;
  const int64_t size = packed_size(columns), panels = rounded_up(columns, kLeaf) / kPanel;
  const int64_t tiles = (given.streams() + kTile - 1) / kTile, work = given.streams() * factors * columns * columns / 2;
  std::vector<float> packed(static_cast<size_t>(factors * size));
  parallel_for(factors * panels, threads_for(factors * size, threads), [&](int64_t n) {
    const int64_t f = n / panels;
    pack_panel(given, f, n % panels, packed.data() + f * size);
  });
  parallel_for(factors * tiles, threads_for(work, threads), [&](int64_t n) {
    static thread_local Room room;
    const int64_t f = n / tiles;
    Tile{given, packed.data() + f * size, f, n % tiles * kTile, room}.run(codes, loss);
  });
  return true;
}

}  // namespace clado
