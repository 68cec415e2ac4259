// Gram matrices of real features on the CPU.
//
// Threads own strips of rows of the result, and a GEMM inside a thread runs on that thread. Nothing
// depends on the number of threads. Of a symmetric matrix a long strip goes with a short one, so that
// the threads get equal work.
#include "gram.h"

#include <torch/csrc/stable/library.h>

#include <memory>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/large_output.h"

namespace ksm {
namespace {

// Two items at least, of which the second may do nothing: a lone item too then runs in a parallel
// region, where GEMM keeps to one thread.
template <typename Body>
void parallel_items(int64_t items, const Body& body) {
  torch::stable::parallel_for(0, std::max<int64_t>(2, items), 1, [&](int64_t begin, int64_t end) {
    body(begin, std::min(end, items));
  });
}

// The strips of one symmetric matrix in pairs: pair p holds the strips p and strips - 1 - p.
struct StripPairs {
  int64_t k, per_strip, strips;

  StripPairs(int64_t k, int64_t per_strip)
      : k(k), per_strip(per_strip), strips((k + per_strip - 1) / per_strip) {}

  int64_t count() const { return (strips + 1) / 2; }

  // body(first row, rows) for the strips of a pair.
  template <typename Body>
  void for_each(int64_t pair, const Body& body) const {
    const auto visit = [&](int64_t strip) {
      body(strip * per_strip, std::min(per_strip, k - strip * per_strip));
    };
    visit(pair);
    if (strips - 1 - pair != pair) visit(strips - 1 - pair);
  }
};

// matrix[j, i] = matrix[i, j] for a strip's rows i and all j beyond them, in squares that fit the
// L1 cache.
template <typename T>
void mirror_strip(T* matrix, int64_t k, int64_t first, int64_t rows) {
  constexpr int64_t kSquare = 16;
  for (int64_t j0 = first; j0 < k; j0 += kSquare) {
    const int64_t j1 = std::min(j0 + kSquare, k);
    for (int64_t i0 = first; i0 < first + rows; i0 += kSquare) {
      const int64_t i1 = std::min(i0 + kSquare, first + rows);
      for (int64_t j = std::max(j0, i0); j < j1; ++j) {
        for (int64_t i = i0; i < std::min(i1, j); ++i) matrix[j * k + i] = matrix[i * k + j];
      }
    }
  }
}

// Rows of X_i^T diag(w) Y, a block of samples at a time where there are weights.
template <typename T>
class WeightedProduct {
 public:
  WeightedProduct(const Tensor& like, const T* x, int64_t k, const T* y, int64_t t,
                  const T* weights)
      : gemm_(like), x_(x), y_(y), weights_(weights), k_(k), t_(t) {}

  // out = X[begin:end, first:first + rows]^T diag(w) Y[begin:end, column:] + beta out, with out at
  // its row `first` and column `column` of t columns.
  void compute(int64_t begin, int64_t end, int64_t first, int64_t rows, int64_t column, double beta,
               T* out) {
    const Matrix<T> target = {out, rows, t_ - column, t_};
    if (begin == end) {
      if (beta == 0) {
        for (int64_t r = 0; r < rows; ++r) std::fill_n(out + r * t_, t_ - column, T(0));
      }
      return;
    }
    const int64_t block = weights_ ? kSamplesPerBlock : end - begin;
    for (int64_t s = begin; s < end; s += block) {
      const int64_t samples = std::min(block, end - s);
      const Matrix<const T> left = {x_ + s * k_ + first, samples, rows, k_};
      const Matrix<const T> right = {y_ + s * t_ + column, samples, t_ - column, t_};
      const Matrix<const T> weighed = weights_ ? weigh(left, weights_ + s) : left;
      gemm_(weighed.transposed(), right, s > begin ? 1.0 : beta, target);
    }
  }

 private:
  static constexpr int64_t kSamplesPerBlock = 1024;

  Matrix<const T> weigh(const Matrix<const T>& left, const T* weights) {
    const int64_t columns = left.columns;
    if (static_cast<int64_t>(weighed_.size()) < left.rows * columns) {
      weighed_.resize(left.rows * columns);
    }
    for (int64_t s = 0; s < left.rows; ++s) {
      const T* row = left.data + s * left.row_stride;
      for (int64_t c = 0; c < columns; ++c) weighed_[s * columns + c] = weights[s] * row[c];
    }
    return {weighed_.data(), left.rows, columns, columns};
  }

  const Gemm gemm_;
  const T *const x_, *const y_, *const weights_;
  const int64_t k_, t_;
  std::vector<T> weighed_;  // (samples, rows) of the left factor
};

void gram_update_cpu(const Tensor& gram, const Tensor& features,
                     const std::optional<Tensor>& weights) {
  check_gram_update(gram, features, weights);
  const int64_t b = features.size(0), k = features.size(1);
  const StripPairs pairs(k, rows_per_strip(k));
  for_dtype(features.scalar_type(), [&](auto type) {
    using T = decltype(type);
    const T* x = features.const_data_ptr<T>();
    T* out = gram.mutable_data_ptr<T>();
    parallel_items(pairs.count(), [&](int64_t begin, int64_t end) {
      WeightedProduct<T> product(features, x, k, x, k, pointer_of<T>(weights));
      for (int64_t pair = begin; pair < end; ++pair) {
        pairs.for_each(pair, [&](int64_t first, int64_t rows) {
          product.compute(0, b, first, rows, first, 1.0, out + first * k + first);
          mirror_strip(out, k, first, rows);
        });
      }
    });
  });
}

Tensor task_gram_cpu(const Tensor& features, const Tensor& task_offsets,
                     const std::optional<Tensor>& other, const std::optional<Tensor>& weights) {
  check_task_gram(features, task_offsets, other, weights);
  const int64_t k = features.size(1), n = task_offsets.size(0) - 1;
  const int64_t t = other ? other->size(1) : k;
  Tensor out = torch::stable::new_empty(features, {n, k, t});
  if (n == 0 || k == 0 || t == 0) return out;
  const int64_t* offsets = task_offsets.const_data_ptr<int64_t>();
  constexpr int64_t kWhole = 128;  // up to here a GEMM of half the columns is hardly faster
  const StripPairs pairs(k, k <= kWhole ? kWhole : rows_per_strip(k));
  for_dtype(features.scalar_type(), [&](auto type) {
    using T = decltype(type);
    const T* x = features.const_data_ptr<T>();
    const T* y = other ? other->const_data_ptr<T>() : x;
    T* grams = out.mutable_data_ptr<T>();
    request_huge_pages(grams, n * k * t * sizeof(T));
    const int64_t items_per_task = other ? 1 : pairs.count();
    parallel_items(n * items_per_task, [&](int64_t begin, int64_t end) {
      WeightedProduct<T> product(features, x, k, y, t, pointer_of<T>(weights));
      for (int64_t item = begin; item < end; ++item) {
        const int64_t a = item / items_per_task;
        T* gram = grams + a * k * t;
        if (other) {
          product.compute(offsets[a], offsets[a + 1], 0, k, 0, 0.0, gram);
          continue;
        }
        pairs.for_each(item % items_per_task, [&](int64_t first, int64_t rows) {
          product.compute(offsets[a], offsets[a + 1], first, rows, first, 0.0,
                          gram + first * k + first);
          mirror_strip(gram, k, first, rows);
        });
      }
    });
  });
  return out;
}

// Squared norms of the rows, added up in float64.
template <typename T>
std::vector<T> squares_of(const T* x, int64_t m, int64_t n) {
  std::vector<T> squares(m);
  for (int64_t i = 0; i < m; ++i) {
    double sum = 0;
    for (int64_t d = 0; d < n; ++d) {
      sum += static_cast<double>(x[i * n + d]) * static_cast<double>(x[i * n + d]);
    }
    squares[i] = static_cast<T>(sum);
  }
  return squares;
}

// Blocks of kernel values that are still in the L2 cache after their GEMM.
constexpr int64_t kGemmRows = 128, kGemmColumns = 1024;

template <typename T>
class KernelBlocks {
 public:
  KernelBlocks(const Tensor& like, KernelParameters kernel, const T* x, int64_t m,
               const std::optional<Tensor>& y, int64_t l, int64_t n, T* out)
      : gemm_(like),
        kernel_(kernel),
        x_(x),
        y_(y ? y->const_data_ptr<T>() : x),
        out_(out),
        l_(l),
        n_(n),
        same_(!y) {
    if (kernel.kind == KernelKind::kRbf || kernel.kind == KernelKind::kExponential) {
      x_squares_ = squares_of(x, m, n);
      y_squares_ = same_ ? x_squares_ : squares_of(y_, l, n);
    }
  }

  // Rows [i, i + rows) from column `from` on. `transposed` is scratch of n * kGemmColumns.
  void fill(int64_t i, int64_t rows, int64_t from, T* transposed) const {
    for (int64_t j = from; j < l_; j += kGemmColumns) {
      const int64_t columns = std::min(kGemmColumns, l_ - j);
      if (kernel_.kind == KernelKind::kLaplace) {
        fill_distances(i, rows, j, columns, transposed);
      } else {
        const Matrix<T> values = {out_ + i * l_ + j, rows, columns, l_};
        const Matrix<const T> x = {x_ + i * n_, rows, n_, n_}, y = {y_ + j * n_, columns, n_, n_};
        gemm_(x, y.transposed(), 0.0, values);
      }
      for (int64_t r = i; r < i + rows; ++r) {
        kernels_.kernel_values(kernel_, x_squares_.empty() ? T(0) : x_squares_[r],
                               y_squares_.data() + (y_squares_.empty() ? 0 : j), columns,
                               out_ + r * l_ + j);
      }
    }
    const bool radial =
        kernel_.kind != KernelKind::kLinear && kernel_.kind != KernelKind::kPolynomial;
    if (!same_ || !radial) return;
    for (int64_t r = i; r < i + rows; ++r) {
      const T value = out_[r * l_ + r];
      // A row is at distance zero from itself, exactly; NaN stays.
      if (value == value) out_[r * l_ + r] = T(1);
    }
  }

 private:
  void fill_distances(int64_t i, int64_t rows, int64_t j, int64_t columns, T* transposed) const {
    for (int64_t c = 0; c < columns; ++c) {
      for (int64_t d = 0; d < n_; ++d) transposed[d * columns + c] = y_[(j + c) * n_ + d];
    }
    for (int64_t r = i; r < i + rows; ++r) {
      kernels_.absolute_distances(x_ + r * n_, transposed, n_, columns, out_ + r * l_ + j);
    }
  }

  const Gemm gemm_;
  const RealKernels<T>& kernels_ = cpu_kernels().of<T>();
  const KernelParameters kernel_;
  const T *const x_, *const y_;
  T* const out_;
  const int64_t l_, n_;
  const bool same_;
  std::vector<T> x_squares_, y_squares_;  // of radial kernels of Euclidean distances
};

Tensor kernel_gram_cpu(const Tensor& x, const std::optional<Tensor>& y, int64_t kind, double gamma,
                       double coef0, int64_t degree) {
  const KernelParameters kernel = checked_kernel(x, y, kind, gamma, coef0, degree);
  const int64_t m = x.size(0), n = x.size(1), l = y ? y->size(0) : m;
  Tensor out = torch::stable::new_empty(x, {m, l});
  if (m == 0 || l == 0) return out;
  for_dtype(x.scalar_type(), [&](auto type) {
    using T = decltype(type);
    const T* rows = x.const_data_ptr<T>();
    T* values = out.mutable_data_ptr<T>();
    request_huge_pages(values, m * l * sizeof(T));
    const KernelBlocks<T> blocks(x, kernel, rows, m, y, l, n, values);
    const int64_t scratch = kernel.kind == KernelKind::kLaplace ? n * kGemmColumns : 0;
    const StripPairs pairs(m, rows_per_strip(m));
    parallel_items(y ? (m + kGemmRows - 1) / kGemmRows : pairs.count(),
                   [&](int64_t begin, int64_t end) {
                     const std::unique_ptr<T[]> transposed(new T[scratch]);
                     for (int64_t item = begin; item < end; ++item) {
                       if (y) {
                         const int64_t i = item * kGemmRows;
                         blocks.fill(i, std::min(kGemmRows, m - i), 0, transposed.get());
                         continue;
                       }
                       pairs.for_each(item, [&](int64_t first, int64_t count) {
                         blocks.fill(first, count, first, transposed.get());
                         mirror_strip(values, m, first, count);
                       });
                     }
                   });
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ksm_ext, CPU, m) {
  m.impl("gram_update", TORCH_BOX(&gram_update_cpu));
  m.impl("task_gram", TORCH_BOX(&task_gram_cpu));
  m.impl("kernel_gram", TORCH_BOX(&kernel_gram_cpu));
}

}  // namespace ksm
