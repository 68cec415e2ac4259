// Many regressions on subsets of the tasks of one set of samples; cpu/glm_hvp.cpp and
// cuda/glm_hvp.cu share this contract.
//
//     glm_hvp:       out_S = X^T (D_S o (X v_S)) / |S| + ridge_S v_S
//     glm_gradient:  z_Si  = margins_i + x_i . w_S
//                    objective_S = sum over i in S of loss(z_Si) / |S| + ridge_S / 2 ||w_S||^2
//                    out_S       = its gradient;   D_Si = its curvatures (loss'')
//
// X: (b, k), sorted by task; task_offsets: (n + 1); masks: (m, n); D: (m, b); v, w, out: (m, k);
// ridge, objective: (m). |S| counts samples: those of the tasks in S. Without D, it is 1 inside S.
// The part of an empty S is zero, but for the ridge.
//
// A run of samples meets only the subsets that contain one of its tasks: their rows of v are
// gathered, multiplied with the samples a block at a time, weighed, multiplied back and added to
// their rows of out. No more than a block of the (m, b) intermediates ever exists.
#pragma once

#include <algorithm>
#include <optional>
#include <vector>

#include "gemm.h"

namespace ksm {

struct GlmSizes {
  int64_t b, k, n, m;
};

inline GlmSizes checked_glm_sizes(const Tensor& features, const Tensor& task_offsets,
                                  const Tensor& masks, const Tensor& vectors, const char* name,
                                  const Tensor& ridge) {
  check_features(features, "features");
  const int64_t b = features.size(0), k = features.size(1);
  check_task_offsets(task_offsets, b);
  const int64_t n = task_offsets.size(0) - 1;
  check_contiguous(masks, "masks", 2);
  check_on_host(masks, "masks");
  STD_TORCH_CHECK(masks.scalar_type() == ScalarType::Bool,
                  "masks must be of dtype bool, got another dtype. Convert it with .bool().");
  STD_TORCH_CHECK(masks.size(1) == n, "masks must be of ", n, " columns for as many tasks, got ",
                  masks.size(1), ". Pass one column per task.");
  const int64_t m = masks.size(0);
  check_beside(vectors, name, features, {m, k});
  check_beside(ridge, "ridge", features, {m});
  return {b, k, n, m};
}

inline void check_curvature_dtype(ScalarType dtype, const Tensor& features) {
  STD_TORCH_CHECK(dtype == features.scalar_type() || dtype == ScalarType::BFloat16,
                  "curvature must be of dtype bfloat16 or that of the features, got another ",
                  "dtype. Convert it.");
}

inline void check_curvature(const Tensor& curvature, const Tensor& features, GlmSizes sizes) {
  check_contiguous(curvature, "curvature", 2);
  check_curvature_dtype(curvature.scalar_type(), features);
  STD_TORCH_CHECK(curvature.device() == features.device(),
                  "curvature must be on the device of the features, got another one. Move it.");
  STD_TORCH_CHECK(curvature.size(0) == sizes.m && curvature.size(1) == sizes.b,
                  "curvature must be of shape (", sizes.m, ", ", sizes.b, "), got (",
                  curvature.size(0), ", ", curvature.size(1),
                  "). Pass one row per subset and one column per sample.");
}

// Consecutive tasks that are multiplied together.
struct TaskRun {
  int64_t first_task, last_task;  // up to and without the last
  int64_t begin, end;             // their samples
};

// What a backend pays for a run beside its multiplications, and how much it multiplies at once.
struct RunCosts {
  double overhead;  // of gathering and adding rows, in samples per participating subset
  int64_t samples_per_block;
  double whole;  // from this share of the subsets on, a run takes all of them
};

// A task gets its own run where skipping the subsets without it saves more than the run costs;
// the others are multiplied with all subsets, a block of consecutive ones at a time.
inline std::vector<TaskRun> task_runs(const int64_t* task_offsets,  // (n + 1)
                                      const bool* masks,            // (m, n)
                                      int64_t m, int64_t n, RunCosts costs) {
  std::vector<int64_t> participants(n);
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t a = 0; a < n; ++a) participants[a] += masks[i * n + a];
  }
  std::vector<TaskRun> runs;
  bool open = false;  // whether the last run takes further tasks
  for (int64_t a = 0; a < n; ++a) {
    const int64_t begin = task_offsets[a], end = task_offsets[a + 1];
    if (begin == end || participants[a] == 0) continue;
    const auto samples = static_cast<double>(end - begin),
               taking = static_cast<double>(participants[a]);
    const bool alone = taking * (samples + costs.overhead) < static_cast<double>(m) * samples;
    if (open && !alone) {
      runs.back().last_task = a + 1;
      runs.back().end = end;
    } else {
      runs.push_back({a, a + 1, begin, end});
    }
    open = !alone && runs.back().end - runs.back().begin < costs.samples_per_block;
  }
  return runs;
}

// Which of the subsets [first, first + count) take part in each run.
struct Participants {
  std::vector<int64_t> rows;     // relative to first, ascending, one run after the other
  std::vector<int64_t> offsets;  // (runs): where a run's rows begin
  std::vector<int64_t> counts;   // (runs): how many; a run of all `count` subsets has no rows
  int64_t count;

  Participants(const std::vector<TaskRun>& runs, const bool* masks,  // (m, n)
               int64_t n, int64_t first, int64_t count, double whole)
      : count(count) {
    for (const TaskRun& run : runs) {
      const auto offset = static_cast<int64_t>(rows.size());
      for (int64_t r = 0; r < count; ++r) {
        const bool* mask = masks + (first + r) * n;
        if (std::any_of(mask + run.first_task, mask + run.last_task, [](bool in) { return in; })) {
          rows.push_back(r);
        }
      }
      int64_t active = static_cast<int64_t>(rows.size()) - offset;
      if (static_cast<double>(active) >= whole * static_cast<double>(count)) {
        rows.resize(offset);
        active = count;
      }
      offsets.push_back(offset);
      counts.push_back(active);
    }
  }
};

// The number of samples of each subset.
inline std::vector<int64_t> subset_sizes(const bool* masks,            // (m, n)
                                         const int64_t* task_offsets,  // (n + 1)
                                         int64_t m, int64_t n) {
  std::vector<int64_t> sizes(m);
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t a = 0; a < n; ++a) {
      if (masks[i * n + a]) sizes[i] += task_offsets[a + 1] - task_offsets[a];
    }
  }
  return sizes;
}

template <typename T>
struct GlmWorkspace {
  T* gathered;  // (count, k) rows of v of a run's participants
  T* partial;   // (count, k) what the run adds to their rows of out
  T* products;  // (count, samples_per_block)
  int64_t samples_per_block;
};

// totals_S += X^T pass(X v_S) over all runs. The backend gathers rows, adds them, and multiplies:
// products_of_rows(a, b, c) is c = a b^T.
// pass(products, samples begin, end, run, rows, number of rows) works in place on the products
// (rows, end - begin); without rows, they are of all subsets.
template <typename T, typename Backend, typename Pass>
void accumulate_runs(const Backend& backend, const std::vector<TaskRun>& runs,
                     const Participants& participants,
                     const int64_t* rows,  // participants.rows, where the backend reads them
                     const T* features,    // (b, k)
                     const T* vectors,     // (count, k)
                     int64_t k, const GlmWorkspace<T>& work, const Pass& pass,
                     T* totals) {  // (count, k)
  for (size_t index = 0; index < runs.size(); ++index) {
    const TaskRun& run = runs[index];
    const int64_t offset = participants.offsets[index];
    const int64_t active = participants.counts[index];
    if (active == 0) continue;
    const bool all = active == participants.count;
    if (!all) backend.gather(vectors, rows + offset, active, k, work.gathered);
    const Matrix<const T> left = {all ? vectors : work.gathered, active, k, k};
    const Matrix<T> sum = {all ? totals : work.partial, active, k, k};
    for (int64_t begin = run.begin; begin < run.end; begin += work.samples_per_block) {
      const int64_t end = std::min(begin + work.samples_per_block, run.end);
      const Matrix<const T> samples = {features + begin * k, end - begin, k, k};
      const Matrix<T> products = {work.products, active, end - begin, end - begin};
      backend.products_of_rows(left, samples, products);
      pass(work.products, begin, end, run, all ? nullptr : rows + offset, active);
      const Matrix<const T> weighed = {work.products, active, end - begin, end - begin};
      backend.gemm(weighed, samples, all || begin > run.begin, sum);
    }
    if (!all) backend.add_rows(work.partial, rows + offset, active, k, totals);
  }
}

}  // namespace ksm
