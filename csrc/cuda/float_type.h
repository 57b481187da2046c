// The floating-point types that the kernels know, for launch interfaces: plain C++.
#pragma once

namespace smartmoe::cuda {
enum class FloatType { kFloat16, kBFloat16, kFloat32 };
}  // namespace smartmoe::cuda
