// Runs the kernels of csrc/cuda/project.cu on the host and compares them with the portable CPU
// kernels; see check_cuda_project.sh. Matrices must agree bit for bit.
#include <cstdio>
#include <random>
#include <type_traits>
#include <vector>

#include "cpu/project_kernels.h"
#include "cuda/project.cu"

namespace {

using namespace ksm;

std::mt19937_64 random_bits(0);
int compared = 0, different = 0;

void expect(bool holds, const char* what, const Projection& p, int64_t offset, int64_t b,
            int64_t count) {
  ++compared;
  if (holds) return;
  ++different;
  std::printf(
      "%s differs: kind %d, k %lld, sparsity %lld, hadamard %d, offset %lld, b %lld, p %lld\n",
      what, static_cast<int>(p.kind), static_cast<long long>(p.k),
      static_cast<long long>(p.sparsity), p.hadamard, static_cast<long long>(offset),
      static_cast<long long>(b), static_cast<long long>(count));
}

template <typename T>
const ProjectKernels<T>& portable() {
  if constexpr (std::is_same_v<T, float>) {
    return kPortableProject.single;
  } else {
    return kPortableProject.real;
  }
}

template <typename T>
std::vector<T> zeros(int64_t size) {
  return std::vector<T>(static_cast<size_t>(size));
}

// x P on "CUDA", in memory that ends where it should, for a checker of memory to see.
template <typename From, typename T>
std::vector<T> project(const Projection& projection, int64_t offset, const std::vector<From>& x,
                       int64_t stride, int64_t b, int64_t p, std::vector<T> y) {
  std::vector<T> scratch(project_scratch(projection, offset, b, p), T(NAN));
  launch_project<From, T>(projection, offset, x.data(), stride, b, p, scratch.data(), y.data(),
                          nullptr);
  return y;
}

template <typename T>
std::vector<T> adjoint(const Projection& projection, int64_t offset, const std::vector<T>& y,
                       int64_t b, int64_t p) {
  std::vector<T> scratch(project_adjoint_scratch(projection, b, p), T(NAN));
  std::vector<T> x(b * p, T(NAN));
  launch_project_adjoint<T>(projection, offset, y.data(), b, p, scratch.data(), x.data(), nullptr);
  return x;
}

template <typename T>
bool near(const std::vector<T>& a, const std::vector<T>& b) {
  double error = 0, size = static_cast<double>(b.size());  // sums of order one may cancel
  for (size_t i = 0; i < a.size(); ++i) {
    error += (static_cast<double>(a[i]) - b[i]) * (static_cast<double>(a[i]) - b[i]);
    size += static_cast<double>(b[i]) * b[i];
  }
  // Written so that a NaN is far.
  return a.size() == b.size() && error <= size * (sizeof(T) == 4 ? 1e-11 : 1e-28);
}

template <typename T>
std::vector<T> eye(int64_t size) {
  std::vector<T> out = zeros<T>(size * size);
  for (int64_t i = 0; i < size; ++i) out[i * size + i] = 1;
  return out;
}

template <typename T>
void check_matrix(const Projection& projection, int64_t offset, int64_t p) {
  const int64_t k = projection.k;
  std::vector<T> expected = zeros<T>(p * k), transposed = zeros<T>(k * p);
  const std::vector<T> x = eye<T>(p), y = eye<T>(k);
  const Range range = {offset, offset + p};
  portable<T>().project(projection, range, {0, k}, p, x.data(), p, expected.data(), k);
  portable<T>().adjoint(projection, range, k, y.data(), transposed.data(), p);
  expect(project<T, T>(projection, offset, x, p, p, p, zeros<T>(p * k)) == expected, "P",
         projection, offset, p, p);
  expect(adjoint<T>(projection, offset, y, k, p) == transposed, "P transposed", projection, offset,
         k, p);
}

template <typename From>
From make(float value) {
  if constexpr (std::is_same_v<From, float> || std::is_same_v<From, double>) {
    return value;
  } else {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof(bits));
    if constexpr (std::is_same_v<From, __nv_bfloat16>) {
      return {static_cast<uint16_t>(bits >> 16)};
    } else {  // normal numbers only
      return {static_cast<uint16_t>(bits >> 16 & 0x8000 | ((bits >> 23 & 255) - 112) << 10 |
                                    (bits >> 13 & 1023))};
    }
  }
}

template <typename From, typename T>
void check_products(const Projection& projection, int64_t offset, int64_t b, int64_t p) {
  const int64_t k = projection.k, stride = p + 3;
  std::normal_distribution<float> normal;
  const auto draw = [&] {
    return std::copysign(std::abs(normal(random_bits)) + 0.01f, normal(random_bits));
  };
  std::vector<From> x;
  std::vector<T> converted;
  for (int64_t i = 0; i < (b - 1) * stride + p; ++i) {
    x.push_back(make<From>(draw()));
    converted.push_back(static_cast<T>(load(&x.back())));
  }
  std::vector<T> y(b * k), expected;
  for (T& value : y) value = draw();
  expected = y;
  const Range range = {offset, offset + p};
  portable<T>().project(projection, range, {0, k}, b, converted.data(), stride, expected.data(), k);
  const std::vector<T> result = project<From, T>(projection, offset, x, stride, b, p, y);
  expect(near(result, expected), "product", projection, offset, b, p);

  std::vector<T> unprojected = zeros<T>(b * p);
  portable<T>().adjoint(projection, range, b, y.data(), unprojected.data(), p);
  const std::vector<T> back = adjoint<T>(projection, offset, y, b, p);
  expect(near(back, unprojected), "adjoint product", projection, offset, b, p);

  // Any order of threads and blocks, and blocks that take many items, give the same bits.
  on_host::shuffled = true;
  on_host::most_blocks = 3;
  expect(project<From, T>(projection, offset, x, stride, b, p, y) == result, "reordered product",
         projection, offset, b, p);
  expect(adjoint<T>(projection, offset, y, b, p) == back, "reordered adjoint", projection, offset,
         b, p);
  on_host::shuffled = false;
  on_host::most_blocks = 1 << 14;
}

}  // namespace

int main() {
  const uint64_t seed = 123456789012345;
  const std::vector<Projection> projections = {
      {Kind::kSbp, seed, 64, 1, false},        {Kind::kSbp, seed, 320, 5, false},
      {Kind::kSbp, seed, 24, 2, false},        {Kind::kSbp, seed, 7, 1, false},
      {Kind::kSbp, seed, 12, 12, false},       {Kind::kSbp, seed, 960, 1, false},
      {Kind::kSbp, seed, 64, 1, true},         {Kind::kSbp, seed, 96, 2, true},
      {Kind::kSbp, seed, 12, 1, true},         {Kind::kSbp, seed, 7, 1, true},
      {Kind::kRademacher, seed, 48, 1, false}, {Kind::kRademacher, seed, 70, 1, false},
      {Kind::kGaussian, seed, 20, 1, false},   {Kind::kGaussian, seed, 65, 1, false},
      {Kind::kSjlt, seed, 64, 4, false},       {Kind::kSjlt, seed, 10, 5, false},
      {Kind::kSjlt, seed, 300, 1, false},
  };
  for (const Projection& projection : projections) {
    const int64_t offset = (int64_t{1} << 32) - 50;
    check_matrix<float>(projection, 0, 150);
    check_matrix<double>(projection, offset, 150);
    check_products<float, float>(projection, offset, 11, 333);
    check_products<__nv_bfloat16, float>(projection, offset + 37, 1, 130);
    check_products<__half, float>(projection, 5, 3, 77);
    check_products<double, double>(projection, offset, 70, 257);
    check_products<float, float>(projection, 1, 1, 1);
    if (projection.k < 100)
      check_products<float, float>(projection, 77, 5, 9000);  // several splits
  }
  // A permutation of more vectors than 16 bits count, and runs of 4096 in rows of several parts.
  check_products<float, float>({Kind::kSbp, seed, 70001, 1, false}, 70000, 1, 70005);
  check_products<double, double>({Kind::kSbp, seed, 8192, 1, true}, 8000, 6, 9000);
  std::printf("CUDA projections on the host: %d comparisons, %d differ\n", compared, different);
  return different != 0;
}
