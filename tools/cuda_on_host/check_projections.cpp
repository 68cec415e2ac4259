// The kernels of projections against the portable ones of the CPU: matrices bit for bit.
#include <type_traits>

#include "check.h"
#include "cpu/kernels.h"
#include "cuda/project_kinds.cuh"
#include "cuda/project_launch.h"

namespace {

using namespace ksm;

void expect_of(const Projection& p, int64_t offset, int64_t b, int64_t count, bool holds,
               const std::string& what) {
  std::string found = what;
  const auto add = [&](const char* name, int64_t value) {
    found += std::string(", ") + name + " " + std::to_string(value);
  };
  add("kind", static_cast<int64_t>(p.kind));
  add("k", p.k);
  add("sparsity", p.sparsity);
  add("hadamard", p.hadamard);
  add("offset", offset);
  add("b", b);
  add("p", count);
  expect(holds, found);
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

// Sums of order one may cancel.
template <typename T>
bool near_sums(std::vector<T> a, std::vector<T> b) {
  a.push_back(std::sqrt(static_cast<T>(b.size())));
  b.push_back(a.back());
  return near(a, b, sizeof(T) == 4 ? 3e-6 : 1e-14);
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
  kPortableKernels.of<T>().project_rows(projection, range, {0, k}, p, x.data(), p, expected.data(),
                                        k);
  kPortableKernels.of<T>().project_rows_back(projection, range, k, y.data(), transposed.data(), p);
  expect_of(projection, offset, p, p,
            project<T, T>(projection, offset, x, p, p, p, zeros<T>(p * k)) == expected, "P");
  expect_of(projection, offset, k, p, adjoint<T>(projection, offset, y, k, p) == transposed,
            "P transposed");
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
  kPortableKernels.of<T>().project_rows(projection, range, {0, k}, b, converted.data(), stride,
                                        expected.data(), k);
  const std::vector<T> result = in_any_order(
      "product", [&] { return project<From, T>(projection, offset, x, stride, b, p, y); });
  expect_of(projection, offset, b, p, near_sums(result, expected), "product");

  std::vector<T> unprojected = zeros<T>(b * p);
  kPortableKernels.of<T>().project_rows_back(projection, range, b, y.data(), unprojected.data(), p);
  const std::vector<T> back =
      in_any_order("adjoint product", [&] { return adjoint<T>(projection, offset, y, b, p); });
  expect_of(projection, offset, b, p, near_sums(back, unprojected), "adjoint product");
}

// The largest and least numbers survive being cut into terms; what is not finite stays what it is.
void check_extremes(const Projection& projection) {
  const std::vector<float> values = {3.4028235e38f, -3.4028235e38f, 1.1754944e-38f, 1e-45f,
                                     -0.0f,         INFINITY,       -INFINITY,      NAN};
  for (const float value : values) {
    const std::vector<float> result =
        project<float, float>(projection, 3, {value}, 1, 1, 1, zeros<float>(projection.k));
    std::vector<float> expected = zeros<float>(projection.k);
    kPortableKernels.of<float>().project_rows(projection, {3, 4}, {0, projection.k}, 1, &value, 1,
                                              expected.data(), projection.k);
    for (int64_t j = 0; j < projection.k; ++j) {
      const bool same = result[j] == expected[j] || (std::isnan(result[j]) && std::isnan(value));
      expect_of(projection, 3, 1, 1, same, "extreme value");
    }
  }
}

}  // namespace

int main() {
  const uint64_t seed = 123456789012345;
  const std::vector<Projection> projections = {
      {Kind::kSbp, seed, 64, 1, false},         {Kind::kSbp, seed, 320, 5, false},
      {Kind::kSbp, seed, 24, 2, false},         {Kind::kSbp, seed, 7, 1, false},
      {Kind::kSbp, seed, 12, 12, false},        {Kind::kSbp, seed, 960, 1, false},
      {Kind::kSbp, seed, 64, 1, true},          {Kind::kSbp, seed, 96, 2, true},
      {Kind::kSbp, seed, 12, 1, true},          {Kind::kSbp, seed, 7, 1, true},
      {Kind::kRademacher, seed, 48, 1, false},  {Kind::kRademacher, seed, 70, 1, false},
      {Kind::kRademacher, seed, 300, 1, false}, {Kind::kGaussian, seed, 20, 1, false},
      {Kind::kGaussian, seed, 65, 1, false},    {Kind::kSjlt, seed, 64, 4, false},
      {Kind::kSjlt, seed, 10, 5, false},        {Kind::kSjlt, seed, 300, 1, false},
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
  // Rows whose groups of four are aligned, in x or in the adjoint's result, by one, two and four
  // groups of rows; segments that end inside of a tile; more blocks than are drawn at once.
  for (const Projection& projection :
       {Projection{Kind::kSbp, seed, 2064, 3, false}, Projection{Kind::kSbp, seed, 64, 4, false},
        Projection{Kind::kSbp, seed, 320, 1, true}, Projection{Kind::kSjlt, seed, 270, 3, false},
        Projection{Kind::kRademacher, seed, 270, 1, false}}) {
    const int64_t offset = (int64_t{1} << 32) - 48;
    for (const int64_t b : {int64_t{3}, int64_t{13}, int64_t{35}}) {
      check_products<float, float>(projection, offset, b, 1333);
      check_products<float, float>(projection, offset, b, 6332);
    }
    check_products<__nv_bfloat16, float>(projection, offset, 18, 1333);
    check_products<__half, float>(projection, 4, 9, 6001);
  }
  on_host::most_shared = 32 * 1024;  // sums of few outputs fit at once
  check_matrix<float>({Kind::kSjlt, seed, 600, 2, false}, 9, 300);
  check_products<float, float>({Kind::kSjlt, seed, 300, 1, false}, 3, 35, 4501);
  check_products<__half, float>({Kind::kSjlt, seed, 300, 1, false}, 4, 5, 2600);
  on_host::most_shared = 80 * 1024;
  check_products<double, double>({Kind::kSjlt, seed, 1000, 2, false}, 0, 33, 3000);
  on_host::most_shared = 227 * 1024;
  check_extremes({Kind::kRademacher, seed, 16, 1, false});
  // A permutation of more vectors than 16 bits count, and runs of 4096 in rows of several parts.
  check_products<float, float>({Kind::kSbp, seed, 70001, 1, false}, 70000, 1, 70005);
  check_products<double, double>({Kind::kSbp, seed, 8192, 1, true}, 8000, 6, 9000);
  check_products<float, float>({Kind::kSbp, seed, 4096, 1, true}, 3 * 4096, 9, 8997);
  check_products<__nv_bfloat16, float>({Kind::kSbp, seed, 4096, 1, true}, 4100, 3, 9001);
  return report("CUDA projections");
}
