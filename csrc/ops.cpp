// The schemas. Each device registers its implementations beside their code; fakes are in Python.
#include <Python.h>

#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(tokenexit, m) {
  m.def(
      "exit_decision(Tensor logits, Tensor words, Tensor uncertainty, Tensor exit_layer, "
      "Tensor cu_words, Tensor window, Tensor threshold, int layer, bool max_prob) "
      "-> (Tensor, Tensor)");
  m.def(
      "compact_active(Tensor active, Tensor cu_active, Tensor word_of_token, Tensor exit_layer) "
      "-> (Tensor, Tensor)");
}

// An empty module: importing it loads this library, and loading registers the ops.
PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr};
  return PyModule_Create(&module);
}
