#include "common/cuda.cuh"
#include "common/pairs.cuh"
#include "pairwise_mse/pairwise_mse.h"

namespace clado {
namespace {

// sqrt(weight) d, and products.
template <class T>
struct SquaredError {
  using Element = T;
  const T* weight;  // null: 1
  T root[4];

  __device__ void read(int64_t from, int64_t rest) {
#pragma unroll
    for (int k = 0; k < 4; ++k) root[k] = weight && k < rest ? sqrt(weight[from + k]) : T(1);
  }
  __device__ T value(int k, T x) const { return root[k] == T(0) ? T(0) : root[k] * x; }
  __device__ T factor(int) const { return T(1); }
  template <int Rows>
  __device__ static void add(const Slab<T>& left, const Slab<T>& right, const Entries<Rows>& own, const T*, T (&part)[Rows][4]) {
    add_product(left, right, own, part);
  }
};

template <class T, int Rows>
void launch(const Pairs& pairs, const void* weight, double* total, double* squares, void* workspace, cudaStream_t queue) {
  with_width<T>(pairs, pairs.width, [&](auto n) {
    const SquaredError<T> work{static_cast<const T*>(weight), {}};
    launch_elements<Rows, decltype(n)::value>("pairwise_mse", work, pairs, pairs.rows, pairs.width, 2.0, total, squares, workspace,
                                              queue);
  });
}

}  // namespace

int64_t pairwise_mse_workspace(const Pairs& pairs) { return elements_workspace(pairs, pairs.rows, pairs.width); }

void pairwise_mse_cuda(const Pairs& pairs, const void* weight, double* total, double* squares, void* workspace, int device,
                       void* stream) {
  const DeviceGuard guard(device);
  const auto queue = static_cast<cudaStream_t>(stream);
  if (pairs.perturbations == 0 || pairs.others == 0) return;
  if (pairs.rows == 0) return clear_sums("pairwise_mse", pairs, total, squares, queue);
  pairs.is_double ? launch<double, 4>(pairs, weight, total, squares, workspace, queue)
                  : launch<float, 8>(pairs, weight, total, squares, workspace, queue);
}

}  // namespace clado
