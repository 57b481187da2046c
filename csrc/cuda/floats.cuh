// Elements of rows on the device: vectors of them, and their way to float and back.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstring>

#include "rows.cuh"

namespace smartmoe::cuda {
__device__ __forceinline__ float to_float(float value) {
  return value;
}
__device__ __forceinline__ float to_float(__half value) {
  return __half2float(value);
}
__device__ __forceinline__ float to_float(__nv_bfloat16 value) {
  return __bfloat162float(value);
}

__device__ __forceinline__ void set_float(float& to, float value) {
  to = value;
}
__device__ __forceinline__ void set_float(__half& to, float value) {
  to = __float2half_rn(value);
}
__device__ __forceinline__ void set_float(__nv_bfloat16& to, float value) {
  to = __float2bfloat16_rn(value);
}

// kWidth elements that are read and written at once: 16 bytes of them, or a single one.
template <class T, int kWidth>
struct alignas(sizeof(T) * kWidth) Vector {
  T element[kWidth];
};

// A vector that is not needed again.
template <class T, int kWidth>
__device__ __forceinline__ Vector<T, kWidth> load_once(const Vector<T, kWidth>* from) {
  if constexpr (sizeof(Vector<T, kWidth>) == kVectorBytes) {
    const uint4 bits = __ldcs(reinterpret_cast<const uint4*>(from));
    Vector<T, kWidth> vector;
    memcpy(&vector, &bits, sizeof(bits));
    return vector;
  } else {
    return *from;
  }
}

template <class T, int kWidth>
__device__ __forceinline__ void store(Vector<T, kWidth>* to, const float (&values)[kWidth]) {
  Vector<T, kWidth> vector;
#pragma unroll
  for (int i = 0; i < kWidth; ++i) set_float(vector.element[i], values[i]);
  if constexpr (sizeof(vector) == kVectorBytes) {
    uint4 bits;
    memcpy(&bits, &vector, sizeof(bits));
    *reinterpret_cast<uint4*>(to) = bits;
  } else {
    *to = vector;
  }
}

// A few floats per token, whose type is looked at when they are used: no kernel of its own for each.
__device__ __forceinline__ float load_any(const void* from, FloatType type, int64_t i) {
  switch (type) {
    case FloatType::kFloat16: return to_float(static_cast<const __half*>(from)[i]);
    case FloatType::kBFloat16: return to_float(static_cast<const __nv_bfloat16*>(from)[i]);
    default: return static_cast<const float*>(from)[i];
  }
}

__device__ __forceinline__ void store_any(void* to, FloatType type, int64_t i, float value) {
  switch (type) {
    case FloatType::kFloat16: return set_float(static_cast<__half*>(to)[i], value);
    case FloatType::kBFloat16: return set_float(static_cast<__nv_bfloat16*>(to)[i], value);
    default: static_cast<float*>(to)[i] = value;
  }
}

// Calls f with a zero of the type.
template <class F>
void with_float_type(FloatType type, F&& f) {
  switch (type) {
    case FloatType::kFloat16: return f(__half{});
    case FloatType::kBFloat16: return f(__nv_bfloat16{});
    default: return f(float{});
  }
}
}  // namespace smartmoe::cuda
