// Gram matrices of real features on CUDA: cuBLAS and the kernels of gram.cu on the current stream.
#include <type_traits>
#include <vector>

#include "cuda/bind.h"
#include "cuda/gram_launch.h"
#include "gram.h"

namespace ksm {
namespace {

// Symmetric products are computed in strips of rows from the diagonal on, wide enough for cuBLAS.
constexpr int64_t kRowsPerStrip = 1024;
constexpr int64_t kSamplesPerBlock = 16384;  // whose weighted copy exists at a time

// out = X[begin:end]^T diag(w) Y[begin:end] + beta out in float64. If Y is X, only what lies on and
// above the diagonal of out is right.
class WeightedProduct {
 public:
  WeightedProduct(const Tensor& x, const Tensor& y, const std::optional<Tensor>& weights,
                  bool symmetric)
      : gemm_(x),
        stream_(current_stream(x)),
        weighed_(torch::stable::new_empty(
            x, {weights ? std::min(kSamplesPerBlock, x.size(0)) : 0, x.size(1)})),
        x_(x.const_data_ptr<double>()),
        y_(y.const_data_ptr<double>()),
        weights_(weights ? weights->const_data_ptr<double>() : nullptr),
        k_(x.size(1)),
        t_(y.size(1)),
        symmetric_(symmetric) {}

  void compute(int64_t begin, int64_t end, double beta, double* out) {  // (k, t)
    const int64_t block = weights_ ? kSamplesPerBlock : std::max<int64_t>(1, end - begin);
    for (int64_t s = begin; s < end; s += block) {
      const int64_t samples = std::min(block, end - s);
      const double* left = x_ + s * k_;
      if (weights_) {
        double* weighed = weighed_.mutable_data_ptr<double>();
        STD_CUDA_CHECK(launch_weigh_rows(left, weights_ + s, samples, k_, weighed, stream_));
        left = weighed;
      }
      const int64_t strip = symmetric_ ? kRowsPerStrip : k_;
      for (int64_t i = 0; i < k_; i += strip) {
        const int64_t rows = std::min(strip, k_ - i), column = symmetric_ ? i : 0;
        const Matrix<const double> a = {left + i, samples, rows, k_};
        const Matrix<const double> b = {y_ + s * t_ + column, samples, t_ - column, t_};
        const Matrix<double> c = {out + i * t_ + column, rows, t_ - column, t_};
        gemm_(a.transposed(), b, s > begin ? 1.0 : beta, c);
      }
    }
  }

 private:
  const Gemm gemm_;
  const cudaStream_t stream_;
  Tensor weighed_;  // (samples of a block, k)
  const double *const x_, *const y_, *const weights_;
  const int64_t k_, t_;
  const bool symmetric_;
};

// The same in float32, of every task at once: on the tensor cores.
class TensorGram {
 public:
  TensorGram(const Tensor& x, const Tensor& y, const std::optional<Tensor>& weights,
             const std::vector<int64_t>& offsets, bool symmetric)
      : x_(x), stream_(current_stream(x)) {
    const int64_t b = x.size(0), k = x.size(1), t = y.size(1);
    problem_.tasks = static_cast<int64_t>(offsets.size()) - 1;
    problem_.symmetric = symmetric;
    problem_.splits = gram_splits(problem_.tasks, b, k, t);
    offsets_ = torch::stable::new_empty(x, {problem_.tasks + 1}, ScalarType::Long);
    STD_CUDA_CHECK(launch_write(offsets.data(), (problem_.tasks + 1) * sizeof(int64_t),
                                offsets_.mutable_data_ptr<int64_t>(), stream_));
    problem_.offsets = offsets_.const_data_ptr<int64_t>();
    const float* w = weights ? weights->const_data_ptr<float>() : nullptr;
    problem_.x = scaled({x.const_data_ptr<float>(), w, k, nullptr}, x_scales_);
    problem_.y = symmetric && !w
                     ? problem_.x
                     : scaled({y.const_data_ptr<float>(), nullptr, t, nullptr}, y_scales_);
  }

  void compute(bool accumulate, float* out) {  // (tasks, k, t)
    problem_.accumulate = accumulate;
    Tensor partials = torch::stable::new_empty(
        x_, {problem_.splits - 1, problem_.tasks, problem_.x.columns, problem_.y.columns});
    STD_CUDA_CHECK(launch_tensor_gram(problem_, partials.mutable_data_ptr<float>(), out, stream_));
  }

 private:
  WeightedColumns scaled(WeightedColumns columns, Tensor& scales) const {
    const int64_t samples = x_.size(0), count = columns.columns;
    Tensor largest = torch::stable::new_empty(x_, {scale_chunks(samples, count), count});
    scales = torch::stable::new_empty(x_, {count});
    STD_CUDA_CHECK(launch_column_scales(columns, samples, largest.mutable_data_ptr<float>(),
                                        scales.mutable_data_ptr<float>(), stream_));
    columns.scales = scales.const_data_ptr<float>();
    return columns;
  }

  const Tensor& x_;
  const cudaStream_t stream_;
  GramProblem problem_ = {};
  Tensor offsets_, x_scales_, y_scales_;
};

void gram_update_cuda(const Tensor& gram, const Tensor& features,
                      const std::optional<Tensor>& weights) {
  check_gram_update(gram, features, weights);
  const DeviceGuard guard(features.get_device_index());
  const int64_t b = features.size(0), k = features.size(1);
  if (b == 0 || k == 0) return;
  for_dtype(features.scalar_type(), [&](auto type) {
    using T = decltype(type);
    T* out = gram.mutable_data_ptr<T>();
    if constexpr (std::is_same_v<T, float>) {
      TensorGram(features, features, weights, {0, b}, true).compute(true, out);
    } else {
      WeightedProduct(features, features, weights, true).compute(0, b, 1.0, out);
    }
    STD_CUDA_CHECK(launch_mirror(out, 1, k, current_stream(features)));
  });
}

Tensor task_gram_cuda(const Tensor& features, const Tensor& task_offsets,
                      const std::optional<Tensor>& other, const std::optional<Tensor>& weights) {
  check_task_gram(features, task_offsets, other, weights);
  const DeviceGuard guard(features.get_device_index());
  const int64_t k = features.size(1), n = task_offsets.size(0) - 1;
  const int64_t t = other ? other->size(1) : k;
  Tensor out = torch::stable::new_empty(features, {n, k, t});
  if (n == 0 || k == 0 || t == 0) return out;
  torch::stable::zero_(out);  // tasks without samples
  const int64_t* offsets = task_offsets.const_data_ptr<int64_t>();
  for_dtype(features.scalar_type(), [&](auto type) {
    using T = decltype(type);
    T* grams = out.mutable_data_ptr<T>();
    const Tensor& right = other ? *other : features;
    if constexpr (std::is_same_v<T, float>) {
      TensorGram(features, right, weights, {offsets, offsets + n + 1}, !other)
          .compute(false, grams);
    } else {
      WeightedProduct product(features, right, weights, !other);
      for (int64_t a = 0; a < n; ++a) {
        product.compute(offsets[a], offsets[a + 1], 0.0, grams + a * k * t);
      }
    }
    if (!other) STD_CUDA_CHECK(launch_mirror(grams, n, k, current_stream(features)));
  });
  return out;
}

// out[i, j] = x_i . y_j; symmetric: only what lies on and above the diagonal will be right.
template <typename T>
void products_of_rows(const Tensor& x, const Tensor& y, bool symmetric, T* out) {
  const int64_t m = x.size(0), n = x.size(1), l = y.size(0);
  const T *rows = x.const_data_ptr<T>(), *columns = y.const_data_ptr<T>();
  if constexpr (std::is_same_v<T, float>) {
    if (n > 0 && row_products_fill(m, l)) {
      const cudaStream_t stream = current_stream(x);
      Tensor x_scales = torch::stable::new_empty(x, {m});
      Tensor y_scales = symmetric ? x_scales : torch::stable::new_empty(x, {l});
      const auto scaled = [&](const float* values, int64_t count, Tensor& scales) {
        float* found = scales.mutable_data_ptr<float>();
        STD_CUDA_CHECK(launch_row_scales(values, count, n, found, stream));
        return ScaledRows{values, count, found};
      };
      const ScaledRows left = scaled(rows, m, x_scales);
      const ScaledRows other = symmetric ? left : scaled(columns, l, y_scales);
      STD_CUDA_CHECK(launch_row_products(left, other, n, symmetric, out, stream));
      return;
    }
  }
  const Gemm gemm(x);
  const int64_t strip = symmetric ? kRowsPerStrip : m;
  for (int64_t i = 0; i < m; i += strip) {
    const int64_t count = std::min(strip, m - i), first = symmetric ? i : 0;
    const Matrix<const T> a = {rows + i * n, count, n, n};
    const Matrix<const T> b = {columns + first * n, l - first, n, n};
    gemm(a, b.transposed(), 0.0, Matrix<T>{out + i * l + first, count, l - first, l});
  }
}

Tensor kernel_gram_cuda(const Tensor& x, const std::optional<Tensor>& y, int64_t kind, double gamma,
                        double coef0, int64_t degree) {
  const KernelParameters kernel = checked_kernel(x, y, kind, gamma, coef0, degree);
  const DeviceGuard guard(x.get_device_index());
  const Tensor& right = y ? *y : x;
  const int64_t m = x.size(0), n = x.size(1), l = right.size(0);
  Tensor out = torch::stable::new_empty(x, {m, l});
  if (m == 0 || l == 0) return out;
  const cudaStream_t stream = current_stream(x);
  const bool euclidean = kernel.kind == KernelKind::kRbf || kernel.kind == KernelKind::kExponential;
  Tensor x_squares = torch::stable::new_empty(x, {euclidean ? m : 0});
  Tensor y_squares = torch::stable::new_empty(x, {euclidean && y ? l : 0});
  for_dtype(x.scalar_type(), [&](auto type) {
    using T = decltype(type);
    const T *rows = x.const_data_ptr<T>(), *columns = right.const_data_ptr<T>();
    T* values = out.mutable_data_ptr<T>();
    if (kernel.kind == KernelKind::kLaplace) {
      STD_CUDA_CHECK(launch_absolute_distances(rows, m, columns, l, n, !y, values, stream));
    } else {
      products_of_rows(x, right, !y, values);
    }
    T* row_squares = euclidean ? x_squares.mutable_data_ptr<T>() : nullptr;
    T* column_squares = euclidean && y ? y_squares.mutable_data_ptr<T>() : row_squares;
    if (euclidean) STD_CUDA_CHECK(launch_row_squares(rows, m, n, row_squares, stream));
    if (euclidean && y) STD_CUDA_CHECK(launch_row_squares(columns, l, n, column_squares, stream));
    STD_CUDA_CHECK(
        launch_kernel_values<T>(kernel, row_squares, column_squares, m, l, !y, values, stream));
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ksm_ext, CUDA, m) {
  m.impl("gram_update", TORCH_BOX(&gram_update_cuda));
  m.impl("task_gram", TORCH_BOX(&task_gram_cuda));
  m.impl("kernel_gram", TORCH_BOX(&kernel_gram_cuda));
}

}  // namespace ksm
