// The kernels of masks against loops over tasks: the tables' own values bit for bit, and those joined
// from the terms of nibbles in order.
#include "check.h"
#include "cuda/weighted_mask_gram_launch.h"

namespace {

using namespace ksm;

struct Masks {
  int64_t count, n;
  std::vector<uint8_t> tasks;   // (count, n)
  std::vector<uint64_t> words;  // (count, words_of(n))
  std::vector<int32_t> sizes;   // (count)

  MaskSet set() const { return {words.data(), sizes.data(), count}; }
  bool has(int64_t i, int64_t task) const { return tasks[i * n + task]; }
};

Masks random_masks(int64_t count, int64_t n) {
  Masks out = {count, n, std::vector<uint8_t>(count * n)};
  for (uint8_t& task : out.tasks) task = random_bits() % 5 < 2;
  out.words = in_any_order("packed masks", [&] {
    std::vector<uint64_t> words(count * words_of(n));
    launch_pack_masks(out.tasks.data(), count, n, words.data(), nullptr);
    return words;
  });
  std::vector<uint64_t> expected(count * words_of(n));
  std::vector<int32_t> sizes(count);
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t task = 0; task < n; ++task) {
      expected[i * words_of(n) + task / 64] |= uint64_t{out.has(i, task)} << task % 64;
      sizes[i] += out.has(i, task);
    }
  }
  expect(out.words == expected, "packed masks");
  out.sizes.resize(count);
  launch_mask_sizes(out.words.data(), count, words_of(n), out.sizes.data(), nullptr);
  expect(out.sizes == sizes, "sizes of masks");
  return out;
}

template <typename T>
std::vector<T> gram_of(const Masks& x, const Masks& y, const Tables<T>& tables) {
  std::vector<T> gram;
  for (int64_t i = 0; i < x.count; ++i) {
    for (int64_t j = 0; j < y.count; ++j) {
      int64_t overlap = 0;
      for (int64_t task = 0; task < x.n; ++task) overlap += x.has(i, task) && y.has(j, task);
      gram.push_back(entry_of(tables, int64_t{x.sizes[i]}, int64_t{y.sizes[j]}, overlap));
    }
  }
  return gram;
}

template <typename T>
void check(int64_t m, int64_t l, int64_t n, int64_t t) {
  const std::string shape = " of m " + std::to_string(m) + ", l " + std::to_string(l) + ", n " +
                            std::to_string(n) + ", t " + std::to_string(t);
  const Masks x = random_masks(m, n), y = random_masks(l, n);
  const std::vector<T> hamming = normals<T>(n + 1), overlap = normals<T>(n + 1);
  const std::vector<T> v = normals<T>(l * t);
  for (const Tables<T>& tables :
       {Tables<T>{hamming.data(), nullptr}, Tables<T>{nullptr, overlap.data()},
        Tables<T>{hamming.data(), overlap.data()}}) {
    const std::vector<T> expected = gram_of(x, y, tables);
    const std::vector<T> gram = in_any_order("Gram matrix" + shape, [&] {
      std::vector<T> out(m * l, T(NAN));
      launch_mask_gram(x.set(), y.set(), false, n, tables, out.data(), nullptr);
      return out;
    });
    expect(gram == expected, "Gram matrix" + shape);
    const std::vector<T> symmetric = in_any_order("symmetric Gram matrix" + shape, [&] {
      std::vector<T> out(m * m, T(NAN));
      launch_mask_gram(x.set(), x.set(), true, n, tables, out.data(), nullptr);
      return out;
    });
    expect(symmetric == gram_of(x, x, tables), "symmetric Gram matrix" + shape);
    std::vector<double> sums(m * t);
    for (int64_t i = 0; i < m; ++i) {
      for (int64_t j = 0; j < l; ++j) {
        for (int64_t c = 0; c < t; ++c)
          sums[i * t + c] += double{expected[i * l + j]} * v[j * t + c];
      }
    }
    const std::vector<T> product = in_any_order("product" + shape, [&] {
      std::vector<double> partials(num_column_splits(m, l, t) * m * t, NAN);
      std::vector<T> out(m * t, T(NAN));
      launch_mask_gram_matmul(x.set(), y.set(), n, tables, v.data(), t, partials.data(), out.data(),
                              nullptr);
      return out;
    });
    expect(near(product, sums, sizeof(T) == 4 ? 1e-6 : 1e-14), "product" + shape);
  }
}

template <typename T>
std::vector<T> weighted_gram_of(const Masks& x, const Masks& y, MaskKernel kernel,
                                const std::vector<T>& weights) {
  std::vector<T> gram;
  for (int64_t i = 0; i < x.count; ++i) {
    for (int64_t j = 0; j < y.count; ++j) {
      T value = kernel == MaskKernel::kRbf;
      for (int64_t p = 0; p < nibbles_of(x.n); ++p) {
        int64_t bits = 0;
        for (int64_t q = 0; q < kNibbleBits && kNibbleBits * p + q < x.n; ++q) {
          const int64_t task = kNibbleBits * p + q;
          bits |= int64_t{x.has(i, task) != y.has(j, task)} << q;
        }
        const T term = nibble_term(kernel, weights.data(), x.n, p, bits);
        value = kernel == MaskKernel::kRbf ? value * term : value + term;
      }
      gram.push_back(kernel == MaskKernel::kRbf ? normal_or_zero(value)
                                                : exp_of_minus(std::sqrt(value)));
    }
  }
  return gram;
}

template <typename T>
void check_weighted(int64_t m, int64_t l, int64_t n, int64_t t) {
  const std::string shape = " of weights, m " + std::to_string(m) + ", l " + std::to_string(l) +
                            ", n " + std::to_string(n) + ", t " + std::to_string(t);
  const Masks x = random_masks(m, n), y = random_masks(l, n);
  std::vector<T> weights = normals<T>(n);
  for (T& weight : weights) weight = std::abs(weight) / static_cast<T>(n);
  const std::vector<T> a = normals<T>(m), b = normals<T>(l), v = normals<T>(l * t);
  for (const MaskKernel kernel : {MaskKernel::kRbf, MaskKernel::kExponential}) {
    std::vector<T> terms(nibbles_of(n) * kNibbleValues, T(NAN));
    launch_nibble_terms(kernel, weights.data(), n, terms.data(), nullptr);
    const WeightedMasks<T> masks = {x.set(), y.set(), n, kernel, terms.data()};
    const std::vector<T> expected = weighted_gram_of(x, y, kernel, weights);
    const auto gram_by = [&](const WeightedMasks<T>& of, bool symmetric, const T* left,
                             const T* right) {
      return in_any_order("Gram matrix" + shape, [&] {
        std::vector<T> out(of.x.count * of.y.count, T(NAN));
        launch_weighted_mask_gram(of, symmetric, left, right, out.data(), nullptr);
        return out;
      });
    };
    expect(gram_by(masks, false, nullptr, nullptr) == expected, "Gram matrix" + shape);
    std::vector<T> scaled = expected;
    for (int64_t i = 0; i < m; ++i) {
      for (int64_t j = 0; j < l; ++j) scaled[i * l + j] *= a[i] * b[j];
    }
    expect(gram_by(masks, false, a.data(), b.data()) == scaled, "factors" + shape);
    std::vector<T> square = weighted_gram_of(x, x, kernel, weights);
    for (int64_t i = 0; i < m; ++i) {
      for (int64_t j = 0; j < m; ++j) square[i * m + j] *= a[i] * a[j];
    }
    const WeightedMasks<T> same = {x.set(), x.set(), n, kernel, terms.data()};
    expect(gram_by(same, true, a.data(), a.data()) == square, "symmetric Gram matrix" + shape);
    std::vector<double> sums(m * t);
    for (int64_t i = 0; i < m; ++i) {
      for (int64_t j = 0; j < l; ++j) {
        for (int64_t c = 0; c < t; ++c)
          sums[i * t + c] += double{expected[i * l + j]} * v[j * t + c];
      }
    }
    const std::vector<T> product = in_any_order("product" + shape, [&] {
      std::vector<double> partials(num_column_splits(m, l, t) * m * t, NAN);
      std::vector<T> out(m * t, T(NAN));
      launch_weighted_mask_gram_matmul(masks, v.data(), t, partials.data(), out.data(), nullptr);
      return out;
    });
    expect(near(product, sums, sizeof(T) == 4 ? 1e-6 : 1e-14), "product" + shape);
  }
}

}  // namespace

int main() {
  check<float>(1, 1, 1, 1);
  check<double>(3, 130, 64, 16);
  check<float>(129, 70, 65, 17);
  check<double>(70, 257, 300, 3);
  check<float>(40, 1100, 90, 5);  // the columns are split
  check<double>(9, 11, 6000, 2);  // tables that do not fit shared memory
  check<float>(260, 300, 90, 3);  // tiles that lie inside, and their mirror images
  check<float>(259, 130, 130, 2);
  check<double>(258, 256, 300, 2);
  check<double>(257, 129, 130, 2);
  check_weighted<float>(1, 1, 1, 1);
  check_weighted<double>(3, 130, 64, 16);
  check_weighted<float>(129, 70, 65, 17);
  check_weighted<double>(70, 66, 300, 3);
  check_weighted<float>(40, 1100, 20, 5);  // the columns are split
  check_weighted<double>(128, 192, 37, 2);
  return report("CUDA masks");
}
