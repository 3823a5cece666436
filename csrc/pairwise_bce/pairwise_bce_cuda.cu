#include "common/cuda.cuh"
#include "common/pairs.cuh"
#include "pairwise_bce/pairwise_bce.h"

namespace clado {
namespace {

__device__ inline float exp_of(float x) { return expf(x); }
__device__ inline double exp_of(double x) { return exp(x); }
__device__ inline float expm1_of(float x) { return expm1f(x); }
__device__ inline double expm1_of(double x) { return expm1(x); }

// s of the changes, and logarithms of 1 + their products.
template <class T>
struct BinaryCrossEntropy {
  using Element = T;
  static constexpr bool kFloat = sizeof(T) == sizeof(float);
  static constexpr T kTop = kFloat ? T(0x1p126) : T(1e308);  // of products
  static constexpr T kCap = kFloat ? T(3e38) : T(1e308), kFarthest = kFloat ? T(174) : T(1400);  // of s and of |d|
  const T* logits;
  const double* weights;  // null: 1
  T up[4], down[4], weight[4];

  __device__ void read(int64_t from, int64_t rest) {
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const double half = k < rest ? 0.5 * static_cast<double>(logits[from + k]) : 0.0;
      up[k] = static_cast<T>(exp(half));
      down[k] = static_cast<T>(exp(-half));
      weight[k] = k >= rest ? T(0) : weights ? static_cast<T>(weights[from + k]) : T(1);
    }
  }
  __device__ T value(int k, T d) const {
    if (weight[k] == T(0)) return T(0);
    const T size = d < T(0) ? -d : d, half = T(-0.5) * (size > kFarthest ? kFarthest : size);
    const T h = exp_of(half), minus = expm1_of(half);
    const T ratio = minus * (minus + T(2)) / ((d > T(0) ? up[k] : down[k]) + (d > T(0) ? down[k] : up[k]) * h * h);
    const T capped = ratio < -kCap ? -kCap : ratio;
    return (d > T(0) ? -capped : capped) + (d - d);
  }
  __device__ T factor(int k) const { return weight[k]; }
  template <int Rows>
  __device__ static void add(const Slab<T>& left, const Slab<T>& right, const Entries<Rows>& own, const T* factors,
                             T (&part)[Rows][4]) {
#pragma unroll 1
    for (int c = 0; c < kDepth; ++c)
      for_entries(left, right, own, c, part, [&](int at, T a, T b, T sum) {
        const T x = a * b;
        return multiply_add(factors[at], log1p_floored(x > kTop ? kTop : x), sum);
      });
  }
};

template <class T, int Rows>
void launch(const Pairs& pairs, const LogitRows& rows, double* total, double* squares, void* workspace, cudaStream_t queue) {
  const int64_t samples = pairs.rows / rows.per_sample;
  with_width<T>(pairs, rows.per_sample, [&](auto n) {
    const BinaryCrossEntropy<T> work{static_cast<const T*>(rows.logits), rows.weight, {}, {}, {}};
    launch_elements<Rows, decltype(n)::value>("pairwise_bce", work, pairs, samples, rows.per_sample, 1.0, total, squares, workspace,
                                              queue);
  });
}

}  // namespace

int64_t pairwise_bce_workspace(const Pairs& pairs, int64_t per_sample) {
  return elements_workspace(pairs, pairs.rows / per_sample, per_sample);
}

void pairwise_bce_cuda(const Pairs& pairs, const LogitRows& rows, double* total, double* squares, void* workspace, int device,
                       void* stream) {
  const DeviceGuard guard(device);
  const auto queue = static_cast<cudaStream_t>(stream);
  if (pairs.perturbations == 0 || pairs.others == 0) return;
  if (pairs.rows == 0) return clear_sums("pairwise_bce", pairs, total, squares, queue);
  pairs.is_double ? launch<double, 4>(pairs, rows, total, squares, workspace, queue)
                  : launch<float, 8>(pairs, rows, total, squares, workspace, queue);
}

}  // namespace clado
