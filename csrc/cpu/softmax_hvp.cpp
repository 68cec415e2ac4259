// The Hessian of softmax cross-entropy on the CPU.
//
// Threads own rows of the logits, for some tangents at a time: no result depends on their number.
// A row of tangents is read from memory by its dot product and again, from the cache, by the pass
// that writes.
#include "softmax_hvp.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <memory>

#include "cpu/kernels.h"
#include "cpu/large_output.h"

namespace ksm {
namespace {

constexpr int64_t kTangentsPerItem = 16;  // for which a row's probabilities are computed once

template <typename T>
void multiply(const T* logits,    // (b, c)
              const T* tangents,  // (s, b, c)
              const T* weights,   // (b) or null
              SoftmaxSizes sizes, T* out) {
  const auto [s, b, c] = sizes;
  const RealKernels<T>& kernels = cpu_kernels().of<T>();
  const int64_t groups = (s + kTangentsPerItem - 1) / kTangentsPerItem;
  const TileWriter<T> writer(out, s * b, c);
  torch::stable::parallel_for(0, b * groups, 1, [&](int64_t item, int64_t last) {
    constexpr int64_t kStrip = 1024;
    alignas(64) T strip[kStrip];
    const std::unique_ptr<T[]> p(new T[c]);
    for (; item < last; ++item) {
      const int64_t i = item / groups, first = item % groups * kTangentsPerItem;
      kernels.softmax(logits + i * c, c, p.get());
      const T weight = weights ? weights[i] : T(1);
      for (int64_t r = first; r < std::min(s, first + kTangentsPerItem); ++r) {
        const T* tangent = tangents + (r * b + i) * c;
        const T mean = kernels.dot(p.get(), tangent, c);
        if (out == tangents) {
          kernels.centre(p.get(), tangent, weight, mean, c, out + (r * b + i) * c);
          continue;
        }
        for (int64_t j = 0; j < c; j += kStrip) {
          const int64_t count = std::min(kStrip, c - j);
          kernels.centre(p.get() + j, tangent + j, weight, mean, count, strip);
          writer.template write<kStrip>(strip, 1, count, r * b + i, j);
        }
      }
    }
    writer.finish();
  });
}

void softmax_hvp_into(const Tensor& logits, const Tensor& tangents,
                      const std::optional<Tensor>& weights, SoftmaxSizes sizes, Tensor& out) {
  if (sizes.s * sizes.b * sizes.c == 0) return;
  for_dtype(logits.scalar_type(), [&](auto type) {
    using T = decltype(type);
    multiply(logits.const_data_ptr<T>(), tangents.const_data_ptr<T>(),
             weights ? weights->const_data_ptr<T>() : nullptr, sizes, out.mutable_data_ptr<T>());
  });
}

Tensor softmax_hvp_cpu(const Tensor& logits, const Tensor& tangents,
                       const std::optional<Tensor>& weights) {
  const SoftmaxSizes sizes = checked_softmax_sizes(logits, tangents, weights);
  Tensor out = torch::stable::new_empty(tangents, {sizes.s, sizes.b, sizes.c});
  const int64_t entry = logits.scalar_type() == ScalarType::Float ? sizeof(float) : sizeof(double);
  request_huge_pages(out.mutable_data_ptr(), sizes.s * sizes.b * sizes.c * entry);
  softmax_hvp_into(logits, tangents, weights, sizes, out);
  return out;
}

void softmax_hvp_in_place_cpu(Tensor tangents, const Tensor& logits,
                              const std::optional<Tensor>& weights) {
  const SoftmaxSizes sizes = checked_softmax_sizes(logits, tangents, weights);
  softmax_hvp_into(logits, tangents, weights, sizes, tangents);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ksm_ext, CPU, m) {
  m.impl("softmax_hvp", TORCH_BOX(&softmax_hvp_cpu));
  m.impl("softmax_hvp_", TORCH_BOX(&softmax_hvp_in_place_cpu));
}

}  // namespace ksm
