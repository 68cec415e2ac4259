// Regressions on many subsets on the CPU.
//
// Threads own chunks of the subsets, whose number depends on m alone, and a GEMM inside a thread
// runs on that thread: the result is the same for any number of threads.
#include "glm_hvp.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <memory>
#include <tuple>

#include "cpu/kernels.h"
#include "cpu/large_output.h"

namespace ksm {
namespace {

// Measured on Zen 4 with m = 1,000 and k = 512. Products of a chunk and a block fit the L2 cache.
constexpr RunCosts kCosts = {/*overhead=*/26.0, /*samples_per_block=*/512, /*whole=*/1.0};

// About eight chunks, for as many threads, of sizes at which GEMM reaches its speed.
int64_t subsets_per_chunk(int64_t m) { return std::clamp<int64_t>((m + 7) / 8, 32, 256); }

struct CpuBackend {
  Gemm gemm;

  template <typename T>
  void products_of_rows(const Matrix<const T>& a, const Matrix<const T>& b,
                        const Matrix<T>& c) const {
    gemm(a, b.transposed(), 0.0, c);
  }

  template <typename T>
  void gather(const T* from, const int64_t* rows, int64_t count, int64_t k, T* to) const {
    for (int64_t r = 0; r < count; ++r) std::copy_n(from + rows[r] * k, k, to + r * k);
  }

  template <typename T>
  void add_rows(const T* from, const int64_t* rows, int64_t count, int64_t k, T* to) const {
    for (int64_t r = 0; r < count; ++r) {
      T* target = to + rows[r] * k;
      for (int64_t d = 0; d < k; ++d) target[d] += from[r * k + d];
    }
  }
};

// Everything about the problem but the vectors.
template <typename T>
struct Problem {
  Problem(const Tensor& features, const Tensor& task_offsets, const Tensor& masks,
          const Tensor& ridge, GlmSizes sizes)
      : sizes(sizes),
        backend{Gemm(features)},
        features(features.const_data_ptr<T>()),
        task_offsets(task_offsets.const_data_ptr<int64_t>()),
        masks(masks.const_data_ptr<bool>()),
        ridge(ridge.const_data_ptr<T>()),
        runs(task_runs(this->task_offsets, this->masks, sizes.m, sizes.n, kCosts)),
        subset_samples(subset_sizes(this->masks, this->task_offsets, sizes.m, sizes.n)) {}

  // Calls segment(row of the products, subset, first sample, samples) for the samples of each
  // task in each participating subset, and sets the products of the other samples to zero.
  template <typename Segment>
  void for_each_segment(T* products, int64_t begin, int64_t end, const TaskRun& run,
                        int64_t first_subset, const int64_t* rows, int64_t active,
                        const Segment& segment) const {
    for (int64_t r = 0; r < active; ++r) {
      const int64_t subset = first_subset + (rows ? rows[r] : r);
      const bool* mask = masks + subset * sizes.n;
      T* row = products + r * (end - begin);
      for (int64_t a = run.first_task; a < run.last_task; ++a) {
        const int64_t from = std::max(begin, task_offsets[a]);
        const int64_t to = std::min(end, task_offsets[a + 1]);
        if (from >= to) continue;
        if (mask[a]) {
          segment(row + from - begin, subset, from, to - from);
        } else {
          std::fill(row + from - begin, row + to - begin, T(0));
        }
      }
    }
  }

  // out_S = totals_S / |S| + ridge_S v_S, where out holds the totals.
  void finish(int64_t subset, const T* v, T* out) const {
    const T samples = static_cast<T>(std::max<int64_t>(1, subset_samples[subset]));
    for (int64_t d = 0; d < sizes.k; ++d) out[d] = out[d] / samples + ridge[subset] * v[d];
  }

  // pass(products, begin, end, run, first subset of the chunk, rows, active), see accumulate_runs.
  template <typename Pass>
  void accumulate(const T* vectors,  // (m, k)
                  const Pass& pass,
                  T* out) const {  // (m, k)
    const int64_t m = sizes.m, k = sizes.k, per_chunk = subsets_per_chunk(m);
    const int64_t chunks = (m + per_chunk - 1) / per_chunk;
    // Two items at least, of which the second may be empty: a lone chunk too then runs in a
    // parallel region, where GEMM keeps to one thread.
    torch::stable::parallel_for(0, std::max<int64_t>(2, chunks), 1, [&](int64_t c, int64_t last) {
      const std::unique_ptr<T[]> memory(new T[per_chunk * (2 * k + kCosts.samples_per_block)]);
      const GlmWorkspace<T> work = {memory.get(), memory.get() + per_chunk * k,
                                    memory.get() + 2 * per_chunk * k, kCosts.samples_per_block};
      for (; c < std::min(last, chunks); ++c) {
        const int64_t first = c * per_chunk, count = std::min(per_chunk, m - first);
        const Participants participants(runs, masks, sizes.n, first, count, kCosts.whole);
        T* totals = out + first * k;
        std::fill(totals, totals + count * k, T(0));
        const auto chunk_pass = [&](T* products, int64_t begin, int64_t end, const TaskRun& run,
                                    const int64_t* rows, int64_t active) {
          pass(products, begin, end, run, first, rows, active);
        };
        accumulate_runs(backend, runs, participants, participants.rows.data(), features,
                        vectors + first * k, k, work, chunk_pass, totals);
        for (int64_t r = 0; r < count; ++r) {
          finish(first + r, vectors + (first + r) * k, totals + r * k);
        }
      }
    });
  }

  const GlmSizes sizes;
  const CpuBackend backend;
  const T* const features;            // (b, k)
  const int64_t* const task_offsets;  // (n + 1)
  const bool* const masks;            // (m, n)
  const T* const ridge;               // (m)
  const std::vector<TaskRun> runs;
  const std::vector<int64_t> subset_samples;  // (m)
};

const BFloat16* bfloat16_pointer(const Tensor& tensor) {
  return static_cast<const BFloat16*>(tensor.const_data_ptr());
}

Tensor glm_hvp_cpu(const Tensor& features, const Tensor& task_offsets, const Tensor& masks,
                   const std::optional<Tensor>& curvature, const Tensor& v, const Tensor& ridge) {
  const GlmSizes sizes = checked_glm_sizes(features, task_offsets, masks, v, "v", ridge);
  if (curvature) check_curvature(*curvature, features, sizes);
  Tensor out = torch::stable::new_empty(v, {sizes.m, sizes.k});
  for_dtype(features.scalar_type(), [&](auto type) {
    using T = decltype(type);
    const Problem<T> problem(features, task_offsets, masks, ridge, sizes);
    const RealKernels<T>& kernels = cpu_kernels().of<T>();
    const bool narrow = curvature && curvature->scalar_type() == ScalarType::BFloat16;
    const T* wide_rows = curvature && !narrow ? curvature->const_data_ptr<T>() : nullptr;
    const BFloat16* narrow_rows = narrow ? bfloat16_pointer(*curvature) : nullptr;
    const auto weigh = [&](T* products, int64_t subset, int64_t sample, int64_t count) {
      const int64_t entry = subset * sizes.b + sample;
      if (narrow_rows) kernels.scale_bfloat16(narrow_rows + entry, count, products);
      if (wide_rows) kernels.scale(wide_rows + entry, count, products);
    };
    problem.accumulate(
        v.const_data_ptr<T>(),
        [&](T* products, int64_t begin, int64_t end, const TaskRun& run, int64_t first,
            const int64_t* rows, int64_t active) {
          problem.for_each_segment(products, begin, end, run, first, rows, active, weigh);
        },
        out.mutable_data_ptr<T>());
  });
  return out;
}

std::tuple<Tensor, Tensor, Tensor> glm_gradient_cpu(const Tensor& features, const Tensor& margins,
                                                    const Tensor& task_offsets, const Tensor& masks,
                                                    const Tensor& w, const Tensor& ridge,
                                                    std::optional<ScalarType> curvature_dtype) {
  const GlmSizes sizes = checked_glm_sizes(features, task_offsets, masks, w, "w", ridge);
  check_beside(margins, "margins", features, {sizes.b});
  if (curvature_dtype) check_curvature_dtype(*curvature_dtype, features);
  const ScalarType stored = curvature_dtype.value_or(features.scalar_type());
  Tensor gradient = torch::stable::new_empty(w, {sizes.m, sizes.k});
  Tensor objective = torch::stable::new_empty(w, {sizes.m}, ScalarType::Double);
  Tensor curvature = curvature_dtype ? torch::stable::new_empty(w, {sizes.m, sizes.b}, stored)
                                     : torch::stable::new_empty(w, {0, 0}, stored);
  for_dtype(features.scalar_type(), [&](auto type) {
    using T = decltype(type);
    const Problem<T> problem(features, task_offsets, masks, ridge, sizes);
    const RealKernels<T>& kernels = cpu_kernels().of<T>();
    const T* h = margins.const_data_ptr<T>();
    const T* vectors = w.const_data_ptr<T>();
    double* objectives = objective.mutable_data_ptr<double>();
    std::fill(objectives, objectives + sizes.m, 0.0);
    const bool narrow = curvature_dtype && stored == ScalarType::BFloat16;
    T* wide_rows = curvature_dtype && !narrow ? curvature.mutable_data_ptr<T>() : nullptr;
    auto* narrow_rows = narrow ? static_cast<BFloat16*>(curvature.mutable_data_ptr()) : nullptr;
    if (curvature_dtype) {
      const int64_t bytes = sizes.m * sizes.b * (narrow ? sizeof(BFloat16) : sizeof(T));
      request_huge_pages(curvature.mutable_data_ptr(), bytes);
      torch::stable::zero_(curvature);  // samples outside the subset
    }
    const auto differentiate = [&](T* products, int64_t subset, int64_t sample, int64_t count) {
      const int64_t entry = subset * sizes.b + sample;
      objectives[subset] +=
          narrow_rows ? kernels.logistic_bfloat16(h + sample, count, products, narrow_rows + entry)
                      : kernels.logistic(h + sample, count, products,
                                         wide_rows ? wide_rows + entry : nullptr);
    };
    problem.accumulate(
        vectors,
        [&](T* products, int64_t begin, int64_t end, const TaskRun& run, int64_t first,
            const int64_t* rows, int64_t active) {
          problem.for_each_segment(products, begin, end, run, first, rows, active, differentiate);
        },
        gradient.mutable_data_ptr<T>());
    for (int64_t i = 0; i < sizes.m; ++i) {
      double square = 0;
      for (int64_t d = 0; d < sizes.k; ++d) {
        const double entry = static_cast<double>(vectors[i * sizes.k + d]);
        square += entry * entry;
      }
      const auto samples = static_cast<double>(std::max<int64_t>(1, problem.subset_samples[i]));
      objectives[i] =
          objectives[i] / samples + 0.5 * static_cast<double>(problem.ridge[i]) * square;
    }
  });
  return {gradient, objective, curvature};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ksm_ext, CPU, m) {
  m.impl("glm_hvp", TORCH_BOX(&glm_hvp_cpu));
  m.impl("glm_gradient", TORCH_BOX(&glm_gradient_cpu));
}

}  // namespace ksm
