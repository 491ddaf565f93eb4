// The schemas. Each device registers its implementations beside their code; fakes are in Python.
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <vector>

#include <torch/csrc/stable/library.h>

#include "cpu/simd.h"

STABLE_TORCH_LIBRARY(tokenexit, m) {
  m.def("pack_tokens(Tensor mask, Tensor word_ids) -> (Tensor, Tensor, Tensor)");
  m.def(
      "pack_rows(Tensor mask, Tensor ids, Tensor? word_ids, Tensor kinds, Tensor? types, "
      "Tensor? positions, int num_ids, int num_types, int num_positions, int most) "
      "-> (Tensor, Tensor, Tensor)");
  m.def(
      "embed(Tensor ids, Tensor positions, Tensor? types, Tensor word, Tensor? position, "
      "Tensor? token_type, Tensor? scale=None) -> Tensor");
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
      "Tensor[] turned, Tensor[] classifiers, int neighbor_heads, float[] costs, int heads, "
      "float scale, float[] eps, Tensor window, Tensor min_active, Tensor threshold, "
      "bool max_prob, bool tanh, Tensor? bias, Tensor? exit_layer) -> (Tensor, Tensor, Tensor)");
}

namespace {

// An object; of a dictionary, how many it has, else -1.
struct Fact {
  PyObject* object;
  Py_ssize_t size;
};

// Whether see(object) gives true of all that these modules are: their classes, their attributes, and
// what is in their parameters, buffers and modules with its class, which `torch.utils.swap_tensors`
// changes; null ends each of these. Of the first, a whole model, attributes come and go: they are left
// out. False of a module that keeps its tensors elsewhere.
template <class See>
bool look(PyObject* modules, const See& see) {
  static PyObject* const inner[] = {
      PyUnicode_InternFromString("_parameters"), PyUnicode_InternFromString("_buffers"),
      PyUnicode_InternFromString("_modules")};
  const auto type = [](PyObject* x) { return reinterpret_cast<PyObject*>(Py_TYPE(x)); };
  const auto all = [&](PyObject* dict, bool typed) {
    PyObject *name, *value;
    for (Py_ssize_t at = 0; PyDict_Next(dict, &at, &name, &value);) {
      if (!see(name) || !see(value) || (typed && !see(type(value)))) return false;
    }
    return see(nullptr);
  };
  const Py_ssize_t count = PyList_Size(modules);
  for (Py_ssize_t i = 0; i < count; ++i) {
    PyObject* module = PyList_GetItem(modules, i);
    PyObject* own = PyObject_GenericGetDict(module, nullptr);
    if (!own) return false;
    Py_DECREF(own);  // the module has it
    if (!see(type(module)) || (i > 0 && !(see(own) && all(own, false)))) return false;
    for (PyObject* name : inner) {
      PyObject* held = PyDict_GetItemWithError(own, name);
      if (!held || !PyDict_Check(held) || !all(held, true)) return false;
    }
  }
  return true;
}

// facts(modules): what they are; None if that can't be told. A list that keeps the objects, so that no
// other is where one was, and `Fact` after `Fact`.
PyObject* facts(PyObject*, PyObject* modules) {
  if (!PyList_Check(modules)) return PyErr_Format(PyExc_TypeError, "facts: expected a list");
  PyObject* kept = PyList_New(0);
  std::vector<Fact> found;
  const bool told = kept && look(modules, [&](PyObject* x) {
    found.push_back({x, x && PyDict_Check(x) ? PyDict_Size(x) : -1});
    return !x || PyList_Append(kept, x) == 0;
  });
  PyObject* result = nullptr;
  if (told) {
    const auto* bytes = reinterpret_cast<const char*>(found.data());
    result = Py_BuildValue("(Oy#)", kept, bytes, Py_ssize_t(found.size() * sizeof(Fact)));
  } else {
    PyErr_Clear();
    result = Py_NewRef(Py_None);
  }
  Py_XDECREF(kept);
  return result;
}

constexpr Py_ssize_t AHEAD = 64;  // facts; layers have pushed their objects out of the caches

// are(modules, facts): whether they are so still.
PyObject* are(PyObject*, PyObject* args) {
  PyObject *modules, *kept;
  const char* bytes;
  Py_ssize_t size;
  if (!PyArg_ParseTuple(args, "O(Oy#)", &modules, &kept, &bytes, &size)) return nullptr;
  if (!PyList_Check(modules)) return PyErr_Format(PyExc_TypeError, "are: expected a list");
  const auto* fact = reinterpret_cast<const Fact*>(bytes);
  const auto* end = fact + size / sizeof(Fact);
  const bool same = look(modules, [&](PyObject* x) {
    __builtin_prefetch(end - fact > AHEAD ? fact[AHEAD].object : nullptr);
    if (fact == end || fact->object != x || (fact->size >= 0 && PyDict_Size(x) != fact->size)) {
      return false;
    }
    ++fact;
    return true;
  });
  if (PyErr_Occurred()) PyErr_Clear();
  return PyBool_FromLong(same && fact == end);
}

}  // namespace

// Importing the module loads this library, and loading registers the ops. It says which instruction
// sets the processor has, and which of them the ops on the CPU take.
PyMODINIT_FUNC PyInit__C() {
  static PyMethodDef functions[] = {
      {"facts", facts, METH_O, nullptr}, {"are", are, METH_VARARGS, nullptr}, {}};
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, functions};
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
