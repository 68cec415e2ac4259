// exp and log1p on the half lines where the losses and kernels need them, from additions and
// multiplications alone: the same bits on every device, and loops over them vectorise.
//
//     exp_of_minus(a) = e^-a           a >= 0; 0 where e^-a is below the normal numbers; to 1.25 units
//                                      in the last place of the result
//     log_of_one_plus(e) = log(1 + e)  0 <= e <= 1; to 3 units
//
// NaN gives NaN. Everything is in an anonymous namespace: each instruction set keeps its own copy.
#pragma once

#include <cstdint>
#include <cstring>

#include "host_device.h"

namespace ksm {
namespace {

template <typename T>
struct Format;

template <>
struct Format<float> {
  using Bits = uint32_t;
  static constexpr int kFractionBits = 23, kExpTerms = 7, kLogTerms = 8;
  static constexpr float kLimit = 87.0f;
  static constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  // Multiples of the upper part of ln 2 up to the limit are exact.
  static constexpr float kLn2Upper = 0.693359375f, kLn2Lower = -2.12194440e-4f;
};

template <>
struct Format<double> {
  using Bits = uint64_t;
  static constexpr int kFractionBits = 52, kExpTerms = 13, kLogTerms = 17;
  static constexpr double kLimit = 708.0;
  static constexpr double kRound = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr double kLn2Upper = 6.93145751953125e-1;
  static constexpr double kLn2Lower = 1.42860682030941723212e-6;
};

KSM_HOST_DEVICE constexpr double factorial(int n) { return n < 2 ? 1.0 : n * factorial(n - 1); }

// sum of r^k / k! for k = kFirst .. kExpTerms, over r^kFirst
template <typename T, int kFirst = 0>
KSM_HOST_DEVICE inline T exp_series(T r) {
  constexpr T kCoefficient = static_cast<T>(1.0 / factorial(kFirst));
  if constexpr (kFirst == Format<T>::kExpTerms) {
    return kCoefficient;
  } else {
    return kCoefficient + r * exp_series<T, kFirst + 1>(r);
  }
}

// sum of q^k / (2 k + 1) for k = kFirst .. kLogTerms, over q^kFirst
template <typename T, int kFirst = 0>
KSM_HOST_DEVICE inline T log_series(T q) {
  constexpr T kCoefficient = static_cast<T>(1.0 / (2 * kFirst + 1));
  if constexpr (kFirst == Format<T>::kLogTerms) {
    return kCoefficient;
  } else {
    return kCoefficient + q * log_series<T, kFirst + 1>(q);
  }
}

template <typename T>
KSM_HOST_DEVICE inline T exp_of_minus(T a) {
  using F = Format<T>;
  using Bits = typename F::Bits;
  constexpr T kLog2e = static_cast<T>(1.4426950408889634);
  const T x = a > F::kLimit ? -F::kLimit : -a;
  const T rounded = x * kLog2e + F::kRound;
  const T power = rounded - F::kRound;  // x = power * ln 2 + r
  const T r = (x - power * F::kLn2Upper) - power * F::kLn2Lower;
  // The lowest bits of `rounded` are the integer `power`: moved to the exponent they are 2^power.
  const T one = 1;
  Bits scale_bits, one_bits;
  memcpy(&scale_bits, &rounded, sizeof(T));
  memcpy(&one_bits, &one, sizeof(T));
  scale_bits = (scale_bits << F::kFractionBits) + one_bits;
  T scale;
  memcpy(&scale, &scale_bits, sizeof(T));
  const T value = exp_series<T>(r) * scale;
  return a > F::kLimit ? T(0) : value;
}

// log(1 + e) = 2 artanh(s) with s = e / (2 + e) <= 1/3.
template <typename T>
KSM_HOST_DEVICE inline T log_of_one_plus(T e) {
  const T s = e / (T(2) + e);
  return T(2) * s * log_series<T>(s * s);
}

}  // namespace
}  // namespace ksm
