// Regressions on many subsets on CUDA: the walk of glm_hvp.h over all subsets at once, with cuBLAS,
// the products of rows of gram_tensor_cores.cu and the kernels of glm_hvp.cu on the current stream. The
// workspace does not grow with b.
#include <tuple>
#include <type_traits>

#include "cuda/bind.h"
#include "cuda/glm_hvp_launch.h"
#include "cuda/gram_launch.h"
#include "glm_hvp.h"
#include "packed_masks.h"

namespace ksm {
namespace {

// A task on its own fills few of the multiprocessors, and costs launches and a pass over its rows.
// Blocks of samples are of about one size, large enough to fill the GPU.
RunCosts costs_of(int64_t b) {
  constexpr int64_t kSamplesPerBlock = 8192;
  const int64_t blocks = std::max<int64_t>(1, (b + kSamplesPerBlock / 2) / kSamplesPerBlock);
  return {/*overhead=*/6000.0, /*samples_per_block=*/(b + blocks - 1) / blocks, /*whole=*/0.95};
}

struct CudaBackend {
  Gemm gemm;
  cudaStream_t stream;
  float* scales;  // of the rows of both sides of a product, scratch

  template <typename T>
  void products_of_rows(const Matrix<const T>& a, const Matrix<const T>& b,
                        const Matrix<T>& c) const {
    if constexpr (std::is_same_v<T, float>) {
      if (a.columns > 0 && row_products_fill(a.rows, b.rows)) {
        float* b_scales = scales + a.rows;
        STD_CUDA_CHECK(launch_row_scales(a.data, a.rows, a.columns, scales, stream));
        STD_CUDA_CHECK(launch_row_scales(b.data, b.rows, b.columns, b_scales, stream));
        STD_CUDA_CHECK(launch_row_products({a.data, a.rows, scales}, {b.data, b.rows, b_scales},
                                           a.columns, false, c.data, stream));
        return;
      }
    }
    gemm(a, b.transposed(), 0.0, c);
  }

  template <typename T>
  void gather(const T* from, const int64_t* rows, int64_t count, int64_t k, T* to) const {
    if (k > 0) STD_CUDA_CHECK(launch_gather_rows(from, rows, count, k, to, stream));
  }

  template <typename T>
  void add_rows(const T* from, const int64_t* rows, int64_t count, int64_t k, T* to) const {
    if (k > 0) STD_CUDA_CHECK(launch_add_rows(from, rows, count, k, to, stream));
  }
};

bool is_capturing(cudaStream_t stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  STD_CUDA_CHECK(cudaStreamIsCapturing(stream, &status));
  return status != cudaStreamCaptureStatusNone;
}

// A copy on the device of `like`; the host's values may go at once. A graph gets them for good, and
// a few are written without waiting for the device.
Tensor uploaded(const std::vector<int64_t>& values, const Tensor& like) {
  constexpr int64_t kWritten = 64 * 1024;  // some 16 launches
  const auto count = static_cast<int64_t>(values.size());
  const int64_t bytes = count * static_cast<int64_t>(sizeof(int64_t));
  Tensor out = torch::stable::new_empty(like, {count}, ScalarType::Long);
  if (const cudaStream_t stream = current_stream(like); bytes <= kWritten || is_capturing(stream)) {
    STD_CUDA_CHECK(launch_write(values.data(), bytes, out.mutable_data_ptr(), stream));
    return out;
  }
  const torch::stable::Device host(torch::headeronly::DeviceType::CPU);
  torch::stable::copy_(out, torch::stable::from_blob(const_cast<int64_t*>(values.data()), {count},
                                                     {1}, host, ScalarType::Long));
  return out;
}

// Everything about the problem but the vectors, on the device.
class Problem {
 public:
  Problem(const Tensor& features, const Tensor& task_offsets, const Tensor& masks,
          const Tensor& ridge, GlmSizes sizes)
      : sizes_(sizes),
        features_(features),
        ridge_(ridge),
        costs_(costs_of(sizes.b)),
        runs_(task_runs(task_offsets.const_data_ptr<int64_t>(), masks.const_data_ptr<bool>(),
                        sizes.m, sizes.n, costs_)),
        participants_(runs_, masks.const_data_ptr<bool>(), sizes.n, 0, sizes.m, costs_.whole),
        uploaded_(uploaded(for_device(task_offsets, masks), features)),
        task_of_(torch::stable::new_empty(features, {sizes.b}, ScalarType::Int)) {
    if (sizes.b == 0) return;
    STD_CUDA_CHECK(launch_tasks_of_samples(offsets(), sizes.n, sizes.b,
                                           task_of_.mutable_data_ptr<int32_t>(),
                                           current_stream(features)));
  }

  // pass(block) launches what happens between the products; out and objective as in glm_hvp.h.
  template <typename T, typename Pass>
  void run(const Tensor& vectors, const Pass& pass, Tensor& out, double* objective) const {
    const int64_t k = sizes_.k, m = sizes_.m;
    const int64_t block = samples_per_block();
    Tensor scales = torch::stable::new_empty(features_, {m + block}, ScalarType::Float);
    const CudaBackend backend = {Gemm(features_), current_stream(features_),
                                 scales.mutable_data_ptr<float>()};
    Tensor gathered = torch::stable::new_empty(features_, {m, k});
    Tensor partial = torch::stable::new_empty(features_, {m, k});
    Tensor products = torch::stable::new_empty(features_, {m, block});
    const GlmWorkspace<T> work = {gathered.mutable_data_ptr<T>(), partial.mutable_data_ptr<T>(),
                                  products.mutable_data_ptr<T>(), block};
    const SubsetSamples sets = subset_samples();
    const auto launch_pass = [&](T* values, int64_t begin, int64_t end, const TaskRun&,
                                 const int64_t* rows, int64_t active) {
      STD_CUDA_CHECK(pass(ProductBlock<T>{values, rows, active, begin, end, sets}));
    };
    torch::stable::zero_(out);
    accumulate_runs(backend, runs_, participants_, rows(), features_.const_data_ptr<T>(),
                    vectors.const_data_ptr<T>(), k, work, launch_pass, out.mutable_data_ptr<T>());
    if (m == 0) return;
    STD_CUDA_CHECK(launch_finish_subsets<T>(sets, ridge_.const_data_ptr<T>(),
                                            vectors.const_data_ptr<T>(), m, k,
                                            out.mutable_data_ptr<T>(), objective, backend.stream));
  }

 private:
  // Offsets, then packed masks, then the rows of the participants: one upload.
  std::vector<int64_t> for_device(const Tensor& task_offsets, const Tensor& masks) const {
    const int64_t n = sizes_.n;
    const auto* offsets = task_offsets.const_data_ptr<int64_t>();
    const auto* bytes = reinterpret_cast<const uint8_t*>(masks.const_data_ptr<bool>());
    std::vector<int64_t> values(offsets, offsets + n + 1);
    for (int64_t i = 0; i < sizes_.m; ++i) {
      for (int64_t a = 0; a < n; a += kBitsPerWord) {
        const uint64_t word = pack_word(bytes + i * n + a, std::min(kBitsPerWord, n - a));
        values.push_back(static_cast<int64_t>(word));
      }
    }
    values.insert(values.end(), participants_.rows.begin(), participants_.rows.end());
    return values;
  }

  const int64_t* offsets() const { return uploaded_.const_data_ptr<int64_t>(); }
  const int64_t* masks() const { return offsets() + sizes_.n + 1; }
  const int64_t* rows() const { return masks() + sizes_.m * words_of(sizes_.n); }

  SubsetSamples subset_samples() const {
    return {reinterpret_cast<const uint64_t*>(masks()), offsets(),
            task_of_.const_data_ptr<int32_t>(), sizes_.b, sizes_.n};
  }

  // The samples of the longest run, where they are not much more than a block; no rest is short.
  int64_t samples_per_block() const {
    int64_t longest = 1;
    for (const TaskRun& run : runs_) longest = std::max(longest, run.end - run.begin);
    const int64_t block = std::max<int64_t>(1, costs_.samples_per_block);
    const int64_t pieces = std::max<int64_t>(1, (longest + block / 2) / block);
    return (longest + pieces - 1) / pieces;
  }

  const GlmSizes sizes_;
  const Tensor features_, ridge_;
  const RunCosts costs_;
  const std::vector<TaskRun> runs_;
  const Participants participants_;
  const Tensor uploaded_;
  Tensor task_of_;  // (b) int32
};

Tensor glm_hvp_cuda(const Tensor& features, const Tensor& task_offsets, const Tensor& masks,
                    const std::optional<Tensor>& curvature, const Tensor& v, const Tensor& ridge) {
  const GlmSizes sizes = checked_glm_sizes(features, task_offsets, masks, v, "v", ridge);
  if (curvature) check_curvature(*curvature, features, sizes);
  const DeviceGuard guard(features.get_device_index());
  const cudaStream_t stream = current_stream(features);
  Tensor out = torch::stable::new_empty(v, {sizes.m, sizes.k});
  const Problem problem(features, task_offsets, masks, ridge, sizes);
  for_dtype(features.scalar_type(), [&](auto type) {
    using T = decltype(type);
    if (curvature && curvature->scalar_type() == ScalarType::BFloat16) {
      const auto* rows = static_cast<const BFloat16*>(curvature->const_data_ptr());
      const auto weigh = [&](ProductBlock<T> block) {
        return launch_weigh_products(block, rows, stream);
      };
      return problem.run<T>(v, weigh, out, nullptr);
    }
    const T* rows = curvature ? curvature->const_data_ptr<T>() : nullptr;
    const auto weigh = [&](ProductBlock<T> block) {
      return launch_weigh_products(block, rows, stream);
    };
    problem.run<T>(v, weigh, out, nullptr);
  });
  return out;
}

std::tuple<Tensor, Tensor, Tensor> glm_gradient_cuda(const Tensor& features, const Tensor& margins,
                                                     const Tensor& task_offsets,
                                                     const Tensor& masks, const Tensor& w,
                                                     const Tensor& ridge,
                                                     std::optional<ScalarType> curvature_dtype) {
  const GlmSizes sizes = checked_glm_sizes(features, task_offsets, masks, w, "w", ridge);
  check_beside(margins, "margins", features, {sizes.b});
  if (curvature_dtype) check_curvature_dtype(*curvature_dtype, features);
  const DeviceGuard guard(features.get_device_index());
  const cudaStream_t stream = current_stream(features);
  const ScalarType stored = curvature_dtype.value_or(features.scalar_type());
  Tensor gradient = torch::stable::new_empty(w, {sizes.m, sizes.k});
  Tensor objective = torch::stable::new_empty(w, {sizes.m}, ScalarType::Double);
  Tensor curvature = curvature_dtype ? torch::stable::new_empty(w, {sizes.m, sizes.b}, stored)
                                     : torch::stable::new_empty(w, {0, 0}, stored);
  torch::stable::zero_(objective);
  torch::stable::zero_(curvature);  // samples outside the subset
  const Problem problem(features, task_offsets, masks, ridge, sizes);
  for_dtype(features.scalar_type(), [&](auto type) {
    using T = decltype(type);
    const T* h = margins.const_data_ptr<T>();
    double* objectives = objective.mutable_data_ptr<double>();
    if (curvature_dtype && stored == ScalarType::BFloat16) {
      auto* rows = static_cast<BFloat16*>(curvature.mutable_data_ptr());
      const auto differentiate = [&](ProductBlock<T> block) {
        return launch_logistic_products(block, h, rows, objectives, stream);
      };
      return problem.run<T>(w, differentiate, gradient, objectives);
    }
    T* rows = curvature_dtype ? curvature.mutable_data_ptr<T>() : nullptr;
    const auto differentiate = [&](ProductBlock<T> block) {
      return launch_logistic_products(block, h, rows, objectives, stream);
    };
    problem.run<T>(w, differentiate, gradient, objectives);
  });
  return {gradient, objective, curvature};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ksm_ext, CUDA, m) {
  m.impl("glm_hvp", TORCH_BOX(&glm_hvp_cuda));
  m.impl("glm_gradient", TORCH_BOX(&glm_gradient_cuda));
}

}  // namespace ksm
