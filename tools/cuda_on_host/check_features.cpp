// The kernels of Gram matrices, regressions and softmax against loops in float64.
#include <numeric>

#include "check.h"
#include "cuda/glm_hvp_launch.h"
#include "cuda/gram_launch.h"
#include "cuda/intrinsics.cuh"
#include "cuda/mask_gram_launch.h"
#include "cuda/softmax_hvp_launch.h"

namespace {

using namespace ksm;

template <typename T>
constexpr double kTolerance = sizeof(T) == 4 ? 2e-6 : 1e-14;

template <typename T>
void check_gram(int64_t m, int64_t l, int64_t n) {
  const std::vector<T> x = normals<T>(m * n), y = normals<T>(l * n), weights = normals<T>(m);
  std::vector<T> weighed(m * n), expected(m * n);
  for (int64_t e = 0; e < m * n; ++e) expected[e] = weights[e / n] * x[e];
  launch_weigh_rows(x.data(), weights.data(), m, n, weighed.data(), nullptr);
  expect(weighed == expected, "weighed rows");

  const int64_t count = 2, k = std::min(m, n);
  std::vector<T> matrices = normals<T>(count * k * k), symmetric = matrices;
  for (int64_t e = 0; e < count * k * k; ++e) {
    const int64_t i = e / k % k, j = e % k;
    if (j < i) symmetric[e] = symmetric[e / (k * k) * k * k + j * k + i];
  }
  launch_mirror(matrices.data(), count, k, nullptr);
  expect(matrices == symmetric, "mirrored matrices");

  const auto squares_of = [&](const std::vector<T>& rows, int64_t size) {
    std::vector<double> exact(size);
    for (int64_t e = 0; e < size * n; ++e) exact[e / n] += double{rows[e]} * rows[e];
    const std::vector<T> squares = in_any_order("squares", [&] {
      std::vector<T> out(size, T(NAN));
      launch_row_squares(rows.data(), size, n, out.data(), nullptr);
      return out;
    });
    expect(near(squares, exact, kTolerance<T>), "squares");
    return squares;
  };
  const std::vector<T> x_squares = squares_of(x, m), y_squares = squares_of(y, l);

  std::vector<double> distances(m * l), dots(m * l), squares(m * l);
  for (int64_t e = 0; e < m * l; ++e) {
    for (int64_t d = 0; d < n; ++d) {
      const double a = x[e / l * n + d], b = y[e % l * n + d];
      distances[e] += std::abs(a - b), dots[e] += a * b, squares[e] += (a - b) * (a - b);
    }
  }
  const std::vector<T> found = in_any_order("absolute distances", [&] {
    std::vector<T> out(m * l, T(NAN));
    launch_absolute_distances(x.data(), m, y.data(), l, n, false, out.data(), nullptr);
    return out;
  });
  expect(near(found, distances, kTolerance<T>), "absolute distances");
  const std::vector<T> same = in_any_order("own distances", [&] {
    std::vector<T> out(m * m, T(0));
    launch_absolute_distances(x.data(), m, x.data(), m, n, true, out.data(), nullptr);
    return out;
  });
  for (int64_t e = 0; e < m * m; ++e) {
    if (e % m < e / m) continue;
    double distance = 0;
    for (int64_t d = 0; d < n; ++d)
      distance += std::abs(double{x[e / m * n + d]} - x[e % m * n + d]);
    expect(std::abs(same[e] - distance) <= 20 * kTolerance<T> * distance, "own distances");
  }

  const double gamma = 0.3 / n, coef0 = 0.7;
  for (const KernelKind kind : {KernelKind::kLinear, KernelKind::kPolynomial, KernelKind::kRbf,
                                KernelKind::kLaplace, KernelKind::kExponential}) {
    const auto value_of = [&](int64_t e) {
      switch (kind) {
        case KernelKind::kPolynomial: return std::pow(gamma * dots[e] + coef0, 3);
        case KernelKind::kRbf: return std::exp(-gamma * squares[e]);
        case KernelKind::kLaplace: return std::exp(-gamma * distances[e]);
        case KernelKind::kExponential: return std::exp(-gamma * std::sqrt(squares[e]));
        default: return dots[e];
      }
    };
    const std::vector<double>& from = kind == KernelKind::kLaplace ? distances : dots;
    std::vector<T> values(from.begin(), from.end());
    std::vector<double> exact(m * l);
    for (int64_t e = 0; e < m * l; ++e) exact[e] = value_of(e);
    const KernelParameters kernel = {kind, gamma, coef0, 3};
    launch_kernel_values<T>(kernel, x_squares.data(), y_squares.data(), m, l, false, values.data(),
                            nullptr);
    expect(near(values, exact, 4 * kTolerance<T>), "values of kernel");

    // Of x with itself, nothing below the diagonal being known.
    std::vector<T> square = normals<T>(m * m);
    for (int64_t i = 0; i < m; ++i) {
      for (int64_t j = 0; j < m; ++j) square[i * m + j] = j < i ? T(NAN) : T(std::abs(i - j));
    }
    const std::vector<T> once = in_any_order("symmetric values", [&] {
      std::vector<T> out = square;
      launch_kernel_values<T>(kernel, x_squares.data(), x_squares.data(), m, m, true, out.data(),
                              nullptr);
      return out;
    });
    bool holds = true;
    const bool radial = kind != KernelKind::kLinear && kind != KernelKind::kPolynomial;
    for (int64_t i = 0; i < m; ++i) {
      for (int64_t j = 0; j < m; ++j) holds = holds && once[i * m + j] == once[j * m + i];
      holds = holds && (!radial || once[i * m + i] == 1);
    }
    expect(holds, "symmetric values");
  }
}

// Of tasks of 0, 1, .. samples, b in the last; of x with itself where t is 0. Columns are of very
// different sizes, and each is held to its own.
void check_tensor_gram(int64_t tasks, int64_t b, int64_t k, int64_t t, bool weighted) {
  const bool symmetric = t == 0;
  if (symmetric) t = k;
  std::vector<int64_t> offsets(tasks + 1);
  for (int64_t a = 0; a < tasks; ++a) offsets[a + 1] = offsets[a] + (a + 1 < tasks ? a : b);
  const int64_t samples = offsets[tasks];
  const auto size_of = [](int64_t column) { return std::ldexp(1.0, 17 * (column % 5) - 34); };
  const auto draw = [&](int64_t columns) {
    std::vector<float> out = normals<float>(samples * columns);
    for (int64_t e = 0; e < samples * columns; ++e) out[e] *= size_of(e % columns);
    return out;
  };
  const std::vector<float> x = draw(k), y = symmetric ? x : draw(t);
  const std::vector<float> weights = normals<float>(samples);
  std::vector<float> before(tasks * k * t);
  for (int64_t e = 0; e < tasks * k * t; ++e) before[e] = size_of(e / t % k) * size_of(e % t);

  const auto columns_of = [&](const std::vector<float>& values, const std::vector<float>* with,
                              int64_t count, std::vector<float>& scales) {
    WeightedColumns columns = {values.data(), with ? with->data() : nullptr, count, nullptr};
    std::vector<float> largest(scale_chunks(samples, count) * count, NAN);
    scales.assign(count, NAN);
    launch_column_scales(columns, samples, largest.data(), scales.data(), nullptr);
    columns.scales = scales.data();
    return columns;
  };
  std::vector<float> x_scales, y_scales;
  GramProblem problem = {};
  problem.x = columns_of(x, weighted ? &weights : nullptr, k, x_scales);
  problem.y = columns_of(y, nullptr, t, y_scales);
  problem.offsets = offsets.data(), problem.tasks = tasks, problem.symmetric = symmetric;
  problem.splits = gram_splits(tasks, samples, k, t);
  for (const bool accumulate : {false, true}) {
    problem.accumulate = accumulate;
    const std::vector<float> found = in_any_order("tensor Gram matrix", [&] {
      std::vector<float> partials((problem.splits - 1) * tasks * k * t, NAN), out = before;
      launch_tensor_gram(problem, partials.data(), out.data(), nullptr);
      if (symmetric) launch_mirror(out.data(), tasks, k, nullptr);
      return out;
    });
    std::vector<double> exact(tasks * k * t), scaled(tasks * k * t);
    for (int64_t e = 0; e < tasks * k * t; ++e) {
      const int64_t a = e / (k * t), i = e / t % k, j = e % t;
      exact[e] = accumulate ? before[e] : 0.0;
      for (int64_t s = offsets[a]; s < offsets[a + 1]; ++s) {
        exact[e] += (weighted ? double{weights[s]} : 1.0) * x[s * k + i] * y[s * t + j];
      }
      const double size = size_of(i) * size_of(j);
      exact[e] /= size, scaled[e] = found[e] / size;
    }
    expect(near(scaled, exact, 4e-7), "tensor Gram matrix of k " + std::to_string(k) + ", t " +
                                          std::to_string(t) + ", splits " +
                                          std::to_string(problem.splits));
  }
}

// Products of rows of very different sizes, each held to its own.
void check_row_products(int64_t m, int64_t l, int64_t n, bool symmetric) {
  const auto size_of = [](int64_t row) { return std::ldexp(1.0, 17 * (row % 5) - 34); };
  const auto draw = [&](int64_t rows) {
    std::vector<float> out = normals<float>(rows * n);
    for (int64_t e = 0; e < rows * n; ++e) out[e] *= size_of(e / n);
    return out;
  };
  if (symmetric) l = m;
  const std::vector<float> x = draw(m), y = symmetric ? x : draw(l);
  std::vector<float> x_scales(m, NAN), y_scales(l, NAN);
  launch_row_scales(x.data(), m, n, x_scales.data(), nullptr);
  launch_row_scales(y.data(), l, n, y_scales.data(), nullptr);
  const std::vector<float> found = in_any_order("products of rows", [&] {
    std::vector<float> out(m * l, 0.0f);
    launch_row_products({x.data(), m, x_scales.data()}, {y.data(), l, y_scales.data()}, n,
                        symmetric, out.data(), nullptr);
    return out;
  });
  std::vector<double> exact(m * l), scaled(m * l);
  for (int64_t e = 0; e < m * l; ++e) {
    if (symmetric && e % l < e / l) continue;
    for (int64_t d = 0; d < n; ++d) exact[e] += double{x[e / l * n + d]} * y[e % l * n + d];
    const double size = size_of(e / l) * size_of(e % l);
    exact[e] /= size, scaled[e] = found[e] / size;
  }
  expect(near(scaled, exact, 4e-7), "products of rows of n " + std::to_string(n));
}

// Regressions of m subsets of n tasks on b samples, in blocks of samples and of subsets.
template <typename T, typename C>
void check_regressions(int64_t m, int64_t n, int64_t b, int64_t k) {
  std::vector<uint8_t> masks(m * n);
  for (uint8_t& task : masks) task = random_bits() % 2;
  std::vector<uint64_t> packed(m * words_of(n));
  launch_pack_masks(masks.data(), m, n, packed.data(), nullptr);
  std::vector<int32_t> task_of(b), found_tasks(b, -1);
  for (int32_t& task : task_of) task = random_bits() % (n - 1);  // the last is empty
  std::sort(task_of.begin(), task_of.end());
  std::vector<int64_t> offsets(n + 1, b), rows(m - 1), sizes(m);
  for (int64_t a = 0; a < n; ++a) {
    offsets[a] = std::lower_bound(task_of.begin(), task_of.end(), a) - task_of.begin();
  }
  launch_tasks_of_samples(offsets.data(), n, b, found_tasks.data(), nullptr);
  expect(found_tasks == task_of, "tasks of samples");
  for (int64_t e = 0; e < m * b; ++e) sizes[e / b] += masks[e / b * n + task_of[e % b]];
  std::iota(rows.begin(), rows.end(), 1);
  std::shuffle(rows.begin(), rows.end(), random_bits);
  const int64_t begin = b / 3, end = b, samples = end - begin, count = m - 1;
  const std::vector<T> h = normals<T>(b), margins = normals<T>(count * samples);
  std::vector<C> curvature(m * b);
  for (int64_t e = 0; e < m * b; ++e) {
    curvature[e] = Stored<C>::of(0.25 * static_cast<double>(random_bits() % 100) / 100);
  }
  const SubsetSamples sets = {packed.data(), offsets.data(), task_of.data(), b, n};
  const auto block_of = [&](std::vector<T>& products) {
    return ProductBlock<T>{products.data(), rows.data(), count, begin, end, sets};
  };
  const auto inside = [&](int64_t e) {
    return masks[rows[e / samples] * n + task_of[begin + e % samples]] != 0;
  };
  const auto at = [&](int64_t e) { return rows[e / samples] * b + begin + e % samples; };

  for (const C* given : {static_cast<const C*>(curvature.data()), static_cast<const C*>(nullptr)}) {
    std::vector<T> products = margins, expected(count * samples);
    for (int64_t e = 0; e < count * samples; ++e) {
      if (inside(e))
        expected[e] = margins[e] * (given ? static_cast<T>(widened(given[at(e)])) : T(1));
    }
    launch_weigh_products(block_of(products), given, nullptr);
    expect(products == expected, "weighed products");

    ProductBlock<T> all = block_of(products = margins);  // of the subsets 0, 1, ..
    all.rows = nullptr;
    for (int64_t e = 0; e < count * samples; ++e) {
      const int64_t subset = e / samples, i = begin + e % samples;
      const T weight = given ? static_cast<T>(widened(given[subset * b + i])) : T(1);
      expected[e] = masks[subset * n + task_of[i]] ? margins[e] * weight : T(0);
    }
    launch_weigh_products(all, given, nullptr);
    expect(products == expected, "weighed products of all");
  }

  const std::vector<double> losses_before = normals<double>(m);
  std::vector<double> slopes(count * samples), losses = losses_before;
  std::vector<float> curvatures(m * b);
  for (int64_t e = 0; e < m * b; ++e) curvatures[e] = widened(curvature[e]);
  for (int64_t e = 0; e < count * samples; ++e) {
    if (!inside(e)) continue;
    const double z = static_cast<double>(h[begin + e % samples]) + margins[e];
    slopes[e] = -1 / (1 + std::exp(z));
    losses[rows[e / samples]] += std::log1p(std::exp(-z));
    curvatures[at(e)] = -slopes[e] * (1 + slopes[e]);
  }
  std::vector<C> written;
  std::vector<double> objective;
  const std::vector<T> found = in_any_order("slopes", [&] {
    std::vector<T> products = margins;
    written = curvature, objective = losses_before;
    launch_logistic_products(block_of(products), h.data(), written.data(), objective.data(),
                             nullptr);
    return products;
  });
  std::vector<float> stored(m * b);
  for (int64_t e = 0; e < m * b; ++e) stored[e] = widened(written[e]);
  expect(near(found, slopes, kTolerance<T>), "slopes");
  expect(near(objective, losses, kTolerance<T>), "losses");
  expect(near(stored, curvatures, sizeof(C) == 2 ? 4e-3 : 1e-6), "curvatures");

  const std::vector<T> v = normals<T>(m * k), sums = normals<T>(m * k), ridge(m, T(0.3));
  std::vector<double> exact(m * k), objectives(m);
  for (int64_t e = 0; e < m * k; ++e) {
    const double divisor = std::max<int64_t>(1, sizes[e / k]);
    exact[e] = sums[e] / divisor + double{ridge[e / k]} * v[e];
    if (e % k == 0) objectives[e / k] += losses_before[e / k] / divisor;
    objectives[e / k] += 0.5 * ridge[e / k] * v[e] * v[e];
  }
  for (const bool with_objective : {true, false}) {
    objective = losses_before;
    const std::vector<T> finished = in_any_order("finished subsets", [&] {
      std::vector<T> out = sums;
      objective = losses_before;
      launch_finish_subsets(sets, ridge.data(), v.data(), m, k, out.data(),
                            with_objective ? objective.data() : nullptr, nullptr);
      return out;
    });
    expect(near(finished, exact, kTolerance<T>), "finished subsets");
    expect(!with_objective || near(objective, objectives, kTolerance<T>), "objectives");
  }

  std::vector<T> gathered(count * k), added = sums, expected_rows(count * k), expected_sums = sums;
  for (int64_t e = 0; e < count * k; ++e) expected_rows[e] = v[rows[e / k] * k + e % k];
  for (int64_t e = 0; e < count * k; ++e) {
    expected_sums[rows[e / k] * k + e % k] += expected_rows[e];
  }
  launch_gather_rows(v.data(), rows.data(), count, k, gathered.data(), nullptr);
  launch_add_rows(gathered.data(), rows.data(), count, k, added.data(), nullptr);
  expect(gathered == expected_rows && added == expected_sums, "gathered and added rows");
}

// Only the row and the column of what is not finite are spoilt; columns of zeros and of the largest
// and the least numbers are not.
void check_extreme_columns() {
  const int64_t b = 40, k = 6;
  std::vector<float> x = normals<float>(b * k);
  for (int64_t s = 0; s < b; ++s) {
    x[s * k + 1] = 0, x[s * k + 2] *= 1e-37f, x[s * k + 3] *= 1e37f, x[s * k + 4] = 1e-45f;
  }
  x[7 * k] = INFINITY, x[9 * k] = NAN;
  const std::vector<int64_t> offsets = {0, b};
  std::vector<float> largest(scale_chunks(b, k) * k, NAN), scales(k, NAN), out(k * k, NAN);
  WeightedColumns columns = {x.data(), nullptr, k, scales.data()};
  launch_column_scales(columns, b, largest.data(), scales.data(), nullptr);
  const GramProblem problem = {columns, columns, offsets.data(), 1, true, false, 1};
  launch_tensor_gram(problem, nullptr, out.data(), nullptr);
  for (int64_t i = 0; i < k; ++i) {
    for (int64_t j = i; j < k; ++j) {
      double exact = 0;
      for (int64_t s = 0; s < b; ++s) exact += double{x[s * k + i]} * x[s * k + j];
      const float found = out[i * k + j];
      const bool holds = std::isfinite(exact) && std::abs(exact) < 3e38
                             ? std::abs(found - exact) <= 1e-5 * std::abs(exact) + 1e-44
                             : !std::isfinite(found);
      expect(holds, "extreme columns " + std::to_string(i) + ", " + std::to_string(j));
    }
  }
}

void check_writing() {
  std::vector<uint8_t> from(9001), to(9001);
  for (uint8_t& octet : from) octet = random_bits();
  launch_write(from.data(), from.size(), to.data(), nullptr);
  expect(from == to, "what the host wrote");
}

template <typename T>
void check_softmax(int64_t s, int64_t b, int64_t c, bool weighted) {
  std::vector<T> logits = normals<T>(b * c);
  for (T& logit : logits) logit *= 20;  // nearly one-hot rows too
  const std::vector<T> tangents = normals<T>(s * b * c), weights = normals<T>(b);
  std::vector<double> exact(s * b * c);
  for (int64_t row = 0; row < s * b; ++row) {
    const T* z = logits.data() + row % b * c;
    const T* u = tangents.data() + row * c;
    const double top = *std::max_element(z, z + c);
    double total = 0, mean = 0;
    for (int64_t j = 0; j < c; ++j) total += std::exp(z[j] - top);
    for (int64_t j = 0; j < c; ++j) mean += std::exp(z[j] - top) / total * u[j];
    for (int64_t j = 0; j < c; ++j) {
      exact[row * c + j] =
          (weighted ? weights[row % b] : 1.0) * std::exp(z[j] - top) / total * (u[j] - mean);
    }
  }
  const std::vector<T> found = in_any_order("softmax", [&] {
    std::vector<T> out(s * b * c, T(NAN));
    launch_softmax_hvp(logits.data(), tangents.data(), weighted ? weights.data() : nullptr, s, b, c,
                       out.data(), nullptr);
    return out;
  });
  // Of exponents up to 60; where a row is nearly one-hot, differences of order one cancel.
  std::vector<T> beside_one = found;
  beside_one.push_back(T(1)), exact.push_back(1);
  expect(near(beside_one, exact, 3 * kTolerance<T>), "softmax");
  std::vector<T> in_place = tangents;
  launch_softmax_hvp(logits.data(), in_place.data(), weighted ? weights.data() : nullptr, s, b, c,
                     in_place.data(), nullptr);
  expect(in_place == found, "softmax in place");
}

}  // namespace

// Tensor cores may lose what is far below the largest addend, and cut instead of rounding.
void check_cut_sums() {
  double addends[17] = {1, std::ldexp(1.0, -25), std::ldexp(1.0, -25)};
  expect(cut_sum(addends) == 1, "addends that are cut");
  addends[1] = addends[2] = std::ldexp(3.0, -25);
  expect(cut_sum(addends) == 1 + std::ldexp(1.0f, -23), "addends of 24 bits");
  addends[1] = addends[2] = -std::ldexp(1.0, -25);
  expect(cut_sum(addends) == 1, "negative addends that are cut");
  addends[2] = std::ldexp(-1.0, -24);
  expect(cut_sum(addends) == std::nextafter(1.0f, 0.0f), "a sum that is cut");
}

int main() {
  check_cut_sums();
  check_gram<float>(1, 1, 1);
  check_gram<float>(35, 20, 300);
  check_gram<double>(18, 47, 33);
  check_gram<float>(150, 70, 137);  // several tiles
  check_regressions<float, BFloat16>(7, 5, 700, 9);
  check_regressions<float, float>(4, 3, 31, 600);
  check_regressions<double, double>(9, 70, 3300, 40);
  check_tensor_gram(1, 1, 1, 0, false);
  check_tensor_gram(1, 2100, 150, 0, false);  // split
  check_tensor_gram(4, 70, 9, 0, true);
  check_tensor_gram(3, 45, 130, 260, true);
  check_tensor_gram(2, 5000, 5, 7, false);
  check_extreme_columns();
  check_row_products(1, 3, 1, false);
  check_row_products(150, 70, 133, false);
  check_row_products(20, 140, 264, false);  // groups of four are aligned
  check_row_products(300, 0, 40, true);
  check_writing();
  check_softmax<float>(1, 1, 1, false);
  check_softmax<float>(11, 3, 700, true);
  check_softmax<double>(9, 2, 65, false);
  check_softmax<float>(2, 2, 9001, true);
  on_host::most_shared = 48 * 1024;  // too little for a row
  check_softmax<float>(3, 2, 12500, false);
  return report("CUDA Gram matrices, regressions and softmax");
}
