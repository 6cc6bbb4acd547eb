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

#include "arguments.h"
#include "loss_cpu.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using namespace ferkd;
using cpu::AdaptedLabels;
using cpu::Dtype;
using cpu::LossJob;

// The adapted labels of a batch and the memory they lie in.
struct Adapted {
  std::vector<double> mass, base, deltas;
  std::vector<int32_t> count, ids;
  std::vector<int8_t> region;
  std::vector<Fault> fault;
  AdaptedLabels view{};

  // Unpacks, checks and adapts every row; throws std::invalid_argument for the first row with wrong data.
  Adapted(const LabelJob& job, bool is_double)
      : mass(job.rows), base(job.rows), deltas(job.rows * job.k), count(job.rows), ids(job.rows * job.k), region(job.rows), fault(job.rows) {
    view = {mass.data(), base.data(), count.data(), region.data(), ids.data(), deltas.data(), fault.data()};
    const int64_t grain = std::max<int64_t>(1, 4096 / job.k);
    const auto adapt = is_double ? cpu::adapt_rows<double> : cpu::adapt_rows<float>;
    torch::stable::parallel_for(0, job.rows, grain, [&](int64_t begin, int64_t end) { adapt(job, view, begin, end); });
    for (int64_t b = 0; b < job.rows; ++b) {  // an exception inside the loop would reach the caller as a RuntimeError
      if (fault[b] != Fault::NONE) refuse(job, b, fault[b], b);
    }
  }

  double mixed_mass(const LabelJob& job, int64_t b) const {
    cpu::Share shares[2];
    const int parts = cpu::shares_of(job, b, shares);
    double total = 0;
    for (int s = 0; s < parts; ++s) total += shares[s].weight * mass[shares[s].row];
    return total;
  }
};

Tensor make(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType dtype) {
  const std::vector<int64_t> shape(sizes);
  return torch::stable::new_empty(like, torch::headeronly::IntHeaderOnlyArrayRef(shape.data(), shape.size()), dtype);
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
  const Adapted adapted(labels, dtype == Dtype::FLOAT64);

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

// Importing the module is what registers the operators above.
extern "C" __attribute__((visibility("default"))) PyObject* PyInit__C(void) {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", "ferkd's CPU operators", 0, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
