// ferkd._C: the CPU implementations of the operators whose schemas ferkd/ops.py defines, on PyTorch's stable ABI.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <Python.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "loss_cpu.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using namespace ferkd;
using cpu::AdaptedLabels;
using cpu::Dtype;
using cpu::LabelJob;
using cpu::LossJob;

// The labels of an operator call; ops.py has checked shapes and dtypes and made every tensor but the logits contiguous.
LabelJob label_job(const Tensor& labels, const std::optional<Tensor>& probs, const Tensor& target, const std::optional<Tensor>& partner,
                   const std::optional<Tensor>& lam, const std::string& codec, int64_t k, int64_t classes, double discard_below,
                   double calibrate_below, double discard_above, double smoothing, const std::string& confidence, double temperature,
                   const std::string& tail) {
  LabelJob job{};
  job.codec = codec == "pairs" ? Codec::PAIRS : codec == "half" ? Codec::HALF : Codec::PACKED;
  if (job.codec == Codec::PAIRS) {
    job.ids = labels.const_data_ptr<int64_t>();
    job.probs = probs->const_data_ptr();
    job.probs_are_double = probs->scalar_type() == ScalarType::Double;
  } else {
    job.words = reinterpret_cast<const uint32_t*>(labels.const_data_ptr<int32_t>());
    job.width = labels.size(1);
  }
  job.k = int(k);
  job.target = target.const_data_ptr<int64_t>();
  job.partner = partner ? partner->const_data_ptr<int64_t>() : nullptr;
  job.lam = lam ? lam->const_data_ptr<float>() : nullptr;
  job.rows = labels.size(0);
  job.classes = classes;
  job.policy = {discard_below, calibrate_below, discard_above, smoothing, confidence == "target"};
  job.temperature = temperature;
  job.renorm = tail == "renorm";
  return job;
}

double probability_at(const LabelJob& job, int64_t b, int j) {
  if (job.codec == Codec::PAIRS) {
    return job.probs_are_double ? static_cast<const double*>(job.probs)[b * job.k + j] : static_cast<const float*>(job.probs)[b * job.k + j];
  }
  int64_t ids[MAX_K];
  float probs[MAX_K];
  (job.codec == Codec::HALF ? unpack_half : unpack_packed)(job.words + b * job.width, job.k, job.classes, ids, probs);
  return probs[j];
}

int64_t id_at(const LabelJob& job, int64_t b, int j) {
  if (job.codec == Codec::PAIRS) return job.ids[b * job.k + j];
  int64_t ids[MAX_K];
  float probs[MAX_K];
  (job.codec == Codec::HALF ? unpack_half : unpack_packed)(job.words + b * job.width, job.k, job.classes, ids, probs);
  return ids[j];
}

[[noreturn]] void refuse(const LabelJob& job, int64_t b, Fault fault) {
  const std::string row = " in row " + std::to_string(b), classes = std::to_string(job.classes);
  if (fault == Fault::ID || fault == Fault::PROBABILITY) {
    for (int j = 0; j < job.k; ++j) {
      const int64_t id = id_at(job, b, j);
      if (id < 0 || id >= job.classes) {
        throw std::invalid_argument("labels: class id " + std::to_string(id) + row + ", but the logits have " + classes + " classes (0 to " +
                                    std::to_string(job.classes - 1) + ")");
      }
      const double p = probability_at(job, b, j);
      if (!(p >= 0.0 && p <= 1.0)) {
        throw std::invalid_argument("labels: probability " + std::to_string(p) + row + "; every probability must be from 0 to 1");
      }
    }
  }
  if (fault == Fault::TARGET) {
    throw std::invalid_argument("target: class id " + std::to_string(job.target[b]) + row + ", but the logits have " + classes +
                                " classes (0 to " + std::to_string(job.classes - 1) + ")");
  }
  if (fault == Fault::PARTNER) {
    throw std::invalid_argument("mix: partner " + std::to_string(job.partner[b]) + row + ", but the batch has " + std::to_string(job.rows) +
                                " rows");
  }
  throw std::invalid_argument("mix: lam " + std::to_string(job.lam[b]) + row + "; every lam must be from 0 to 1");
}

// The adapted labels of a batch and the memory they lie in.
template <typename A>
struct Adapted {
  std::vector<A> mass, base, deltas;
  std::vector<int32_t> count, ids;
  std::vector<int8_t> region;
  std::vector<Fault> fault;
  AdaptedLabels<A> view{};

  // Unpacks, checks and adapts every row; throws std::invalid_argument for the first row with wrong data.
  explicit Adapted(const LabelJob& job)
      : mass(job.rows), base(job.rows), deltas(job.rows * job.k), count(job.rows), ids(job.rows * job.k), region(job.rows), fault(job.rows) {
    view = {mass.data(), base.data(), count.data(), region.data(), ids.data(), deltas.data(), fault.data()};
    const int64_t grain = std::max<int64_t>(1, 4096 / job.k);
    torch::stable::parallel_for(0, job.rows, grain, [&](int64_t begin, int64_t end) { cpu::adapt_rows<A>(job, view, begin, end); });
    for (int64_t b = 0; b < job.rows; ++b) {  // an exception inside the loop would reach the caller as a RuntimeError
      if (fault[b] != Fault::NONE) refuse(job, b, fault[b]);
    }
  }

  double mixed_mass(const LabelJob& job, int64_t b) const {
    cpu::Share shares[2];
    const int parts = cpu::shares_of(job, b, shares);
    double total = 0;
    for (int s = 0; s < parts; ++s) total += shares[s].weight * double(mass[shares[s].row]);
    return total;
  }
};

Tensor make(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType dtype) {
  const std::vector<int64_t> shape(sizes);
  return torch::stable::new_empty(like, torch::headeronly::IntHeaderOnlyArrayRef(shape.data(), shape.size()), dtype);
}

double scalar_of(const Tensor& tensor) { return double(*tensor.const_data_ptr<float>()); }

template <typename A>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> loss_as(const Tensor& logits, const LabelJob& labels, const std::optional<Tensor>& normalizer,
                                                           const std::optional<Tensor>& upstream, Dtype dtype, const std::string& reduction,
                                                           bool tau_squared, bool with_grad, bool stats) {
  const int64_t B = logits.size(0), C = logits.size(1);
  const ScalarType wide = std::is_same_v<A, double> ? ScalarType::Double : ScalarType::Float;
  const Adapted<A> adapted(labels);

  double scale = tau_squared ? labels.temperature * labels.temperature : 1.0;
  if (reduction == "mean") {
    double total = 0;
    if (normalizer) {
      total = scalar_of(*normalizer);
    } else {
      for (int64_t b = 0; b < B; ++b) total += adapted.mixed_mass(labels, b);
    }
    scale = total == 0.0 ? 0.0 : scale / total;  // every row discarded: 0, never 0/0
  }

  Tensor loss = reduction == "none" ? make(logits, {B}, wide) : make(logits, {}, wide);
  Tensor grad = with_grad ? make(logits, {B, C}, logits.scalar_type()) : make(logits, {0}, logits.scalar_type());
  Tensor region = make(logits, {stats ? B : 0}, ScalarType::Char);
  Tensor correct = make(logits, {stats ? B : 0}, ScalarType::Bool);
  Tensor logsumexp = make(logits, {stats ? B : 0}, wide);

  std::vector<double> row_loss(B);
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
  job.adapted = &adapted.view;
  job.row_loss = row_loss.data();
  job.grad = with_grad ? grad.mutable_data_ptr() : nullptr;
  job.correct = stats ? static_cast<bool*>(correct.mutable_data_ptr()) : nullptr;
  job.logsumexp = stats ? logsumexp.mutable_data_ptr() : nullptr;
  const cpu::RowsKernel kernel = cpu::rows_kernel(dtype, cpu::chosen_isa());
  const int64_t grain = std::max<int64_t>(1, 16384 / C);
  torch::stable::parallel_for(0, B, grain, [&](int64_t begin, int64_t end) { kernel(job, begin, end); });

  if (stats) std::copy(adapted.region.begin(), adapted.region.end(), static_cast<int8_t*>(region.mutable_data_ptr()));
  A* loss_out = static_cast<A*>(loss.mutable_data_ptr());
  if (reduction == "none") {
    for (int64_t b = 0; b < B; ++b) loss_out[b] = A(row_loss[b]);
  } else {
    double total = 0;  // in row order, whatever the threads did: the scalar is deterministic
    for (int64_t b = 0; b < B; ++b) total += row_loss[b];
    loss_out[0] = A(total);
  }
  return {loss, grad, region, correct, logsumexp};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> loss_cpu(
    Tensor logits, Tensor labels, std::optional<Tensor> probs, Tensor target, std::optional<Tensor> partner, std::optional<Tensor> lam,
    std::optional<Tensor> normalizer, std::optional<Tensor> upstream, std::string codec, int64_t k, double discard_below,
    double calibrate_below, double discard_above, double smoothing, std::string confidence, double temperature, std::string tail,
    std::string reduction, bool tau_squared, bool with_grad, bool stats, [[maybe_unused]] bool validate) {
  const LabelJob job = label_job(labels, probs, target, partner, lam, codec, k, logits.size(1), discard_below, calibrate_below,
                                 discard_above, smoothing, confidence, temperature, tail);
  switch (logits.scalar_type()) {
    case ScalarType::Double:
      return loss_as<double>(logits, job, normalizer, upstream, Dtype::FLOAT64, reduction, tau_squared, with_grad, stats);
    case ScalarType::Float:
      return loss_as<float>(logits, job, normalizer, upstream, Dtype::FLOAT32, reduction, tau_squared, with_grad, stats);
    case ScalarType::BFloat16:
      return loss_as<float>(logits, job, normalizer, upstream, Dtype::BFLOAT16, reduction, tau_squared, with_grad, stats);
    case ScalarType::Half:
      return loss_as<float>(logits, job, normalizer, upstream, Dtype::FLOAT16, reduction, tau_squared, with_grad, stats);
    default:
      throw std::invalid_argument("logits: this dtype is not supported; give float32, float64, bfloat16 or float16");
  }
}

std::string cpu_isa() { return cpu::chosen_isa(); }

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ferkd, CPU, m) { m.impl("loss_cpu", TORCH_BOX(&loss_cpu)); }
STABLE_TORCH_LIBRARY_IMPL(ferkd, CompositeExplicitAutograd, m) { m.impl("cpu_isa", TORCH_BOX(&cpu_isa)); }

// Importing the module is what registers the operators above.
extern "C" __attribute__((visibility("default"))) PyObject* PyInit__C(void) {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", "ferkd's CPU operators", 0, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
