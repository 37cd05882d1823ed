// float16 as head_cuda.cu uses it, on the compiler's own type.
#pragma once

struct __half {
  _Float16 x;
};
struct __half2 {
  __half x, y;
};

inline float __half2float(__half a) { return float(a.x); }
inline __half __float2half_rn(float x) { return {_Float16(x)}; }
inline float __low2float(__half2 a) { return float(a.x.x); }
inline float __high2float(__half2 a) { return float(a.y.x); }
inline __half2 __floats2half2_rn(float x, float y) { return {__float2half_rn(x), __float2half_rn(y)}; }
inline __half __hmax(__half a, __half b) { return float(a.x) != float(a.x) || float(b.x) > float(a.x) ? b : a; }
inline __half2 __hmax2(__half2 a, __half2 b) { return {__hmax(a.x, b.x), __hmax(a.y, b.y)}; }
