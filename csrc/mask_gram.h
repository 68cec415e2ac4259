// Packed masks, kernels between sets of them, and products with these; cpu/mask_gram.cpp and
// cuda/mask_gram*.cu share this contract.
//
//     pack_masks:        bit j % 64 of out[i, j / 64] = masks[i, j]            masks: (m, n) bool
//     mask_gram:         K[i, j] = A[hamming(x_i, y_j)] + B[overlap(x_i, y_j)]
//     mask_gram_matmul:  out = K v
//
// x: (m, words_of(n)) int64   y: (l, words_of(n)) int64   K: (m, l)   v: (l, t)   out: (m, t). Every
// kernel on 0/1 masks that is a function of distances and inner products has this form; A or B
// (n + 1 entries each) may be absent. For layout and entries see packed_masks.h.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <optional>

#include "checks.h"
#include "packed_masks.h"

namespace ksm {

using MaybeTensor = std::optional<Tensor>;

struct GramSizes {
  int64_t m, l, n;
};

inline void check_masks(const Tensor& masks) {
  check_contiguous(masks, "masks", 2);
  STD_TORCH_CHECK(masks.scalar_type() == ScalarType::Bool,
                  "masks must be of dtype bool, got another dtype. Convert it with .bool().");
}

inline void check_packed(const Tensor& masks, const char* name, int64_t n) {
  check_contiguous(masks, name, 2);
  STD_TORCH_CHECK(masks.scalar_type() == ScalarType::Long, name,
                  " must be packed masks of dtype int64, got another dtype. Use pack_masks.");
  STD_TORCH_CHECK(n >= 0 && masks.size(1) == words_of(n), name, " must be of ", words_of(n),
                  " words for num_tasks ", n, ", got ", masks.size(1),
                  ". Pass the num_tasks that the masks were packed from.");
}

inline void check_table(const Tensor& table, const char* name, const Tensor& x, int64_t n) {
  check_contiguous(table, name, 1);
  check_same_device(table, name, x);
  const ScalarType dtype = table.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double, name,
                  " must be of dtype float32 or float64, got another dtype. Convert it.");
  STD_TORCH_CHECK(table.size(0) == n + 1, name, " must be of ", n + 1, " values, got ",
                  table.size(0), ". Tabulate 0 .. num_tasks.");
}

// The dtype of the result: that of the tables.
inline const Tensor& result_like(const MaybeTensor& hamming_table,
                                 const MaybeTensor& overlap_table) {
  STD_TORCH_CHECK(hamming_table || overlap_table,
                  "hamming_table must be given where overlap_table is not, got neither. "
                  "Pass one table or both.");
  return hamming_table ? *hamming_table : *overlap_table;
}

inline GramSizes checked_sizes(const Tensor& x, const Tensor& y, int64_t n,
                               const MaybeTensor& hamming_table, const MaybeTensor& overlap_table) {
  check_packed(x, "x", n);
  check_packed(y, "y", n);
  check_same_device(y, "y", x);
  if (hamming_table) check_table(*hamming_table, "hamming_table", x, n);
  if (overlap_table) check_table(*overlap_table, "overlap_table", x, n);
  const ScalarType dtype = result_like(hamming_table, overlap_table).scalar_type();
  STD_TORCH_CHECK(!overlap_table || overlap_table->scalar_type() == dtype,
                  "overlap_table must be of the dtype of hamming_table, got another dtype. "
                  "Convert one of them.");
  return {x.size(0), y.size(0), n};
}

inline void check_multiplied(const Tensor& v, const Tensor& x, int64_t l, ScalarType dtype) {
  check_contiguous(v, "v", 2);
  check_same_device(v, "v", x);
  STD_TORCH_CHECK(v.size(0) == l, "v must be of ", l, " rows like y, got ", v.size(0),
                  ". Pass one row per mask of y.");
  STD_TORCH_CHECK(v.scalar_type() == dtype,
                  "v must be of the dtype of the tables, got another dtype. Convert one of them.");
}

template <typename T>
Tables<T> tables_of(const MaybeTensor& hamming_table, const MaybeTensor& overlap_table) {
  return {pointer_of<T>(hamming_table), pointer_of<T>(overlap_table)};
}

inline const uint64_t* words_pointer(const Tensor& masks) {
  return reinterpret_cast<const uint64_t*>(masks.const_data_ptr<int64_t>());
}

}  // namespace ksm
