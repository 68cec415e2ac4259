// Packed masks on the CPU, and their Gram matrices of two tables.
#include "mask_gram.h"

#include <torch/csrc/stable/library.h>

#include "cpu/mask_gram_drivers.h"
#include "cpu/mask_gram_tiles.h"

namespace ksm {
namespace {

Tensor pack_masks_cpu(const Tensor& masks) {
  check_masks(masks);
  const int64_t m = masks.size(0), n = masks.size(1), words = words_of(n);
  Tensor out = torch::stable::new_empty(masks, {m, words}, ScalarType::Long);
  const auto* in = reinterpret_cast<const uint8_t*>(masks.const_data_ptr<bool>());
  int64_t* packed = out.mutable_data_ptr<int64_t>();
  constexpr int64_t kTasksPerThread = 1 << 19;  // some 50 us of work
  torch::stable::parallel_for(
      0, m, std::max<int64_t>(1, kTasksPerThread / (n + 1)), [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          for (int64_t w = 0; w < words; ++w) {
            const int64_t j = w * kBitsPerWord;
            packed[i * words + w] =
                static_cast<int64_t>(pack_word(in + i * n + j, std::min(kBitsPerWord, n - j)));
          }
        }
      });
  return out;
}

Tensor mask_gram_cpu(const Tensor& x, const MaybeTensor& maybe_y, int64_t num_tasks,
                     const MaybeTensor& hamming_table, const MaybeTensor& overlap_table) {
  const Tensor& y = maybe_y ? *maybe_y : x;
  const auto [m, l, n] = checked_sizes(x, y, num_tasks, hamming_table, overlap_table);
  check_last_words(x, "x", n);
  check_last_words(y, "y", n);
  const Tensor& like = result_like(hamming_table, overlap_table);
  Tensor out = torch::stable::new_empty(like, {m, l});
  if (m == 0 || l == 0) return out;
  for_dtype(like.scalar_type(), [&, m = m, l = l, n = n](auto type) {
    using T = decltype(type);
    const GramTiles<T> gram(words_pointer(x), m, words_pointer(y), l, words_of(n),
                            tables_of<T>(hamming_table, overlap_table));
    write_gram(gram, !maybe_y, m, l, out.mutable_data_ptr<T>());
  });
  return out;
}

Tensor mask_gram_matmul_cpu(const Tensor& x, const MaybeTensor& maybe_y, int64_t num_tasks,
                            const MaybeTensor& hamming_table, const MaybeTensor& overlap_table,
                            const Tensor& v) {
  const Tensor& y = maybe_y ? *maybe_y : x;
  const auto [m, l, n] = checked_sizes(x, y, num_tasks, hamming_table, overlap_table);
  check_last_words(x, "x", n);
  check_last_words(y, "y", n);
  const Tensor& like = result_like(hamming_table, overlap_table);
  check_multiplied(v, x, l, like.scalar_type());
  const int64_t t = v.size(1);
  Tensor out = torch::stable::new_empty(like, {m, t});
  if (m == 0 || t == 0) return out;
  for_dtype(like.scalar_type(), [&, m = m, l = l, n = n](auto type) {
    using T = decltype(type);
    const GramTiles<T> gram(words_pointer(x), m, words_pointer(y), l, words_of(n),
                            tables_of<T>(hamming_table, overlap_table));
    multiply_gram(gram, !maybe_y, m, l, v.const_data_ptr<T>(), t, out.mutable_data_ptr<T>());
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ksm_ext, CPU, m) {
  m.impl("pack_masks", TORCH_BOX(&pack_masks_cpu));
  m.impl("mask_gram", TORCH_BOX(&mask_gram_cpu));
  m.impl("mask_gram_matmul", TORCH_BOX(&mask_gram_matmul_cpu));
}

}  // namespace ksm
