// What the checks share: random inputs, comparisons, and their count.
#pragma once

#include <cmath>
#include <cstdio>
#include <random>
#include <string>
#include <vector>

inline std::mt19937_64 random_bits(0);
inline int compared = 0, different = 0;

inline void expect(bool holds, const std::string& what) {
  ++compared;
  if (holds) return;
  ++different;
  std::printf("%s differs\n", what.c_str());
}

// Prints the count; the exit status.
inline int report(const char* what) {
  std::printf("%s on the host: %d comparisons, %d differ\n", what, compared, different);
  return different != 0;
}

template <typename T>
std::vector<T> normals(int64_t size) {
  std::normal_distribution<double> normal;
  std::vector<T> out(size);
  for (T& value : out) value = static_cast<T>(normal(random_bits));
  return out;
}

// The error of a in the 2-norm, relative to that of b.
template <typename A, typename B>
double error_of(const std::vector<A>& a, const std::vector<B>& b) {
  double error = 0, size = 1e-300;
  for (size_t i = 0; i < a.size() && i < b.size(); ++i) {
    const double difference = static_cast<double>(a[i]) - static_cast<double>(b[i]);
    error += difference * difference;
    size += static_cast<double>(b[i]) * static_cast<double>(b[i]);
  }
  return a.size() == b.size() ? std::sqrt(error / size) : INFINITY;
}

// A NaN is far.
template <typename A, typename B>
bool near(const std::vector<A>& a, const std::vector<B>& b, double tolerance) {
  return error_of(a, b) <= tolerance;
}

// Calls body, which returns a result, as usual and in other orders of threads, warps and blocks; the
// usual result, of which the others are the same bits.
template <typename Body>
auto in_any_order(const std::string& what, const Body& body) {
  const auto usual = body();
  on_host::shuffled = true;
  on_host::most_blocks = 3;
  expect(body() == usual, what + ", reordered,");
  on_host::shuffled = false;
  on_host::most_blocks = 1 << 14;
  return usual;
}
