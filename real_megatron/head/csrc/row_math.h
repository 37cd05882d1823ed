// The arithmetic of one row, shared by the CUDA kernels (head_cuda.cu) and their CPU counterpart (head_cpu.cpp).
//
// A row's softmax is carried as (max, sum), sum = Σ exp(z - max): all differences are taken before any exponential, so
// the error does not grow with the size of the logits.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define HEAD_FN __host__ __device__ __forceinline__
#define HEAD_UNROLL _Pragma("unroll")
#else
#define HEAD_FN inline __attribute__((always_inline))
#define HEAD_UNROLL
#endif

namespace head {

constexpr float kLog2E = 1.4426950408889634f;

HEAD_FN float bits_to_float(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

HEAD_FN uint32_t float_to_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}

HEAD_FN float minus_infinity() { return bits_to_float(0xff800000u); }

// 2^x to 2 ulp, exactly 0 below -126 (-inf included), NaN for NaN. Callers pass x ≤ 0, up to rounding.
HEAD_FN float exp2_of(float x) {
#ifdef __CUDA_ARCH__
  return exp2f(x);
#else
  // Branch-free, so that compilers vectorise it. Adding 1.5·2^23 + 127 rounds to an integer and leaves it, as the
  // exponent field of a power of two, in the low mantissa bits. A NaN stays in p, whatever the exponent.
  const float magic = 12583039.f;
  const float clamped = x < -126.f ? -126.f : x;
  const float shifted = clamped + magic;
  const float f = clamped - (shifted - magic);  // in [-0.5, 0.5]
  float p = 1.5467364573851228e-4f;             // least-squares fit of 2^f, relative error 2.6e-9
  p = p * f + 1.3400432653725147e-3f;
  p = p * f + 9.618035517632961e-3f;
  p = p * f + 5.550327152013779e-2f;
  p = p * f + 2.4022650718688965e-1f;
  p = p * f + 6.931471824645996e-1f;
  p = p * f + 1.f;
  return x < -126.f ? 0.f : p * bits_to_float(float_to_bits(shifted) << 23);
#endif
}

// The larger one. A NaN in the first argument is dropped.
HEAD_FN float larger(float a, float b) {
#ifdef __CUDA_ARCH__
  return fmaxf(a, b);
#else
  return a > b ? a : b;
#endif
}

// exp(z - max). `max` may be -inf only where `z` is -inf too: then 0 is asked for, hence the finite base.
HEAD_FN float base_of(float max) { return max == minus_infinity() ? 0.f : max; }
HEAD_FN float exp_below(float z, float base) { return exp2_of((z - base) * kLog2E); }

struct MaxSum {
  float max;
  float sum;
};

// The (max, sum) of both together. Neutral element: {-inf, 0}. NaN and +inf end as a NaN sum.
HEAD_FN MaxSum merge(MaxSum a, MaxSum b) {
  const float max = larger(a.max, b.max);
  const float base = base_of(max);
  return {max, a.sum * exp_below(a.max, base) + b.sum * exp_below(b.max, base)};
}

// max of kCount values get(0 … kCount - 1), kLanes at a time. Drops NaN; the sum is then NaN.
template <int kLanes, int kCount, typename Get>
HEAD_FN float max_of(Get get) {
  static_assert(kCount % kLanes == 0 && (kLanes & (kLanes - 1)) == 0, "2^n lanes share the values equally");
  float lane[kLanes];
  HEAD_UNROLL
  for (int l = 0; l < kLanes; ++l) lane[l] = get(l);
  HEAD_UNROLL
  for (int i = kLanes; i < kCount; i += kLanes)
    HEAD_UNROLL
    for (int l = 0; l < kLanes; ++l) lane[l] = larger(get(i + l), lane[l]);
  HEAD_UNROLL
  for (int width = kLanes / 2; width > 0; width /= 2)
    HEAD_UNROLL
    for (int l = 0; l < width; ++l) lane[l] = larger(lane[l], lane[l + width]);
  return lane[0];
}

// Σ exp(get(i) - max) of kCount values, given their maximum: one exponential a value, nothing is rescaled.
template <int kLanes, int kCount, typename Get>
HEAD_FN float sum_below(Get get, float max) {
  static_assert(kCount % kLanes == 0 && (kLanes & (kLanes - 1)) == 0, "2^n lanes share the values equally");
  const float base = base_of(max);
  float lane[kLanes];
  HEAD_UNROLL
  for (int l = 0; l < kLanes; ++l) lane[l] = 0.f;
  HEAD_UNROLL
  for (int i = 0; i < kCount; i += kLanes)
    HEAD_UNROLL
    for (int l = 0; l < kLanes; ++l) lane[l] += exp_below(get(i + l), base);
  HEAD_UNROLL
  for (int width = kLanes / 2; width > 0; width /= 2)
    HEAD_UNROLL
    for (int l = 0; l < width; ++l) lane[l] += lane[l + width];
  return lane[0];
}

// -(Σ_j g_j) / sum; 0 says that the row need not be read.
HEAD_FN float coefficient_of(float grad_sum, float sum) { return grad_sum == 0.f ? 0.f : -grad_sum / sum; }

// The dense part of d loss / d z: -(Σ_j g_j) · p(z).
HEAD_FN float dense_gradient(float z, float max, float coefficient) {
  return coefficient * exp2_of((z - max) * kLog2E);
}

// The whole gradient at the id that entry j of a row asks for: repeats of the id in the row share one sum, in order.
// Returns false if an earlier entry of the row has the same id.
HEAD_FN bool sparse_gradient(const int64_t* ids, const float* grad, const float* log_probs, int64_t begin, int64_t end,
                             int64_t j, float grad_sum, float* gradient) {
  for (int64_t k = begin; k < j; ++k)
    if (ids[k] == ids[j]) return false;
  float total = grad[j];
  for (int64_t k = j + 1; k < end; ++k)
    if (ids[k] == ids[j]) total += grad[k];
  *gradient = grad_sum == 0.f ? total : total - grad_sum * exp2_of(log_probs[j] * kLog2E);
  return true;
}

// Where the columns of one shard lie in the vocabulary; columns past `columns` are padding.
struct Shard {
  int64_t first_id;
  int64_t columns;
  HEAD_FN bool holds(int64_t id) const { return id >= first_id && id < first_id + columns; }
};

}  // namespace head
