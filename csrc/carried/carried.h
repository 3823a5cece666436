// f(x + d) - f(x) for clean values x and the differences d of several streams, where f is not linear, and nothing cancels.
//
// Clean values are float32, [rows, columns]; differences and results [streams, rows, columns], float32 or bfloat16; all contiguous.
// A row's clean part is read once for all streams.
//
//   gelu        d Phi(x + d) + x (Phi(x + d) - Phi(x)), on the CPU Phi by a polynomial (error of gelu's slope below 3e-5, 1e-6 in the
//               mean), on the GPU normcdff and, for small d, the series of the difference
//   layer_norm  weight ((d - mean d) r' + (x - mean x) (r' - r)), r = 1 / sqrt(var + eps), r' - r from the change of the variance;
//               the bias drops out; weight may be null
//   add_layer_norm  d = residual + branch (residual and d float32, the branch float32 or bfloat16), then layer_norm of it
//   softmax     from scores s, p = softmax(s) and d, scaled: w = p (e^d - 1), W = sum w; each result row holds 2 * columns values:
//               the change (w - p W) / (1 + W), then the whole softmax(s + d) = (p + w) / (1 + W)
#pragma once

#include <cstdint>

namespace clado {

// Of the differences, and which of them are bfloat16.
struct Streams {
  int64_t streams, rows, columns;
  bool delta_half, out_half;  // what is read (delta, or branch), what is written (out)

  constexpr int64_t stride() const { return rows * columns; }  // from one stream to the next
};

void carried_gelu_cpu(const float* clean, const void* delta, void* out, const Streams& streams, int threads);
void carried_layer_norm_cpu(const float* clean, const void* delta, const float* weight, void* out, const Streams& streams, float eps,
                            int threads);
void carried_add_layer_norm_cpu(const float* clean, const float* residual, const void* branch, const float* weight, float* sum, void* out,
                                const Streams& streams, float eps, int threads);
void carried_softmax_cpu(const float* scores, const float* clean, const void* delta, void* out, const Streams& streams, float scale,
                         int threads);

void carried_gelu_cuda(const float* clean, const void* delta, void* out, const Streams& streams, int device, void* stream);
void carried_layer_norm_cuda(const float* clean, const void* delta, const float* weight, void* out, const Streams& streams, float eps,
                            int device, void* stream);
void carried_add_layer_norm_cuda(const float* clean, const float* residual, const void* branch, const float* weight, float* sum, void* out,
                                const Streams& streams, float eps, int device, void* stream);
void carried_softmax_cuda(const float* scores, const float* clean, const void* delta, void* out, const Streams& streams, float scale,
                         int device, void* stream);

}  // namespace clado
