// CPU counterpart of head_cuda.cu: the same row arithmetic, vectorised over columns, threaded over rows.
//
// Plain C interface (no PyTorch headers), so one build serves every PyTorch. Each row is the work of one thread from
// start to end: results do not depend on the number of threads.
#include <atomic>
#include <system_error>
#include <thread>
#include <type_traits>
#include <vector>

#include "row_math.h"

namespace {

using namespace head;

struct Bf16 {
  uint16_t bits;
};
struct Fp16 {
  uint16_t bits;
};

HEAD_FN float load(float x) { return x; }
HEAD_FN float load(Bf16 x) { return bits_to_float(uint32_t(x.bits) << 16); }
HEAD_FN float load(Fp16 x) {
  // The exponent field moves from 5 to 8 bits by a multiplication with 2^112, which also normalises subnormals.
  const uint32_t magnitude = uint32_t(x.bits & 0x7fff) << 13;
  const float scaled = bits_to_float(magnitude) * bits_to_float((127 + 112) << 23);
  const uint32_t bits = magnitude >= 0x0f800000u ? magnitude | 0x7f800000u : float_to_bits(scaled);
  return bits_to_float(bits | uint32_t(x.bits & 0x8000) << 16);
}

HEAD_FN void store(float* to, float x) { *to = x; }
HEAD_FN void store(Bf16* to, float x) {
  const uint32_t bits = float_to_bits(x);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1)) >> 16;  // to nearest, ties to even
  to->bits = uint16_t(x != x ? 0x7fc0u : rounded);
}
HEAD_FN void store(Fp16* to, float x) {
  const uint32_t sign = float_to_bits(x) & 0x80000000u;
  const uint32_t bits = float_to_bits(x) ^ sign;
  // Adding 0.5 aligns the last mantissa bit with fp16's 2^-24, so the addition rounds to nearest, ties to even.
  const uint32_t subnormal = float_to_bits(bits_to_float(bits) + 0.5f) - 0x3f000000u;
  const uint32_t normal = (bits + 0xc8000fffu + ((bits >> 13) & 1)) >> 13;
  const uint32_t overflow = bits > 0x7f800000u ? 0x7e00u : 0x7c00u;
  const uint32_t magnitude = bits >= 0x47800000u ? overflow : (bits < 0x38800000u ? subnormal : normal);
  to->bits = uint16_t(magnitude | (sign >> 16));
}

constexpr int kLanes = 64;   // independent sums: four AVX-512 or eight AVX2 registers hide the latency of an addition
constexpr int kBlock = 1024;  // columns whose float32 copy stays in the first-level cache

template <typename T>
MaxSum row_stats(const T* row, int64_t columns) {
  MaxSum seen{minus_infinity(), 0.f};
  alignas(64) float x[kBlock];
  for (int64_t start = 0; start < columns; start += kBlock) {
    const int count = int(columns - start < kBlock ? columns - start : kBlock);
    for (int i = 0; i < count; ++i) x[i] = load(row[start + i]);
    for (int i = count; i < kBlock; ++i) x[i] = minus_infinity();
    const auto get = [&](int i) { return x[i]; };
    const float max = max_of<kLanes, kBlock>(get);
    seen = merge(seen, {max, sum_below<kLanes, kBlock>(get, max)});
  }
  return seen;
}

template <typename T>
void row_gradient(const T* row, T* out, int64_t columns, int64_t width, float max, float coefficient) {
  if (coefficient == 0.f) {
    memset(static_cast<void*>(out), 0, size_t(width) * sizeof(T));
    return;
  }
#pragma GCC ivdep
  for (int64_t i = 0; i < columns; ++i) store(out + i, dense_gradient(load(row[i]), max, coefficient));
  if (width > columns) memset(static_cast<void*>(out + columns), 0, size_t(width - columns) * sizeof(T));
}

// Threads take rows a few at a time; a row's result does not depend on the thread that computes it.
template <typename Work>
void for_each_row(int64_t rows, int64_t width, int threads, Work work) {
  const int64_t batch = 1 + 65536 / (width + 1);
  const int64_t batches = (rows + batch - 1) / batch;
  std::atomic<int64_t> next{0};
  auto run = [&] {
    for (int64_t b; (b = next.fetch_add(1)) < batches;)
      for (int64_t row = b * batch; row < rows && row < (b + 1) * batch; ++row) work(row);
  };
  std::vector<std::thread> helpers;
  try {
    for (int64_t i = 1; i < threads && i < batches; ++i) helpers.emplace_back(run);
  } catch (const std::system_error&) {  // no more threads can be created: the existing ones do the work
  }
  run();
  for (auto& helper : helpers) helper.join();
}

template <typename T>
void stats(const T* logits, int64_t rows, int64_t stride, Shard shard, const int64_t* ids, const int64_t* offsets,
           const float* values, bool weighted, float* packed, int threads) {
  float* gathered = packed + (weighted ? 3 : 2) * rows;
  for_each_row(rows, shard.columns, threads, [=](int64_t r) {
    const T* row = logits + r * stride;
    const MaxSum seen = row_stats(row, shard.columns);
    packed[r] = seen.max;
    packed[rows + r] = seen.sum;
    float weight = 0.f;
    for (int64_t j = offsets[r]; j < offsets[r + 1]; ++j) {
      const float z = shard.holds(ids[j]) ? load(row[ids[j] - shard.first_id]) : minus_infinity();
      gathered[j] = z;
      if (weighted) weight += values[j] * exp_below(z, base_of(seen.max));
    }
    if (weighted) packed[2 * rows + r] = weight;
  });
}

template <typename T>
void dlogits(const T* logits, T* out, int64_t rows, int64_t width, int64_t stride, int64_t out_stride, Shard shard,
             const float* log_probs, const float* max, const float* sum, const float* grad, const int64_t* ids,
             const int64_t* offsets, int threads) {
  for_each_row(rows, width, threads, [=](int64_t r) {
    T* to = out + r * out_stride;
    float grad_sum = 0.f;
    for (int64_t j = offsets[r]; j < offsets[r + 1]; ++j) grad_sum += grad[j];
    row_gradient(logits + r * stride, to, shard.columns, width, max[r], coefficient_of(grad_sum, sum[r]));
    for (int64_t j = offsets[r]; j < offsets[r + 1]; ++j) {
      float gradient;
      if (shard.holds(ids[j]) &&
          sparse_gradient(ids, grad, log_probs, offsets[r], offsets[r + 1], j, grad_sum, &gradient))
        store(to + (ids[j] - shard.first_id), gradient);
    }
  });
}

// Calls `work` with a null pointer of the element type that `dtype` stands for: 0 float32, 1 bfloat16, 2 float16.
template <typename Work>
int with_type(int dtype, Work work) {
  switch (dtype) {
    case 0: work(static_cast<float*>(nullptr)); return 0;
    case 1: work(static_cast<Bf16*>(nullptr)); return 0;
    case 2: work(static_cast<Fp16*>(nullptr)); return 0;
    default: return 1;
  }
}

}  // namespace

extern "C" {

// packed: max [rows], sum [rows], if weighted Σ_j value_j · exp(z_j - max) [rows], then the gathered logits [nnz].
int head_cpu_stats(const void* logits, int dtype, int64_t rows, int64_t stride, int64_t first_id, int64_t columns,
                   const int64_t* ids, const int64_t* offsets, const float* values, int weighted, float* packed,
                   int threads) {
  return with_type(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    stats(static_cast<const T*>(logits), rows, stride, Shard{first_id, columns}, ids, offsets, values, weighted != 0,
          packed, threads);
  });
}

// out [rows, width] may be logits; columns from `columns` on become zeros.
int head_cpu_dlogits(const void* logits, void* out, int dtype, int64_t rows, int64_t width, int64_t stride,
                     int64_t out_stride, int64_t first_id, int64_t columns, const float* log_probs, const float* max,
                     const float* sum, const float* grad, const int64_t* ids, const int64_t* offsets, int threads) {
  return with_type(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    dlogits(static_cast<const T*>(logits), static_cast<T*>(out), rows, width, stride, out_stride,
            Shard{first_id, columns}, log_probs, max, sum, grad, ids, offsets, threads);
  });
}

}  // extern "C"
