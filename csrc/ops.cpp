// The schemas. Each device registers its implementations beside their code; fakes are in Python.
#include <Python.h>

#include <torch/csrc/stable/library.h>

#include "cpu/simd.h"

STABLE_TORCH_LIBRARY(tokenexit, m) {
  m.def("pack_tokens(Tensor mask, Tensor word_ids) -> (Tensor, Tensor, Tensor)");
  m.def(
      "exit_decision(Tensor logits, Tensor words, Tensor uncertainty, Tensor exit_layer, "
      "Tensor cu_words, Tensor window, Tensor threshold, int layer, bool max_prob, "
      "Tensor? min_active=None) "
      "-> (Tensor, Tensor)");
  m.def(
      "compact_active(Tensor active, Tensor cu_active, Tensor word_of_token, Tensor exit_layer, "
      "Tensor? cu_tokens=None, Tensor(a!)? scratch=None) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "exit_attention(Tensor q, Tensor k, Tensor v, Tensor cu_q, Tensor cu_k, float scale, "
      "Tensor? bias, Tensor? positions, float dropout_p, int seed, int max_length) "
      "-> (Tensor, Tensor)");
  m.def(
      "exit_attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
      "Tensor cu_q, Tensor cu_k, float scale, Tensor? bias, Tensor? positions, float dropout_p, "
      "int seed, int max_length) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "absorbed_attention(Tensor q, Tensor h, Tensor cu_q, Tensor cu_k, float scale, Tensor? bias, "
      "Tensor? positions, int max_length) -> Tensor");
  m.def(
      "add_layer_norm(Tensor x, Tensor residual, Tensor weight, Tensor bias, float eps) "
      "-> (Tensor, Tensor, Tensor)");
  m.def("linear(Tensor x, Tensor weight, Tensor bias) -> Tensor");
  m.def("bias_gelu(Tensor x, Tensor bias, bool tanh=False) -> Tensor");
  m.def(
      "exit_layer(Tensor h, Tensor active, Tensor cu_active, Tensor cu_tokens, Tensor[] weights, "
      "Tensor[] scales, float[] costs, int heads, float scale, float eps, bool pre_norm, bool tanh, "
      "Tensor? bias, Tensor? positions) -> Tensor");
  m.def(
      "exit_loop(Tensor h, Tensor positions, Tensor cu_tokens, Tensor cu_words, "
      "Tensor word_of_token, Tensor word_at, Tensor[] weights, Tensor[] scales, "
      "Tensor[] classifiers, float[] costs, int heads, float scale, float[] eps, Tensor window, "
      "Tensor min_active, Tensor threshold, bool max_prob, bool tanh, Tensor? bias, Tensor? exit_layer) "
      "-> (Tensor, Tensor)");
}

// A module with no functions: importing it loads this library, and loading registers the ops. It says
// which instruction sets the processor has, and which of them the ops on the CPU take.
PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr};
  PyObject* result = PyModule_Create(&module);
  if (!result) return nullptr;
  PyObject* names = PyList_New(0);
  for (int i = 0; names && i < tokenexit::NUM_CPUS; ++i) {
    if (!tokenexit::has(static_cast<tokenexit::Cpu>(i))) continue;
    PyObject* name = PyUnicode_FromString(tokenexit::CPU_NAMES[i]);
    if (!name || PyList_Append(names, name)) Py_CLEAR(names);
    Py_XDECREF(name);
  }
  const char* taken = tokenexit::CPU_NAMES[static_cast<int>(tokenexit::cpu())];
  if (!names || PyModule_AddStringConstant(result, "instruction_set", taken) ||
      PyModule_AddObjectRef(result, "instruction_sets", names)) {
    Py_CLEAR(result);
  }
  Py_XDECREF(names);
  return result;
}
