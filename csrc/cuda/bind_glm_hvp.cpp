// Regressions on many subsets on CUDA: the walk of glm_hvp.h over all subsets at once, with cuBLAS
// and the kernels of glm_hvp.cu on the current stream. The workspace does not grow with b.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>

#include <tuple>

#include "cuda/glm_hvp_kernels.h"
#include "cuda/stream.h"
#include "glm_hvp.h"

namespace ksm {
namespace {

using torch::stable::accelerator::DeviceGuard;

// A run costs three launches and a pass over its rows; blocks are large enough to fill the GPU.
constexpr RunCosts kCosts = {/*overhead=*/512.0, /*samples_per_block=*/4096};

struct CudaBackend {
  Gemm gemm;
  cudaStream_t stream;

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

// A copy on the device of `like`; the host's values may go at once. A graph gets them for good.
template <typename T>
Tensor uploaded(const T* values, std::vector<int64_t> shape, ScalarType dtype, const Tensor& like) {
  Tensor out = torch::stable::new_empty(like, shape, dtype);
  const int64_t count = out.numel();
  if (count == 0) return out;
  if (const cudaStream_t stream = current_stream(like); is_capturing(stream)) {
    const auto bytes = count * static_cast<int64_t>(sizeof(T));
    STD_CUDA_CHECK(launch_write(values, bytes, out.mutable_data_ptr(), stream));
    return out;
  }
  const torch::stable::Device host(torch::headeronly::DeviceType::CPU);
  Tensor flat = torch::stable::view(out, {count});
  torch::stable::copy_(flat,
                       torch::stable::from_blob(const_cast<T*>(values), {count}, {1}, host, dtype));
  return out;
}

Tensor uploaded(const std::vector<int64_t>& values, const Tensor& like) {
  return uploaded(values.data(), {static_cast<int64_t>(values.size())}, ScalarType::Long, like);
}

std::vector<int64_t> tasks_of_samples(const int64_t* task_offsets, int64_t n, int64_t b) {
  std::vector<int64_t> task_of(b);
  for (int64_t a = 0; a < n; ++a) {
    std::fill(task_of.begin() + task_offsets[a], task_of.begin() + task_offsets[a + 1], a);
  }
  return task_of;
}

// Everything about the problem but the vectors, on the device.
class Problem {
 public:
  Problem(const Tensor& features, const Tensor& task_offsets, const Tensor& masks,
          const Tensor& ridge, GlmSizes sizes)
      : sizes_(sizes),
        features_(features),
        ridge_(ridge),
        offsets_(task_offsets.const_data_ptr<int64_t>()),
        host_masks_(masks.const_data_ptr<bool>()),
        runs_(task_runs(offsets_, host_masks_, sizes.m, sizes.n, kCosts)),
        participants_(runs_, host_masks_, sizes.n, 0, sizes.m),
        rows_(uploaded(participants_.rows, features)),
        task_of_(uploaded(tasks_of_samples(offsets_, sizes.n, sizes.b), features)),
        subset_samples_(uploaded(subset_sizes(host_masks_, offsets_, sizes.m, sizes.n), features)),
        masks_(uploaded(host_masks_, {sizes.m, sizes.n}, ScalarType::Bool, features)) {}

  // pass(block) launches what happens between the products; out and objective as in glm_hvp.h.
  template <typename T, typename Pass>
  void run(const Tensor& vectors, const Pass& pass, Tensor& out, double* objective) const {
    const auto [b, k, n, m] = sizes_;
    const CudaBackend backend = {Gemm(features_), current_stream(features_)};
    int64_t longest = 0;
    for (const TaskRun& run : runs_) longest = std::max(longest, run.end - run.begin);
    const int64_t block = std::min(longest, kCosts.samples_per_block);
    Tensor gathered = torch::stable::new_empty(features_, {m, k});
    Tensor partial = torch::stable::new_empty(features_, {m, k});
    Tensor products = torch::stable::new_empty(features_, {m, block});
    const GlmWorkspace<T> work = {gathered.mutable_data_ptr<T>(), partial.mutable_data_ptr<T>(),
                                  products.mutable_data_ptr<T>(), std::max<int64_t>(1, block)};
    const auto* masks = reinterpret_cast<const uint8_t*>(masks_.const_data_ptr<bool>());
    const int64_t* task_of = task_of_.const_data_ptr<int64_t>();
    const auto launch_pass = [&, b = b, n = n](T* values, int64_t begin, int64_t end,
                                               const TaskRun&, const int64_t* rows,
                                               int64_t active) {
      STD_CUDA_CHECK(pass(ProductBlock<T>{values, rows, active, begin, end, b, n, masks, task_of}));
    };
    torch::stable::zero_(out);
    accumulate_runs(backend, runs_, participants_, rows_.const_data_ptr<int64_t>(),
                    features_.const_data_ptr<T>(), vectors.const_data_ptr<T>(), k, work,
                    launch_pass, out.mutable_data_ptr<T>());
    if (m == 0) return;
    STD_CUDA_CHECK(launch_finish_subsets<T>(
        subset_samples_.const_data_ptr<int64_t>(), ridge_.const_data_ptr<T>(),
        vectors.const_data_ptr<T>(), m, k, out.mutable_data_ptr<T>(), objective, backend.stream));
  }

 private:
  const GlmSizes sizes_;
  const Tensor features_, ridge_;
  const int64_t* const offsets_;  // (n + 1), on the host
  const bool* const host_masks_;  // (m, n), on the host
  const std::vector<TaskRun> runs_;
  const Participants participants_;
  const Tensor rows_, task_of_, subset_samples_, masks_;
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
