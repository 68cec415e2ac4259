// The GEMM of torch (MKL, cuBLAS) on raw memory.
//
// It is called below the dispatcher, through the C interface that compiled models use: it runs on
// worker threads, which know nothing of the caller's autograd state.
#pragma once

#include <torch/csrc/stable/ops.h>
#ifdef USE_CUDA
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cuda.h>
#else
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#endif

#include <type_traits>

#include "checks.h"

#if !defined(USE_CUDA) && defined(__linux__)
// Of MKL, where torch has it: for the calling thread; the number before, or 0 for that of all.
extern "C" __attribute__((weak)) int MKL_Set_Num_Threads_Local(int threads);
#endif

namespace ksm {

template <typename T>
struct Matrix {
  T* data;
  int64_t rows, columns, row_stride, column_stride = 1;

  Matrix transposed() const { return {data, columns, rows, column_stride, row_stride}; }
};

// Enqueues, or on the CPU computes, c = a b + beta c; with beta = 0 the old c is not read.
class __attribute__((visibility("hidden"))) Gemm {
 public:
  explicit Gemm(const Tensor& like) : device_(like.device()) {}

  template <typename T>
  void operator()(const Matrix<const T>& a, const Matrix<const T>& b, double beta,
                  const Matrix<T>& c) const {
    const Tensor left = tensor_of(a), right = tensor_of(b), out = tensor_of(c);
    constexpr double kAlpha = 1.0;
#ifdef USE_CUDA
    TORCH_ERROR_CODE_CHECK(
        aoti_torch_cuda_addmm_out(out.get(), out.get(), left.get(), right.get(), beta, kAlpha));
#else
    const OneThread one_thread;
    TORCH_ERROR_CODE_CHECK(
        aoti_torch_cpu_addmm_out(out.get(), out.get(), left.get(), right.get(), beta, kAlpha));
#endif
  }

 private:
  // MKL cuts a product by the threads that it may have, also where it gets but one, and each cut
  // rounds in its own way. While this lives, it has one.
  struct OneThread {
#if !defined(USE_CUDA) && defined(__linux__)
    const int before = MKL_Set_Num_Threads_Local ? MKL_Set_Num_Threads_Local(1) : 0;
    ~OneThread() {
      if (MKL_Set_Num_Threads_Local) MKL_Set_Num_Threads_Local(before);
    }
#endif
  };

  template <typename T>
  Tensor tensor_of(const Matrix<T>& matrix) const {
    constexpr bool kFloat = std::is_same_v<std::remove_const_t<T>, float>;
    auto* data = const_cast<std::remove_const_t<T>*>(matrix.data);
    return torch::stable::from_blob(data, {matrix.rows, matrix.columns},
                                    {matrix.row_stride, matrix.column_stride}, device_,
                                    kFloat ? ScalarType::Float : ScalarType::Double);
  }

  torch::stable::Device device_;
};

}  // namespace ksm
