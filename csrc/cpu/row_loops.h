// Passes over one row for Gram matrices, regressions and softmax, written for the compiler to
// vectorise; see loops.h for how it is included.
#pragma once

#include "cpu/kernels.h"

namespace ksm {
namespace {

template <typename T, typename C>
void scale(const C* curvature, int64_t count, T* __restrict u) {
  for (int64_t j = 0; j < count; ++j) u[j] *= static_cast<T>(widened(curvature[j]));
}

inline float root_of(float value) { return __builtin_sqrtf(value); }
inline double root_of(double value) { return __builtin_sqrt(value); }

constexpr int64_t kLossLanes = 8;  // partial sums, in float64: a fixed order of addition

template <typename T, typename C>
double logistic(const T* __restrict h, int64_t count, T* __restrict u, C* __restrict curvature) {
  constexpr int64_t kStrip = 256;  // margins whose losses are stored before they are added
  T losses[kStrip];
  C unused[kStrip];
  double lanes[kLossLanes] = {};
  for (int64_t first = 0; first < count; first += kStrip) {
    const int64_t strip = count - first < kStrip ? count - first : kStrip;
    C* __restrict target = curvature ? curvature + first : unused;
    for (int64_t j = 0; j < strip; ++j) {
      const Logistic<T> entry = logistic_of(h[first + j] + u[first + j]);
      losses[j] = entry.loss;
      u[first + j] = entry.slope;
      target[j] = Stored<C>::of(entry.curvature);
    }
    int64_t j = 0;
    for (; j + kLossLanes <= strip; j += kLossLanes) {
      for (int64_t q = 0; q < kLossLanes; ++q) lanes[q] += static_cast<double>(losses[j + q]);
    }
    for (; j < strip; ++j) lanes[0] += static_cast<double>(losses[j]);
  }
  double sum = 0;
  for (const double lane : lanes) sum += lane;
  return sum;
}

template <typename T>
void kernel_values(const KernelParameters& kernel, T x_square, const T* __restrict y_squares,
                   int64_t count, T* __restrict values) {
  const T gamma = static_cast<T>(kernel.gamma), coef0 = static_cast<T>(kernel.coef0);
  switch (kernel.kind) {
    case KernelKind::kPolynomial:
      for (int64_t j = 0; j < count; ++j) {
        values[j] = power_of(gamma * values[j] + coef0, kernel.degree);
      }
      return;
    case KernelKind::kRbf:
      for (int64_t j = 0; j < count; ++j) {
        values[j] = exp_of_minus(gamma * squared_distance(x_square, y_squares[j], values[j]));
      }
      return;
    case KernelKind::kLaplace:
      for (int64_t j = 0; j < count; ++j) values[j] = exp_of_minus(gamma * values[j]);
      return;
    case KernelKind::kExponential:
      for (int64_t j = 0; j < count; ++j) {
        const T distance = squared_distance(x_square, y_squares[j], values[j]);
        values[j] = exp_of_minus(gamma * root_of(distance));
      }
      return;
    default: return;  // kLinear: the dot product itself
  }
}

template <typename T>
void absolute_distances(const T* __restrict x, const T* __restrict y, int64_t n, int64_t count,
                        T* __restrict values) {
  constexpr int64_t kWide = 64;  // sums that stay in registers over all coordinates
  int64_t first = 0;
  for (; first + kWide <= count; first += kWide) {
    T sums[kWide] = {};
    for (int64_t d = 0; d < n; ++d) {
      const T coordinate = x[d];
      const T* __restrict column = y + d * count + first;
      for (int64_t j = 0; j < kWide; ++j) {
        const T difference = coordinate - column[j];
        sums[j] += difference < 0 ? -difference : difference;
      }
    }
    for (int64_t j = 0; j < kWide; ++j) values[first + j] = sums[j];
  }
  for (; first < count; ++first) {
    T sum = 0;
    for (int64_t d = 0; d < n; ++d) {
      const T difference = x[d] - y[d * count + first];
      sum += difference < 0 ? -difference : difference;
    }
    values[first] = sum;
  }
}

constexpr int64_t kSums = 32;     // side by side in registers, in the type of the entries
constexpr int64_t kBlock = 1024;  // entries they add up before they are widened

// The sum of term(j) for j < count.
template <typename T, typename Term>
double sum_of(int64_t count, const Term& term) {
  double total = 0;
  for (int64_t first = 0; first < count; first += kBlock) {
    const int64_t last = count - first < kBlock ? count : first + kBlock;
    T sums[kSums] = {};
    int64_t j = first;
    for (; j + kSums <= last; j += kSums) {
      for (int64_t q = 0; q < kSums; ++q) sums[q] += term(j + q);
    }
    for (; j < last; ++j) sums[0] += term(j);
    for (const T sum : sums) total += static_cast<double>(sum);
  }
  return total;
}

template <typename T>
void softmax(const T* __restrict z, int64_t count, T* __restrict p) {
  T largest[kSums];
  for (T& entry : largest) entry = z[0];
  int64_t j = 0;
  for (; j + kSums <= count; j += kSums) {
    for (int64_t q = 0; q < kSums; ++q) {
      largest[q] = z[j + q] > largest[q] ? z[j + q] : largest[q];
    }
  }
  for (; j < count; ++j) largest[0] = z[j] > largest[0] ? z[j] : largest[0];
  T top = largest[0];
  for (const T entry : largest) top = entry > top ? entry : top;
  for (j = 0; j < count; ++j) p[j] = exp_of_minus(top - z[j]);
  const T scale = static_cast<T>(1 / sum_of<T>(count, [&](int64_t k) { return p[k]; }));
  for (j = 0; j < count; ++j) p[j] *= scale;
}

template <typename T>
T dot(const T* __restrict x, const T* __restrict y, int64_t count) {
  return static_cast<T>(sum_of<T>(count, [&](int64_t j) { return x[j] * y[j]; }));
}

template <typename T>
void centre(const T* p, const T* x, T weight, T mean, int64_t count, T* out) {
#pragma GCC ivdep  // out is x itself, or elsewhere
  for (int64_t j = 0; j < count; ++j) out[j] = weight * p[j] * (x[j] - mean);
}

}  // namespace
}  // namespace ksm
