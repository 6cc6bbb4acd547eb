// ferkd._C: the CPU implementations of the operators whose schemas ferkd/ops.py defines, on PyTorch's stable ABI.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>

#include "arguments.h"
#include "crops.h"
#include "loss_cpu.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using namespace ferkd;
using cpu::AdaptedLabels;
using cpu::Dtype;
using cpu::LossJob;

// Memory for a batch's labels and losses, in one piece: B and k decide how much, and none of it needs a first value.
class Workspace {
 public:
  Workspace(int64_t rows, int64_t k) : memory_(new double[size_t(rows * (4 + k) + (rows * k + 1) / 2)]) {
    double* at = memory_.get();
    const auto take = [&at](int64_t doubles) { return std::exchange(at, at + doubles); };
    row_loss = take(rows);
    labels.mass = take(rows);
    labels.base = take(rows);
    labels.deltas = take(rows * k);
    labels.ids = reinterpret_cast<int32_t*>(take((rows * k + 1) / 2));
    labels.count = reinterpret_cast<int32_t*>(at);
    labels.region = reinterpret_cast<int8_t*>(labels.count + rows);
    labels.fault = reinterpret_cast<Fault*>(labels.region + rows);
  }
  double* row_loss;  // [B]
  AdaptedLabels labels{};

 private:
  std::unique_ptr<double[]> memory_;
};

// Unpacks, checks and adapts every row; throws std::invalid_argument for the first row with wrong data.
void adapt(const LabelJob& job, bool is_double, const AdaptedLabels& labels) {
  const auto adapt_rows = is_double ? cpu::adapt_rows<double> : cpu::adapt_rows<float>;
  // A second thread costs as much to wake as some hundred rows to adapt; powers make a row ten times as long.
  const int64_t grain = std::max<int64_t>(1, (job.temperature == 1.0 ? 2048 : 256) / job.k);
  torch::stable::parallel_for(0, job.rows, grain, [&](int64_t begin, int64_t end) { adapt_rows(job, labels, begin, end); });
  for (int64_t b = 0; b < job.rows; ++b) {  // an exception inside the loop would reach the caller as a RuntimeError
    if (labels.fault[b] != Fault::NONE) refuse(job, b, labels.fault[b], b);
  }
}

double mixed_mass(const LabelJob& job, const AdaptedLabels& labels, int64_t b) {
  cpu::Share shares[2];
  const int parts = cpu::shares_of(job, b, shares);
  double total = 0;
  for (int s = 0; s < parts; ++s) total += shares[s].weight * labels.mass[shares[s].row];
  return total;
}

// A new tensor beside another. torch::stable::new_empty would look its operator up by name in each call, which takes longer than this.
Tensor make(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType dtype) {
  int32_t wanted = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  AtenTensorHandle made = nullptr;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_aten_new_empty(like.get(), sizes.begin(), int64_t(sizes.size()), &wanted, nullptr, nullptr, 0, nullptr, &made));
  return Tensor(made);
}

Dtype dtype_of(const Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case ScalarType::Double:
      return Dtype::FLOAT64;
    case ScalarType::Float:
      return Dtype::FLOAT32;
    case ScalarType::BFloat16:
      return Dtype::BFLOAT16;
    case ScalarType::Half:
      return Dtype::FLOAT16;
    default:
      throw std::invalid_argument(std::string(name) + ": this dtype is not supported; give float32, float64, bfloat16 or float16");
  }
}

double scalar_of(const Tensor& tensor) {
  require(tensor.dim() == 0, "normalizer, upstream: they must be 0-dim");
  return double(*tensor.const_data_ptr<float>());
}

template <typename A>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> loss_as(const Tensor& logits, const LabelJob& labels, const std::optional<Tensor>& normalizer,
                                                           const std::optional<Tensor>& upstream, Dtype dtype, const std::string& reduction,
                                                           bool tau_squared, bool with_grad, bool stats) {
  const int64_t B = logits.size(0), C = logits.size(1);
  const ScalarType wide = std::is_same_v<A, double> ? ScalarType::Double : ScalarType::Float;
  const Workspace workspace(B, labels.k);
  adapt(labels, dtype == Dtype::FLOAT64, workspace.labels);

  double scale = tau_squared ? labels.temperature * labels.temperature : 1.0;
  if (reduction == "mean") {
    double total = 0;
    if (normalizer) {
      total = scalar_of(*normalizer);
    } else {
      for (int64_t b = 0; b < B; ++b) total += mixed_mass(labels, workspace.labels, b);
    }
    scale = total == 0.0 ? 0.0 : scale / total;  // every row discarded: 0, never 0/0
  }

  Tensor loss = reduction == "none" ? make(logits, {B}, wide) : make(logits, {}, wide);
  Tensor grad = with_grad ? make(logits, {B, C}, logits.scalar_type()) : make(logits, {0}, logits.scalar_type());
  Tensor region = make(logits, {stats ? B : 0}, ScalarType::Char);
  Tensor correct = make(logits, {stats ? B : 0}, ScalarType::Bool);
  Tensor logsumexp = make(logits, {stats ? B : 0}, wide);

  LossJob job{};
  job.dtype = dtype;
  job.logits = logits.const_data_ptr();
  job.row_stride = logits.stride(0);
  job.rows = B;
  job.classes = C;
  job.temperature = labels.temperature;
  job.loss_scale = scale;
  job.grad_scale = scale / labels.temperature * (upstream ? scalar_of(*upstream) : 1.0);
  job.labels = &labels;
  job.adapted = &workspace.labels;
  job.row_loss = workspace.row_loss;
  job.grad = with_grad ? grad.mutable_data_ptr() : nullptr;
  job.correct = stats ? static_cast<bool*>(correct.mutable_data_ptr()) : nullptr;
  job.logsumexp = stats ? logsumexp.mutable_data_ptr() : nullptr;
  const cpu::RowsKernel kernel = cpu::rows_kernel(dtype, cpu::chosen_isa());
  const int64_t grain = std::max<int64_t>(1, 65536 / (C + 256));  // some microseconds of work; few classes do not make a row free
  torch::stable::parallel_for(0, B, grain, [&](int64_t begin, int64_t end) { kernel(job, begin, end); });

  if (stats) std::copy_n(workspace.labels.region, B, static_cast<int8_t*>(region.mutable_data_ptr()));
  A* loss_out = static_cast<A*>(loss.mutable_data_ptr());
  if (reduction == "none") {
    for (int64_t b = 0; b < B; ++b) loss_out[b] = A(workspace.row_loss[b]);
  } else {
    double total = 0;  // in row order, whatever the threads did: the scalar is deterministic
    for (int64_t b = 0; b < B; ++b) total += workspace.row_loss[b];
    loss_out[0] = A(total);
  }
  return {loss, grad, region, correct, logsumexp};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> loss_cpu(
    Tensor logits, Tensor labels, std::optional<Tensor> probs, Tensor target, std::optional<Tensor> partner, std::optional<Tensor> lam,
    std::optional<Tensor> normalizer, std::optional<Tensor> upstream, std::string codec, int64_t k, double discard_below,
    double calibrate_below, double discard_above, double smoothing, std::string confidence, double temperature, std::string tail,
    std::string reduction, bool tau_squared, bool with_grad, bool stats, [[maybe_unused]] bool validate) {
  require_layout(logits, labels, probs, target, partner, lam, codec, k);
  const LabelJob job = label_job(labels, probs, target, partner, lam, codec, k, logits.size(1), discard_below, calibrate_below,
                                 discard_above, smoothing, confidence, temperature, tail);
  const Dtype dtype = dtype_of(logits, "logits");
  const auto run = dtype == Dtype::FLOAT64 ? loss_as<double> : loss_as<float>;
  return run(logits, job, normalizer, upstream, dtype, reduction, tau_squared, with_grad, stats);
}

// grad [B, C] times upstream, 0-dim or [B] of the loss's dtype, in place.
void scale_(Tensor grad, Tensor upstream) {
  const int64_t B = grad.size(0), C = grad.size(1);
  const ScalarType wide = grad.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  require(grad.is_contiguous(), "grad: it must be contiguous");
  require(upstream.scalar_type() == wide && (upstream.dim() == 0 || (upstream.dim() == 1 && upstream.size(0) == B)),
          "upstream: it must be of the loss's dtype and shape");
  const Tensor factors = torch::stable::contiguous(upstream);  // the gradient of a sum over rows is an expanded scalar
  const cpu::ScaleJob job{grad.mutable_data_ptr(), C, factors.const_data_ptr(), upstream.dim() == 1};
  if (!job.one_per_row && (wide == ScalarType::Double ? *static_cast<const double*>(job.upstream) == 1.0
                                                      : *static_cast<const float*>(job.upstream) == 1.0f)) {
    return;
  }
  const cpu::ScaleKernel kernel = cpu::scale_kernel(dtype_of(grad, "grad"), cpu::chosen_isa());
  torch::stable::parallel_for(0, B, std::max<int64_t>(1, 32768 / std::max<int64_t>(C, 1)),
                              [&](int64_t begin, int64_t end) { kernel(job, begin, end); });
}

std::string cpu_isa() { return cpu::chosen_isa(); }

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ferkd, CPU, m) {
  m.impl("loss_cpu", TORCH_BOX(&loss_cpu));
  m.impl("scale_", TORCH_BOX(&scale_));
}
STABLE_TORCH_LIBRARY_IMPL(ferkd, CompositeExplicitAutograd, m) { m.impl("cpu_isa", TORCH_BOX(&cpu_isa)); }

namespace {

// Boxes for readers of stores, as Python functions: an operator's call takes longer than the few boxes of a visit. Arrays come and go as bytes,
// which Python 3.10's limited API knows; what comes back is boxes [n, 4] int32 and then flips [n] uint8.
PyObject* boxes_and_flips(Py_ssize_t n, const auto& box_of) {
  PyObject* made = PyByteArray_FromStringAndSize(nullptr, n * Py_ssize_t(sizeof(crops::Box) + 1));
  if (made == nullptr) return nullptr;
  char* boxes = PyByteArray_AsString(made);
  char* flips = boxes + n * Py_ssize_t(sizeof(crops::Box));
  for (Py_ssize_t i = 0; i < n; ++i) {
    bool flip = false;
    const crops::Box box = box_of(i, flip);
    std::memcpy(boxes + i * Py_ssize_t(sizeof box), &box, sizeof box);
    flips[i] = char(flip);
  }
  return made;
}

// draw_crops(settings: bytes, image, numbers: bytes of int64, below, width, height): the crops of these numbers, all from 0 to below - 1.
PyObject* draw_crops(PyObject*, PyObject* arguments) {
  const char *settings_bytes, *numbers;
  Py_ssize_t settings_size, numbers_size;
  long long image, below, width, height;
  if (!PyArg_ParseTuple(arguments, "y#Ly#LLL", &settings_bytes, &settings_size, &image, &numbers, &numbers_size, &below, &width, &height)) {
    return nullptr;
  }
  constexpr long long most = 1ll << 32;
  const Py_ssize_t n = numbers_size / Py_ssize_t(sizeof(int64_t));
  bool good = settings_size == 8 * Py_ssize_t(crops::Settings::WORDS) && numbers_size % Py_ssize_t(sizeof(int64_t)) == 0 && image >= 0 &&
              image < most && below <= most && width >= 1 && width <= 32767 && height >= 1 && height <= 32767;
  const auto number = [numbers](Py_ssize_t i) {
    int64_t value;
    std::memcpy(&value, numbers + i * Py_ssize_t(sizeof value), sizeof value);
    return value;
  };
  for (Py_ssize_t i = 0; good && i < n; ++i) good = number(i) >= 0 && number(i) < below;
  if (!good) {
    PyErr_SetString(PyExc_ValueError, "draw_crops: a number is out of range");
    return nullptr;
  }
  const crops::Settings settings(settings_bytes);
  return boxes_and_flips(n, [&](Py_ssize_t i, bool& flip) {
    return crops::draw(settings, uint32_t(image), uint32_t(number(i)), uint64_t(width), uint64_t(height), flip);
  });
}

// unpack_boxes(words: bytes of uint64): stored boxes.
PyObject* unpack_boxes(PyObject*, PyObject* arguments) {
  const char* words;
  Py_ssize_t size;
  if (!PyArg_ParseTuple(arguments, "y#", &words, &size)) return nullptr;
  if (size % Py_ssize_t(sizeof(uint64_t)) != 0) {
    PyErr_SetString(PyExc_ValueError, "unpack_boxes: the number of bytes is out of range");
    return nullptr;
  }
  return boxes_and_flips(size / Py_ssize_t(sizeof(uint64_t)), [&](Py_ssize_t i, bool& flip) {
    uint64_t word;
    std::memcpy(&word, words + i * Py_ssize_t(sizeof word), sizeof word);
    return crops::unpack(word, flip);
  });
}

PyMethodDef functions[] = {
    {"draw_crops", draw_crops, METH_VARARGS, nullptr},
    {"unpack_boxes", unpack_boxes, METH_VARARGS, nullptr},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace

// Importing the module is what registers the operators above.
extern "C" __attribute__((visibility("default"))) PyObject* PyInit__C(void) {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", "ferkd's CPU operators", 0, functions, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
