// Every operator of ksm_ext: the table of contents of csrc/. Kernels are registered where they are
// written, in cpu/ and cuda/; shapes, dtypes and derivatives are documented in ksm_ext/ops/.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(ksm_ext, m) {
  m.def("pack_masks(Tensor masks) -> Tensor");
  m.def(
      "mask_gram(Tensor x, Tensor? y, int num_tasks, Tensor? hamming_table, "
      "Tensor? overlap_table) -> Tensor");
  m.def(
      "mask_gram_matmul(Tensor x, Tensor? y, int num_tasks, Tensor? hamming_table, "
      "Tensor? overlap_table, Tensor v) -> Tensor");
  m.def(
      "weighted_mask_gram(Tensor x, Tensor? y, int num_tasks, Tensor weights, int kernel, "
      "Tensor? x_factors, Tensor? y_factors) -> Tensor");
  m.def(
      "weighted_mask_gram_matmul(Tensor x, Tensor? y, int num_tasks, Tensor weights, int kernel, "
      "Tensor v) -> Tensor");
  m.def(
      "project_(Tensor(a!) out, Tensor x, int offset, int dim, int kind, int seed, int sparsity, "
      "bool hadamard) -> ()");
  m.def(
      "project_adjoint(Tensor y, int num_coordinates, int offset, int dim, int kind, int seed, "
      "int sparsity, bool hadamard) -> Tensor");
  m.def("gram_update(Tensor(a!) gram, Tensor features, Tensor? weights) -> ()");
  m.def(
      "task_gram(Tensor features, Tensor task_offsets, Tensor? other, Tensor? weights) -> Tensor");
  m.def(
      "kernel_gram(Tensor x, Tensor? y, int kind, float gamma, float coef0, int degree) -> "
      "Tensor");
  m.def(
      "glm_hvp(Tensor features, Tensor task_offsets, Tensor masks, Tensor? curvature, Tensor v, "
      "Tensor ridge) -> Tensor");
  m.def(
      "glm_gradient(Tensor features, Tensor margins, Tensor task_offsets, Tensor masks, Tensor w, "
      "Tensor ridge, ScalarType? curvature_dtype) -> (Tensor, Tensor, Tensor)");
  m.def("softmax_hvp(Tensor logits, Tensor tangents, Tensor? weights) -> Tensor");
  m.def("softmax_hvp_(Tensor(a!) tangents, Tensor logits, Tensor? weights) -> ()");
}
