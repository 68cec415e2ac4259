// The module ksm_ext._C: importing it loads this library, which registers the operators (ops.cpp) and
// their CPU kernels. Its names are the facts of this build, as setup.py and the compiler knew them; no
// tensor passes here. It keeps to Python's limited API, so that one binary serves every Python.
#include <Python.h>

#include <exception>

#include "cpu/isa.h"

namespace {

const char* compiler() {
#if defined(__clang__)
  return "clang " __clang_version__;
#elif defined(__GNUC__)
  return "gcc " __VERSION__;
#else
  return "unknown";
#endif
}

PyObject* cpu_instruction_set(PyObject*, PyObject*) {
  try {
    return PyUnicode_FromString(ksm::name_of(ksm::cpu_isa()));
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
    return nullptr;
  }
}

bool add_facts(PyObject* module) {
  return PyModule_AddStringConstant(module, "torch_version", KSM_TORCH_VERSION) == 0 &&
         PyModule_AddStringConstant(module, "nvcc_version", KSM_NVCC_VERSION) == 0 &&
         PyModule_AddStringConstant(module, "cuda_architectures", KSM_CUDA_ARCHITECTURES) == 0 &&
         PyModule_AddStringConstant(module, "compiler", compiler()) == 0;
}

}  // namespace

PyMODINIT_FUNC PyInit__C() {
  static PyMethodDef methods[] = {
      {"cpu_instruction_set", cpu_instruction_set, METH_NOARGS,
       "The instruction set in use on this CPU: avx512, avx2 or portable."},
      {nullptr, nullptr, 0, nullptr}};
  static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C", "Facts of this build.", -1,
                                   methods};
  PyObject* module = PyModule_Create(&definition);
  if (module && !add_facts(module)) {
    Py_DECREF(module);
    return nullptr;
  }
  return module;
}
