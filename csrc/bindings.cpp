// ksm_ext._arithmetic: the arithmetic of one value that the kernels of both devices share, as NumPy
// functions, for the tests. The package does without: wheels serve every Python, and pybind11 knows
// no limited API.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include "logistic.h"
#include "series.h"

namespace {

template <typename T>
void bind(pybind11::module_& m) {
  m.def("exp_of_minus", pybind11::vectorize(ksm::exp_of_minus<T>));
  m.def("log_of_one_plus", pybind11::vectorize(ksm::log_of_one_plus<T>));
  m.def("logistic_loss", pybind11::vectorize([](T z) { return ksm::logistic_of(z).loss; }));
  m.def("logistic_slope", pybind11::vectorize([](T z) { return ksm::logistic_of(z).slope; }));
  m.def("logistic_curvature",
        pybind11::vectorize([](T z) { return ksm::logistic_of(z).curvature; }));
}

}  // namespace

PYBIND11_MODULE(_arithmetic, m) {
  m.doc() = "The arithmetic of one value, on arrays of float32 or float64.";
  bind<float>(m);
  bind<double>(m);
}
