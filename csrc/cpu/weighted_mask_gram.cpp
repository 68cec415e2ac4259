// Gram matrices of weighted distances between packed masks on the CPU.
#include "weighted_mask_gram.h"

#include <torch/csrc/stable/library.h>

#include <vector>
#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

#include "cpu/mask_gram_drivers.h"

namespace ksm {
namespace {

// While it lives, this thread takes subnormal numbers as zero, and makes none; see mask_weights.h.
class SubnormalsAreZero {
#if defined(__x86_64__)
 public:
  explicit SubnormalsAreZero(bool wanted) : before_(_mm_getcsr()) {
    if (wanted) _mm_setcsr(before_ | kFlushToZero | kDenormalsAreZero);
  }
  ~SubnormalsAreZero() { _mm_setcsr(before_); }

 private:
  static constexpr unsigned kFlushToZero = 0x8000, kDenormalsAreZero = 0x0040;
  const unsigned before_;
#else
 public:
  explicit SubnormalsAreZero(bool) {}
#endif
};

// The Gram matrix by tiles, see GramTiles. The side that stays from tile to tile is spread over the
// lanes, and a thread keeps it: columns in a row-major tile, rows in a transposed one.
template <typename T>
class WeightedTiles {
 public:
  class Scratch {
   public:
    // The terms of `masks` for some nibbles, spread over the lanes.
    const T* spread(const WeightedTiles& gram, const uint64_t* masks, int64_t count,
                    Range nibbles) {
      if (masks != masks_ || nibbles.begin != first_) {
        terms_.resize(std::max<size_t>(terms_.size(), nibbles.size()));
        gram.kernels_.spread_nibbles(gram.tables_.data(), masks, count, gram.words_, nibbles,
                                     terms_[0].values);
        masks_ = masks;
        first_ = nibbles.begin;
      }
      return terms_[0].values;
    }

   private:
    struct alignas(64) Nibble {
      T values[kNibbleValues * kTileRows];
    };
    std::vector<Nibble> terms_;
    const uint64_t* masks_ = nullptr;  // whose they are
    int64_t first_ = 0;                // and of which nibbles
  };

  WeightedTiles(const uint64_t* x,  // (m, words)
                const uint64_t* y,  // (l, words)
                int64_t l, int64_t n, MaskKernel kernel, const T* weights,
                const T* x_factors,  // (m), or null
                const T* y_factors)  // (l), or null
      : blocks{l},
        kernel_(kernel),
        x_(x),
        y_(y),
        x_factors_(x_factors),
        y_factors_(y_factors),
        words_(words_of(n)),
        nibbles_(nibbles_of(n)) {
    for (int64_t p = 0; p < nibbles_; ++p) {
      for (int64_t bits = 0; bits < kNibbleValues; ++bits) {
        tables_.push_back(nibble_term(kernel, weights, n, p, bits));
      }
    }
  }

  template <Layout kLayout>
  void fill(int64_t i, int64_t rows, int64_t b, T* tile, Scratch& scratch) const {
    const int64_t j = b * kBlockColumns, columns = blocks.columns(b);
    if constexpr (kLayout == Layout::kRowMajor) {
      fill(y_ + j * words_, columns, y_factors_ ? y_factors_ + j : nullptr, x_ + i * words_, rows,
           x_factors_ ? x_factors_ + i : nullptr, tile, scratch);
    } else {
      fill(x_ + i * words_, rows, x_factors_ ? x_factors_ + i : nullptr, y_ + j * words_, columns,
           y_factors_ ? y_factors_ + j : nullptr, tile, scratch);
    }
  }

  static constexpr int64_t kPanels = 8;  // spread terms serve a panel: it should be large
  const BlockSizes blocks;

 private:
  // Of more tasks than these nibbles hold, the terms are spread anew for every tile.
  static constexpr int64_t kNibblesAtOnce = 16 * kNibblesPerWord;

  void fill(const uint64_t* lanes, int64_t lane_count, const T* lane_factors,
            const uint64_t* others, int64_t count, const T* factors,
            T* tile,  // (kBlockColumns, kTileRows): others, lanes
            Scratch& scratch) const {
    if (nibbles_ == 0) std::fill_n(tile, count * kTileRows, T(kernel_ == MaskKernel::kRbf));
    for (int64_t first = 0; first < nibbles_; first += kNibblesAtOnce) {
      const Range nibbles = {first, std::min(first + kNibblesAtOnce, nibbles_)};
      const T* spread = scratch.spread(*this, lanes, lane_count, nibbles);
      const SubnormalsAreZero mode(kernel_ == MaskKernel::kRbf);
      kernels_.join_nibbles(kernel_, spread, others, count, words_, nibbles, first == 0, tile);
    }
    kernels_.finish_values(kernel_, count * kTileRows, tile);
    if (!factors) return;
    for (int64_t j = 0; j < count; ++j) {
      kernels_.scale_by_product(factors[j], lane_factors, lane_count, tile + j * kTileRows);
    }
  }

  const RealKernels<T>& kernels_ = cpu_kernels().of<T>();
  const MaskKernel kernel_;
  const uint64_t *x_, *y_;
  const T *x_factors_, *y_factors_;
  const int64_t words_, nibbles_;
  std::vector<T> tables_;  // (nibbles, kNibbleValues)
};

// exp_of_minus is of distances, which are at least 0. On the GPU weights are not looked at: the answer
// would have to be waited for.
template <typename T>
void check_weights(const T* weights, int64_t n) {
  for (int64_t k = 0; k < n; ++k) {
    STD_TORCH_CHECK(weights[k] >= 0, "weights must be at least 0, got ", weights[k], " at ", k,
                    ". Pass the distance that each task adds.");
  }
}

Tensor weighted_mask_gram_cpu(const Tensor& x, const MaybeTensor& maybe_y, int64_t num_tasks,
                              const Tensor& weights, int64_t kernel, const MaybeTensor& x_factors,
                              const MaybeTensor& y_factors) {
  const Tensor& y = maybe_y ? *maybe_y : x;
  const GramSizes sizes = checked_weighted_sizes(x, y, num_tasks, weights, kernel);
  check_factors(x_factors, y_factors, maybe_y, sizes, weights);
  check_last_words(x, "x", sizes.n);
  check_last_words(y, "y", sizes.n);
  Tensor out = torch::stable::new_empty(weights, {sizes.m, sizes.l});
  for_dtype(weights.scalar_type(), [&](auto type) {
    using T = decltype(type);
    const T* w = weights.const_data_ptr<T>();
    check_weights(w, sizes.n);
    if (sizes.m == 0 || sizes.l == 0) return;
    const T* a = pointer_of<T>(x_factors);
    const WeightedTiles<T> gram(words_pointer(x), words_pointer(y), sizes.l, sizes.n,
                                static_cast<MaskKernel>(kernel), w, a,
                                maybe_y ? pointer_of<T>(y_factors) : a);
    write_gram(gram, !maybe_y, sizes.m, sizes.l, out.mutable_data_ptr<T>());
  });
  return out;
}

Tensor weighted_mask_gram_matmul_cpu(const Tensor& x, const MaybeTensor& maybe_y, int64_t num_tasks,
                                     const Tensor& weights, int64_t kernel, const Tensor& v) {
  const Tensor& y = maybe_y ? *maybe_y : x;
  const GramSizes sizes = checked_weighted_sizes(x, y, num_tasks, weights, kernel);
  check_multiplied(v, x, sizes.l, weights.scalar_type());
  check_last_words(x, "x", sizes.n);
  check_last_words(y, "y", sizes.n);
  const int64_t t = v.size(1);
  Tensor out = torch::stable::new_empty(weights, {sizes.m, t});
  for_dtype(weights.scalar_type(), [&](auto type) {
    using T = decltype(type);
    const T* w = weights.const_data_ptr<T>();
    check_weights(w, sizes.n);
    if (sizes.m == 0 || t == 0) return;
    const WeightedTiles<T> gram(words_pointer(x), words_pointer(y), sizes.l, sizes.n,
                                static_cast<MaskKernel>(kernel), w, nullptr, nullptr);
    multiply_gram(gram, !maybe_y, sizes.m, sizes.l, v.const_data_ptr<T>(), t,
                  out.mutable_data_ptr<T>());
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ksm_ext, CPU, m) {
  m.impl("weighted_mask_gram", TORCH_BOX(&weighted_mask_gram_cpu));
  m.impl("weighted_mask_gram_matmul", TORCH_BOX(&weighted_mask_gram_matmul_cpu));
}

}  // namespace ksm
