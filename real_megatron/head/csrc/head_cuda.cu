// Gathered log-softmax over a shard of logits, for NVIDIA GPUs. The arithmetic of a row is in row_math.h.
//
// Both kernels divide every row into tiles of kVectors 16-byte vectors a thread. A thread issues all its loads before it
// uses the first, so an SM keeps over 100 KB in flight, and each logit costs one exponential: nothing is rescaled.
//   stats    reads the shard once:              tile → (max, sum); then one warp a row merges the tiles in order and
//            picks the logits that were asked for
//   dlogits  reads once and writes once, in place or not; rows whose gradients sum to zero are written but not read
// No atomics: the same input gives the same bits. All offsets are 64-bit.
//
// Plain C interface (no PyTorch headers), so one build serves every PyTorch. Launchers return a cudaError_t.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <type_traits>

#include "row_math.h"

namespace {

using namespace head;

constexpr int kThreads = 256;
constexpr int kVectors = 8;
constexpr int kWarp = 32;
constexpr unsigned kAll = 0xffffffffu;

using bf16 = __nv_bfloat16;
using fp16 = __half;

__device__ __forceinline__ float load(float x) { return x; }
__device__ __forceinline__ float load(bf16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float load(fp16 x) { return __half2float(x); }

__device__ __forceinline__ void store(float* to, float x) { *to = x; }
__device__ __forceinline__ void store(bf16* to, float x) { *to = __float2bfloat16_rn(x); }
__device__ __forceinline__ void store(fp16* to, float x) { *to = __float2half_rn(x); }

template <typename To, typename From>
__device__ __forceinline__ To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

// What a 32-bit word of a row holds: how many values, their maximum with another word's, to and from float32.
template <typename T>
struct Word;

template <>
struct Word<float> {
  static constexpr int kSize = 1;
  static constexpr uint32_t kMinusInfinity = 0xff800000u;
  static __device__ __forceinline__ uint32_t max(uint32_t a, uint32_t b) {
    return float_to_bits(larger(bits_to_float(a), bits_to_float(b)));
  }
  static __device__ __forceinline__ float max(uint32_t word) { return bits_to_float(word); }
  static __device__ __forceinline__ float get(uint32_t word, int) { return bits_to_float(word); }
  static __device__ __forceinline__ uint32_t pack(const float* x) { return float_to_bits(x[0]); }
};

template <>
struct Word<bf16> {
  static constexpr int kSize = 2;
  static constexpr uint32_t kMinusInfinity = 0xff80ff80u;
  static __device__ __forceinline__ uint32_t max(uint32_t a, uint32_t b) {
    return bit_cast<uint32_t>(__hmax2(bit_cast<__nv_bfloat162>(a), bit_cast<__nv_bfloat162>(b)));
  }
  static __device__ __forceinline__ float max(uint32_t word) { return larger(get(word, 0), get(word, 1)); }
  static __device__ __forceinline__ float get(uint32_t word, int i) {
    return bits_to_float(i == 0 ? word << 16 : word & 0xffff0000u);
  }
  static __device__ __forceinline__ uint32_t pack(const float* x) {
    return bit_cast<uint32_t>(__floats2bfloat162_rn(x[0], x[1]));
  }
};

template <>
struct Word<fp16> {
  static constexpr int kSize = 2;
  static constexpr uint32_t kMinusInfinity = 0xfc00fc00u;
  static __device__ __forceinline__ uint32_t max(uint32_t a, uint32_t b) {
    return bit_cast<uint32_t>(__hmax2(bit_cast<__half2>(a), bit_cast<__half2>(b)));
  }
  static __device__ __forceinline__ float max(uint32_t word) { return larger(get(word, 0), get(word, 1)); }
  static __device__ __forceinline__ float get(uint32_t word, int i) {
    const __half2 pair = bit_cast<__half2>(word);
    return i == 0 ? __low2float(pair) : __high2float(pair);
  }
  static __device__ __forceinline__ uint32_t pack(const float* x) {
    return bit_cast<uint32_t>(__floats2half2_rn(x[0], x[1]));
  }
};

// 16 bytes of a row, loaded and stored without displacing other data from the caches.
struct Vector {
  uint32_t word[4];
  static __device__ __forceinline__ Vector load(const void* from) {
    return bit_cast<Vector>(__ldcs(static_cast<const uint4*>(from)));
  }
  __device__ __forceinline__ void store(void* to) const { __stcs(static_cast<uint4*>(to), bit_cast<uint4>(*this)); }
};

constexpr int64_t kTileVectors = int64_t(kThreads) * kVectors;

template <typename T>
constexpr int kPerVector = 16 / sizeof(T);

template <typename T>
constexpr int64_t kTileColumns = kTileVectors * kPerVector<T>;

int64_t tiles_of(int64_t columns, int64_t tile_columns) {
  return columns <= tile_columns ? 1 : (columns + tile_columns - 1) / tile_columns;
}

// A row of `columns` values: `head` of them before the first 16-byte boundary, then whole vectors, then a tail.
template <typename T>
struct Row {
  int64_t head, vectors, columns;

  __device__ Row(const T* row, int64_t columns) : columns(columns) {
    const int64_t misaligned = int64_t(reinterpret_cast<uintptr_t>(row) % 16);
    head = misaligned ? (16 - misaligned) / int64_t(sizeof(T)) : 0;
    if (head > columns) head = columns;
    vectors = (columns - head) / kPerVector<T>;
  }
  __device__ int64_t tail() const { return head + vectors * kPerVector<T>; }
  // Tile 0 has the head as well; the tail belongs to the tile in which the next vector would begin. A row with a head
  // may end before the last tile begins.
  __device__ bool has_tail(int64_t tile) const { return tile == vectors / kTileVectors; }
  __device__ int64_t first_column(int64_t tile) const { return tile == 0 ? 0 : bound(tile); }
  __device__ int64_t end_column(int64_t tile) const { return bound(tile + 1); }

 private:
  __device__ int64_t bound(int64_t tile) const {
    const int64_t column = head + tile * kTileColumns<T>;
    return column < columns ? column : columns;
  }
};

__device__ __forceinline__ float warp_max(float x) {
  for (int step = kWarp / 2; step > 0; step /= 2) x = larger(__shfl_xor_sync(kAll, x, step), x);
  return x;
}

__device__ __forceinline__ float warp_sum(float x) {
  for (int step = kWarp / 2; step > 0; step /= 2) x += __shfl_xor_sync(kAll, x, step);
  return x;
}

// One rescaling a lane, then plain additions in a fixed tree.
__device__ __forceinline__ MaxSum warp_merge(MaxSum lane) {
  const float max = warp_max(lane.max);
  return {max, warp_sum(lane.sum * exp_below(lane.max, base_of(max)))};
}

template <typename T>
__global__ void __launch_bounds__(kThreads, 4)
    stats_tiles(const T* logits, int64_t stride, int64_t columns, unsigned tiles, MaxSum* partial) {
  const int64_t r = blockIdx.x / tiles;
  const unsigned tile = blockIdx.x % tiles;
  const T* values = logits + r * stride;
  const Row<T> row(values, columns);
  const T* vectors = values + row.head;
  constexpr int kWords = kVectors * 4;

  uint32_t word[kWords];
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    const int64_t index = tile * kTileVectors + i * kThreads + threadIdx.x;
    Vector v;
    if (index < row.vectors) {
      v = Vector::load(vectors + index * kPerVector<T>);
    } else {
#pragma unroll
      for (int k = 0; k < 4; ++k) v.word[k] = Word<T>::kMinusInfinity;
    }
#pragma unroll
    for (int k = 0; k < 4; ++k) word[4 * i + k] = v.word[k];
  }
  uint32_t largest = word[0];
#pragma unroll
  for (int i = 1; i < kWords; ++i) largest = Word<T>::max(largest, word[i]);
  constexpr int kSize = Word<T>::kSize;
  MaxSum seen{Word<T>::max(largest), 0.f};
  seen.sum = sum_below<4, kWords * kSize>([&](int i) { return Word<T>::get(word[i / kSize], i % kSize); }, seen.max);
  if (tile == 0 && threadIdx.x < row.head) seen = merge(seen, {load(values[threadIdx.x]), 1.f});
  if (row.has_tail(tile) && threadIdx.x < columns - row.tail())
    seen = merge(seen, {load(values[row.tail() + threadIdx.x]), 1.f});

  __shared__ MaxSum warps[kThreads / kWarp];
  seen = warp_merge(seen);
  if (threadIdx.x % kWarp == 0) warps[threadIdx.x / kWarp] = seen;
  __syncthreads();
  if (threadIdx.x < kWarp) {
    seen = threadIdx.x < kThreads / kWarp ? warps[threadIdx.x] : MaxSum{minus_infinity(), 0.f};
    seen = warp_merge(seen);
    if (threadIdx.x == 0) partial[r * tiles + tile] = seen;
  }
}

// One warp a row: merge the tiles, pick the logits asked for, sum the values' weights.
template <typename T>
__global__ void __launch_bounds__(kThreads) stats_rows(const T* logits, int64_t rows, int64_t stride, Shard shard,
                                                       const int64_t* ids, const int64_t* offsets, const float* values,
                                                       bool weighted, unsigned tiles, const MaxSum* partial,
                                                       float* packed) {
  const int64_t r = int64_t(blockIdx.x) * (kThreads / kWarp) + threadIdx.x / kWarp;
  const int lane = threadIdx.x % kWarp;
  if (r >= rows) return;
  MaxSum seen{minus_infinity(), 0.f};
  for (unsigned tile = lane; tile < tiles; tile += kWarp) seen = merge(seen, partial[r * tiles + tile]);
  seen = warp_merge(seen);

  float* gathered = packed + (weighted ? 3 : 2) * rows;
  float weight = 0.f;
  for (int64_t j = offsets[r] + lane; j < offsets[r + 1]; j += kWarp) {
    const float z = shard.holds(ids[j]) ? load(logits[r * stride + ids[j] - shard.first_id]) : minus_infinity();
    gathered[j] = z;
    if (weighted) weight += values[j] * exp_below(z, base_of(seen.max));
  }
  weight = warp_sum(weight);
  if (lane == 0) {
    packed[r] = seen.max;
    packed[rows + r] = seen.sum;
    if (weighted) packed[2 * rows + r] = weight;
  }
}

// One warp a row: Σ_j g_j and the coefficient of the dense part.
__global__ void __launch_bounds__(kThreads) dlogits_rows(int64_t rows, const int64_t* offsets, const float* grad,
                                                         const float* sum, float* grad_sum, float* coefficient) {
  const int64_t r = int64_t(blockIdx.x) * (kThreads / kWarp) + threadIdx.x / kWarp;
  const int lane = threadIdx.x % kWarp;
  if (r >= rows) return;
  float total = 0.f;
  for (int64_t j = offsets[r] + lane; j < offsets[r + 1]; j += kWarp) total += grad[j];
  total = warp_sum(total);
  if (lane == 0) {
    grad_sum[r] = total;
    coefficient[r] = coefficient_of(total, sum[r]);
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads, 4)
    dlogits_tiles(const T* logits, T* out, int64_t width, int64_t stride, int64_t out_stride, Shard shard,
                  const float* log_probs, const float* max, const float* grad_sum, const float* coefficients,
                  const float* grad, const int64_t* ids, const int64_t* offsets, unsigned tiles) {
  const int64_t r = blockIdx.x / tiles;
  const unsigned tile = blockIdx.x % tiles;
  const T* from = logits + r * stride;
  T* to = out + r * out_stride;
  const Row<T> row(from, shard.columns);
  const float coefficient = coefficients[r];
  const float row_max = max[r];
  const int64_t first = row.first_column(tile);
  const int64_t end = row.end_column(tile);
  const bool idle = coefficient == 0.f;

  const auto scalar = [&](int64_t c) {
    store(to + c, idle ? 0.f : dense_gradient(load(from[c]), row_max, coefficient));
  };
  if (reinterpret_cast<uintptr_t>(from) % 16 != reinterpret_cast<uintptr_t>(to) % 16) {
#pragma unroll 1
    for (int64_t c = first + threadIdx.x; c < end; c += kThreads) scalar(c);
  } else {
    const int64_t start = tile * kTileVectors + threadIdx.x;
    const T* vectors = from + row.head;
    T* out_vectors = to + row.head;
    Vector v[kVectors];
    if (!idle) {
#pragma unroll
      for (int i = 0; i < kVectors; ++i)
        if (start + i * kThreads < row.vectors) v[i] = Vector::load(vectors + (start + i * kThreads) * kPerVector<T>);
    }
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      constexpr int kSize = Word<T>::kSize;
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        float x[kSize];
#pragma unroll
        for (int p = 0; p < kSize; ++p)
          x[p] = idle ? 0.f : dense_gradient(Word<T>::get(v[i].word[k], p), row_max, coefficient);
        v[i].word[k] = Word<T>::pack(x);
      }
      if (start + i * kThreads < row.vectors) v[i].store(out_vectors + (start + i * kThreads) * kPerVector<T>);
    }
    if (tile == 0 && threadIdx.x < row.head) scalar(threadIdx.x);
    if (row.has_tail(tile) && threadIdx.x < row.columns - row.tail()) scalar(row.tail() + threadIdx.x);
  }
  if (tile + 1 == tiles) {
#pragma unroll 1
    for (int64_t c = shard.columns + threadIdx.x; c < width; c += kThreads) store(to + c, 0.f);
  }

  __syncthreads();  // the dense part of this tile is in place; now the ids asked for that lie in it
#pragma unroll 1
  for (int64_t j = offsets[r] + threadIdx.x; j < offsets[r + 1]; j += kThreads) {
    const int64_t column = ids[j] - shard.first_id;
    float gradient;
    if (column >= first && column < end &&
        sparse_gradient(ids, grad, log_probs, offsets[r], offsets[r + 1], j, grad_sum[r], &gradient))
      store(to + column, gradient);
  }
}

// Calls `work` with a null pointer of the element type that `dtype` stands for: 0 float32, 1 bfloat16, 2 float16.
template <typename Work>
int with_type(int dtype, Work work) {
  switch (dtype) {
    case 0: return work(static_cast<float*>(nullptr));
    case 1: return work(static_cast<bf16*>(nullptr));
    case 2: return work(static_cast<fp16*>(nullptr));
    default: return cudaErrorInvalidValue;
  }
}

// Blocks of a grid, or 0 where there are more than CUDA takes.
unsigned blocks(int64_t count) { return count <= 0x7fffffff ? unsigned(count) : 0; }

unsigned row_blocks(int64_t rows) { return blocks((rows + kThreads / kWarp - 1) / (kThreads / kWarp)); }

}  // namespace

extern "C" {

const char* head_cuda_error(int code) { return cudaGetErrorString(cudaError_t(code)); }

// cudaSuccess where the current GPU and its driver can run this library's kernels.
int head_cuda_check() {
  cudaFuncAttributes attributes;
  const cudaError_t code = cudaFuncGetAttributes(&attributes, dlogits_rows);
  cudaGetLastError();  // or the next launch would report it again
  return code;
}

// Floats of scratch memory that either launcher needs.
int64_t head_cuda_scratch(int dtype, int64_t rows, int64_t columns) {
  return 2 * rows * tiles_of(columns, dtype == 0 ? kTileColumns<float> : kTileColumns<fp16>);
}

// packed: max [rows], sum [rows], if weighted Σ_j value_j · exp(z_j - max) [rows], then the gathered logits [nnz].
int head_cuda_stats(const void* logits, int dtype, int64_t rows, int64_t stride, int64_t first_id, int64_t columns,
                    const int64_t* ids, const int64_t* offsets, const float* values, int weighted, float* packed,
                    float* scratch, void* stream) {
  if (rows == 0) return cudaSuccess;
  return with_type(dtype, [&](auto* type) -> int {
    using T = std::remove_pointer_t<decltype(type)>;
    const T* z = static_cast<const T*>(logits);
    const auto s = static_cast<cudaStream_t>(stream);
    const int64_t tiles = tiles_of(columns, kTileColumns<T>);
    auto* partial = reinterpret_cast<MaxSum*>(scratch);
    stats_tiles<T><<<blocks(rows * tiles), kThreads, 0, s>>>(z, stride, columns, unsigned(tiles), partial);
    stats_rows<T><<<row_blocks(rows), kThreads, 0, s>>>(z, rows, stride, Shard{first_id, columns}, ids, offsets, values,
                                                        weighted != 0, unsigned(tiles), partial, packed);
    return cudaGetLastError();
  });
}

// out [rows, width] may be logits; columns from `columns` on become zeros.
int head_cuda_dlogits(const void* logits, void* out, int dtype, int64_t rows, int64_t width, int64_t stride,
                      int64_t out_stride, int64_t first_id, int64_t columns, const float* log_probs, const float* max,
                      const float* sum, const float* grad, const int64_t* ids, const int64_t* offsets, float* scratch,
                      void* stream) {
  if (rows == 0) return cudaSuccess;
  return with_type(dtype, [&](auto* type) -> int {
    using T = std::remove_pointer_t<decltype(type)>;
    const auto s = static_cast<cudaStream_t>(stream);
    const int64_t tiles = tiles_of(columns, kTileColumns<T>);
    float* grad_sum = scratch;
    float* coefficient = scratch + rows;
    dlogits_rows<<<row_blocks(rows), kThreads, 0, s>>>(rows, offsets, grad, sum, grad_sum, coefficient);
    dlogits_tiles<T><<<blocks(rows * tiles), kThreads, 0, s>>>(
        static_cast<const T*>(logits), static_cast<T*>(out), width, stride, out_stride, Shard{first_id, columns},
        log_probs, max, grad_sum, coefficient, grad, ids, offsets, unsigned(tiles));
    return cudaGetLastError();
  });
}

}  // extern "C"
