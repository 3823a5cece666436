#include "bitpack/bitpack.h"

#include <atomic>
#include <cstring>
#include <type_traits>
#include <utility>

#include "common/parallel.h"
#include "common/simd.h"

namespace clado {
namespace {

// A register of codes, one to a byte. Neighbours that fill whole bytes are a group: its codes are joined two by two (pairs,
// fours, eights); then the filled bytes of all groups are closed up as far as the level's shuffles reach. That is a part; it
// is read and written whole, so that a block touches more than its packed bytes.
template <int kBits, int kWidth>
struct Block {
  typedef uint8_t Bytes __attribute__((vector_size(kWidth)));
  typedef uint64_t Lanes __attribute__((vector_size(kWidth)));
  static constexpr int bits = kBits, width = kWidth;
  static constexpr int part = bits == 8 ? width : width == 16 ? 8 : width == 32 ? 16 : 64;  // bytes of a register
  static constexpr int group = bits == 8 ? 1 : bits % 2 || part == 8 ? 8 : bits == 4 ? 2 : 4, filled = group * bits / 8;
  static constexpr int step = part / 8 * bits, packed = width / 8 * bits, touched = packed - step + part;  // bytes in memory
  static constexpr int last = (touched - packed) / packed + 2;  // at most so many blocks are left where `touched` bytes are not
  // Of 16 bytes, all and the filled ones, in units that shuffles take across them.
  using Unit = std::conditional_t<bits % 2, uint16_t, uint32_t>;
  static constexpr int units = 16 / sizeof(Unit), full = 2 * bits / sizeof(Unit);
  static constexpr uint8_t offset = 1u << (bits - 1);
};

// A mask of the low `width` bits of every field of `space` bits.
constexpr uint64_t low_bits(int width, int space) {
  uint64_t mask = 0;
  for (int at = 0; at < 64; at += space) mask |= ((uint64_t{1} << width) - 1) << at;
  return mask;
}

// Fields of Space bits, the low Filled of them filled: two become one; and back. Fields filled to no more than the half are
// zero above, before and after; of others nothing is said there.
template <int Filled, int Space, class Lanes>
CLADO_INLINE Lanes join(Lanes x) {
  const Lanes moved = x >> (Space - Filled);
  if constexpr (2 * Filled <= Space) return (x | moved) & low_bits(2 * Filled, 2 * Space);
  return x ^ ((x ^ moved) & ~low_bits(Filled, 2 * Space));
}
template <int Filled, int Space, class Lanes>
CLADO_INLINE Lanes split(Lanes x) {
  const Lanes moved = x << (Space - Filled);
  if constexpr (2 * Filled <= Space) return (x | moved) & low_bits(Filled, Space);
  return x ^ ((x ^ moved) & ~low_bits(Space, 2 * Space));
}

CLADO_INLINE Block<8, 16>::Lanes both(Block<8, 8>::Lanes a, Block<8, 8>::Lanes b) { return Block<8, 16>::Lanes{a[0], b[0]}; }
CLADO_INLINE Block<8, 32>::Lanes both(Block<8, 16>::Lanes a, Block<8, 16>::Lanes b) {
  return __builtin_shufflevector(a, b, 0, 1, 2, 3);
}

// x[from(0)], x[from(1)], ... in units of type T.
template <class T, class Bytes, class From, int... J>
CLADO_INLINE Bytes shuffle(Bytes x, From from, std::integer_sequence<int, J...>) {
  typedef T Units __attribute__((vector_size(sizeof(Bytes))));
  return (Bytes)__builtin_shufflevector((Units)x, (Units)x, from(J)...);
}
template <class T, class Bytes, class From>
CLADO_INLINE Bytes shuffle(Bytes x, From from) {
  return shuffle<T>(x, from, std::make_integer_sequence<int, sizeof(Bytes) / sizeof(T)>{});
}

// The filled bytes of every part, one after the other; and back.
template <class B>
CLADO_INLINE typename B::Bytes close_up(typename B::Bytes x) {
  if constexpr (B::part >= 16)
    x = shuffle<uint8_t>(x, [](int j) {
      const int k = j % 16;
      return j - k + (k < 2 * B::bits ? k / B::filled * B::group + k % B::filled : 0);
    });
  if constexpr (B::part == 64)
    x = shuffle<typename B::Unit>(x, [](int j) { return j < 4 * B::full ? j / B::full * B::units + j % B::full : 0; });
  return x;
}
template <class B>
CLADO_INLINE typename B::Bytes spread_out(typename B::Bytes x) {
  if constexpr (B::part == 64)
    x = shuffle<typename B::Unit>(x, [](int j) { return j % B::units < B::full ? j / B::units * B::full + j % B::units : 0; });
  if constexpr (B::part >= 16)
    x = shuffle<uint8_t>(x, [](int j) {
      const int k = j % 16;
      return j - k + (k % B::group < B::filled ? k / B::group * B::filled + k % B::group : 0);
    });
  return x;
}

// Two parts are put together in registers: a wide load would wait for narrow stores.
template <class B>
CLADO_INLINE typename B::Lanes load_parts(const char* packed) {
  if constexpr (B::part < B::width) {
    typename Block<8, B::width / 2>::Lanes low{}, high{};
    std::memcpy(&low, packed, B::part);
    std::memcpy(&high, packed + B::step, B::part);
    return both(low, high);
  } else {
    typename B::Lanes x;
    std::memcpy(&x, packed, sizeof x);
    return x;
  }
}

// Adds to `seen` the bits of all stored codes, those out of range among them.
template <class B>
CLADO_INLINE void pack_block(const int8_t* codes, char* packed, typename B::Bytes* seen) {
  typename B::Bytes stored;
  std::memcpy(&stored, codes, sizeof stored);
  stored += B::offset;
  *seen |= stored;
  auto x = (typename B::Lanes)stored;
  if constexpr (B::group > 1) x = join<B::bits, 8>(x);
  if constexpr (B::group > 2) x = join<2 * B::bits, 16>(x);
  if constexpr (B::group > 4) x = join<4 * B::bits, 32>(x);
  const auto closed = close_up<B>((typename B::Bytes)x);
  for (int k = 0; k < B::width / B::part; ++k)
    std::memcpy(packed + k * B::step, reinterpret_cast<const char*>(&closed) + k * B::part, B::part);
}

template <class B>
CLADO_INLINE void unpack_block(const char* packed, int8_t* codes) {
  auto x = (typename B::Lanes)spread_out<B>((typename B::Bytes)load_parts<B>(packed));
  if constexpr (B::bits <= 4) x &= low_bits(8 * B::filled, 8 * B::group);
  if constexpr (B::group > 4) x = split<4 * B::bits, 32>(x);
  if constexpr (B::group > 2) x = split<2 * B::bits, 16>(x);
  if constexpr (B::group > 1) x = split<B::bits, 8>(x);
  if constexpr (B::bits > 4) x &= low_bits(B::bits, 8);
  const auto stored = (typename B::Bytes)x - B::offset;
  std::memcpy(codes, &stored, sizeof stored);
}

// Blocks of a row of `columns` codes, `bytes` packed, that touch nothing behind it.
template <class B>
CLADO_INLINE int64_t whole_blocks(int64_t columns, int64_t bytes) {
  const int64_t fit = bytes < B::touched ? 0 : (bytes - B::touched) / B::packed + 1, full = columns / B::width;
  return fit < full ? fit : full;
}

template <class B>
CLADO_INLINE void pack_row(const int8_t* codes, char* packed, int64_t columns, bool* inside) {
  const int64_t bytes = 4 * packed_columns(columns, B::bits), whole = whole_blocks<B>(columns, bytes);
  typename B::Bytes seen{};
#pragma GCC unroll 4
  for (int64_t b = 0; b < whole; ++b) pack_block<B>(codes + b * B::width, packed + b * B::packed, &seen);
  if (whole * B::packed < bytes) {
    int8_t rest[B::last * B::width];
    char out[B::last * B::packed + B::touched];
    std::memset(rest, -B::offset, sizeof rest);  // stored as zero bits
    std::memcpy(rest, codes + whole * B::width, static_cast<size_t>(columns - whole * B::width));
    for (int b = 0; b < B::last; ++b) pack_block<B>(rest + b * B::width, out + b * B::packed, &seen);
    std::memcpy(packed + whole * B::packed, out, static_cast<size_t>(bytes - whole * B::packed));
  }
  const auto outside = (typename B::Lanes)(seen & static_cast<uint8_t>(-2 * B::offset));
  for (int k = 0; k < B::width / 8; ++k) *inside &= outside[k] == 0;
}

template <class B>
CLADO_INLINE void unpack_row(const char* packed, int8_t* codes, int64_t columns) {
  const int64_t bytes = 4 * packed_columns(columns, B::bits), whole = whole_blocks<B>(columns, bytes);
#pragma GCC unroll 4
  for (int64_t b = 0; b < whole; ++b) unpack_block<B>(packed + b * B::packed, codes + b * B::width);
  if (whole * B::width < columns) {
    char in[B::last * B::packed + B::touched] = {};
    int8_t rest[B::last * B::width];
    std::memcpy(in, packed + whole * B::packed, static_cast<size_t>(bytes - whole * B::packed));
    for (int b = 0; b < B::last; ++b) unpack_block<B>(in + b * B::packed, rest + b * B::width);
    std::memcpy(codes + whole * B::width, rest, static_cast<size_t>(columns - whole * B::width));
  }
}

template <int Width>
CLADO_INLINE void pack_any_body(const int8_t* codes, char* packed, int64_t columns, int bits, bool* inside) {
  switch (bits) {
    case 2: return pack_row<Block<2, Width>>(codes, packed, columns, inside);
    case 3: return pack_row<Block<3, Width>>(codes, packed, columns, inside);
    case 4: return pack_row<Block<4, Width>>(codes, packed, columns, inside);
    case 5: return pack_row<Block<5, Width>>(codes, packed, columns, inside);
    case 6: return pack_row<Block<6, Width>>(codes, packed, columns, inside);
    case 7: return pack_row<Block<7, Width>>(codes, packed, columns, inside);
    default: return pack_row<Block<8, Width>>(codes, packed, columns, inside);
  }
}

template <int Width>
CLADO_INLINE void unpack_any_body(const char* packed, int8_t* codes, int64_t columns, int bits) {
  switch (bits) {
    case 2: return unpack_row<Block<2, Width>>(packed, codes, columns);
    case 3: return unpack_row<Block<3, Width>>(packed, codes, columns);
    case 4: return unpack_row<Block<4, Width>>(packed, codes, columns);
    case 5: return unpack_row<Block<5, Width>>(packed, codes, columns);
    case 6: return unpack_row<Block<6, Width>>(packed, codes, columns);
    case 7: return unpack_row<Block<7, Width>>(packed, codes, columns);
    default: return unpack_row<Block<8, Width>>(packed, codes, columns);
  }
}

CLADO_STAMP(pack_any, (const int8_t* codes, char* packed, int64_t columns, int bits, bool* inside),
            (codes, packed, columns, bits, inside), <64>, <32>, <16>)
CLADO_STAMP(unpack_any, (const char* packed, int8_t* codes, int64_t columns, int bits), (packed, codes, columns, bits), <64>,
            <32>, <16>)

// fn(row, first column, columns) for whole rows, or for pieces where rows are fewer than threads: a piece for every thread,
// but of whole kGrain codes, so that pieces begin at whole words and share no cache line.
constexpr int64_t kGrain = 1 << 12;

template <class Fn>
void for_each_piece(int64_t rows, int64_t columns, int threads, Fn fn) {
  if (rows == 0 || columns == 0) return;
  threads = threads_for(rows * columns, threads);
  const int64_t wanted = (threads + rows - 1) / rows, grains = (columns + kGrain - 1) / kGrain;
  const int64_t length = (grains + wanted - 1) / wanted * kGrain, pieces = (columns + length - 1) / length;
  parallel_for(rows * pieces, threads, [&](int64_t i) {
    const int64_t first = i % pieces * length, rest = columns - first;
    fn(i / pieces, first, rest < length ? rest : length);
  });
}

// Rows without bits left over at their ends are packed like one long row, which has one end only.
void join_rows(int64_t* rows, int64_t* columns, int bits) {
  if (*columns * bits % 32) return;
  *columns *= *rows;
  *rows = 1;
}

}  // namespace

bool pack_cpu(const int8_t* codes, int32_t* words, int64_t rows, int64_t columns, int bits, int threads) {
  join_rows(&rows, &columns, bits);
  const int64_t packed = packed_columns(columns, bits);
  std::atomic<bool> all_inside{true};
  for_each_piece(rows, columns, threads, [&](int64_t row, int64_t first, int64_t count) {
    bool inside = true;
    char* target = reinterpret_cast<char*>(words + row * packed + first / 32 * bits);
    pack_any(codes + row * columns + first, target, count, bits, &inside);
    if (!inside) all_inside.store(false, std::memory_order_relaxed);
  });
  return all_inside.load();
}

void unpack_cpu(const int32_t* words, int8_t* codes, int64_t rows, int64_t columns, int bits, int threads) {
  join_rows(&rows, &columns, bits);
  const int64_t packed = packed_columns(columns, bits);
  for_each_piece(rows, columns, threads, [&](int64_t row, int64_t first, int64_t count) {
    const char* source = reinterpret_cast<const char*>(words + row * packed + first / 32 * bits);
    unpack_any(source, codes + row * columns + first, count, bits);
  });
}

}  // namespace clado
