// ferkd._C_cuda: the CUDA implementations of the operators whose schemas ferkd/ops.py defines, on PyTorch's stable ABI.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <initializer_list>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "arguments.h"
#include "loss_cuda.h"

namespace {

using namespace ferkd;
using cuda::Dtype;
using cuda::LossJob;
using cuda::Reduction;

Dtype dtype_of(const Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return Dtype::FLOAT32;
    case ScalarType::BFloat16:
      return Dtype::BFLOAT16;
    case ScalarType::Half:
      return Dtype::FLOAT16;
    default:
      throw std::invalid_argument(std::string(name) + ": this dtype is not supported on CUDA; give float32, bfloat16 or float16");
  }
}

void require_device(const Tensor& logits, std::initializer_list<const std::optional<Tensor>*> others) {
  for (const std::optional<Tensor>* other : others) {
    require(!*other || (*other)->get_device_index() == logits.get_device_index(), "labels, target, mix, normalizer, upstream: all must be on the logits' device");
  }
}

const float* scalar_of(const std::optional<Tensor>& tensor) {
  if (!tensor) return nullptr;
  require(tensor->dim() == 0 && tensor->scalar_type() == ScalarType::Float, "normalizer, upstream: they must be 0-dim float32");
  return tensor->const_data_ptr<float>();
}

Tensor make(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType dtype) {
  const std::vector<int64_t> shape(sizes);
  return torch::stable::new_empty(like, torch::headeronly::IntHeaderOnlyArrayRef(shape.data(), shape.size()), dtype);
}

// One row of a device array as host memory.
template <typename T>
struct HostRow {
  std::vector<T> values;
  HostRow(const T* from, int64_t row, int64_t width, simt::Stream stream) : values(from == nullptr ? 0 : width) {
    if (from != nullptr) simt::copy_to_host(values.data(), from + row * width, size_t(width) * sizeof(T), stream);
  }
  const T* data() const { return values.data(); }
};

// Waits for the device; throws the words for the first row with wrong data.
void check_data(const Tensor& logits, const LabelJob& job, simt::Stream stream) {
  const Tensor found = make(logits, {8}, ScalarType::Byte);
  auto* at = static_cast<unsigned long long*>(found.mutable_data_ptr());
  cuda::find_fault(job, at, stream);
  unsigned long long first = 0;
  simt::copy_to_host(&first, at, sizeof(first), stream);
  if (first == ~0ull) return;
  const auto row = int64_t(first / 256);
  const HostRow<uint32_t> words(job.words, row, job.width, stream);
  const HostRow<int64_t> ids(job.ids, row, job.k, stream), target(job.target, row, 1, stream), partner(job.partner, row, 1, stream);
  const HostRow<double> wide(job.probs_are_double ? static_cast<const double*>(job.probs) : nullptr, row, job.k, stream);
  const HostRow<float> narrow(job.probs_are_double ? nullptr : static_cast<const float*>(job.probs), row, job.k, stream);
  const HostRow<float> lam(job.lam, row, 1, stream);
  LabelJob alone = job;
  alone.words = words.data();
  alone.ids = ids.data();
  alone.probs = job.probs_are_double ? static_cast<const void*>(wide.data()) : narrow.data();
  alone.target = target.data();
  alone.partner = partner.data();
  alone.lam = lam.data();
  refuse(alone, 0, Fault(first % 256), row);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> loss_cuda(
    Tensor logits, Tensor labels, std::optional<Tensor> probs, Tensor target, std::optional<Tensor> partner, std::optional<Tensor> lam,
    std::optional<Tensor> normalizer, std::optional<Tensor> upstream, std::string codec, int64_t k, double discard_below,
    double calibrate_below, double discard_above, double smoothing, std::string confidence, double temperature, std::string tail,
    std::string reduction, bool tau_squared, bool with_grad, bool stats, bool validate) {
  require_layout(logits, labels, probs, target, partner, lam, codec, k);
  require_device(logits, {&probs, &partner, &lam, &normalizer, &upstream});
  require(labels.get_device_index() == logits.get_device_index() && target.get_device_index() == logits.get_device_index(),
          "labels, target: they must be on the logits' device");
  require(logits.size(1) <= INT32_MAX, "logits: at most 2**31 - 1 classes");
  const int64_t B = logits.size(0), C = logits.size(1);
  const Dtype dtype = dtype_of(logits, "logits");
  const simt::DeviceGuard guard(logits.get_device_index());
  const simt::Stream stream = simt::current_stream(logits.get_device_index());

  LossJob job{};
  job.labels = label_job(labels, probs, target, partner, lam, codec, k, C, discard_below, calibrate_below, discard_above, smoothing,
                         confidence, temperature, tail);
  if (validate) check_data(logits, job.labels, stream);

  Tensor loss = reduction == "none" ? make(logits, {B}, ScalarType::Float) : make(logits, {}, ScalarType::Float);
  Tensor grad = with_grad ? make(logits, {B, C}, logits.scalar_type()) : make(logits, {0}, logits.scalar_type());
  Tensor region = make(logits, {stats ? B : 0}, ScalarType::Char);
  Tensor correct = make(logits, {stats ? B : 0}, ScalarType::Bool);
  Tensor logsumexp = make(logits, {stats ? B : 0}, ScalarType::Float);
  const Tensor workspace = make(logits, {reduction == "none" ? 0 : int64_t(sizeof(cuda::Workspace))}, ScalarType::Byte);

  job.logits = logits.const_data_ptr();
  job.row_stride = logits.stride(0);
  job.rows = B;
  job.classes = C;
  job.scale = tau_squared ? temperature * temperature : 1.0;
  job.reduction = reduction == "mean" ? Reduction::MEAN : reduction == "sum" ? Reduction::SUM : Reduction::NONE;
  job.normalizer = scalar_of(normalizer);
  job.upstream = scalar_of(upstream);
  job.loss = static_cast<float*>(loss.mutable_data_ptr());
  job.grad = with_grad ? grad.mutable_data_ptr() : nullptr;
  job.region = stats ? static_cast<int8_t*>(region.mutable_data_ptr()) : nullptr;
  job.correct = stats ? static_cast<bool*>(correct.mutable_data_ptr()) : nullptr;
  job.logsumexp = stats ? static_cast<float*>(logsumexp.mutable_data_ptr()) : nullptr;
  job.workspace = static_cast<cuda::Workspace*>(workspace.mutable_data_ptr());
  cuda::run_loss(job, dtype, stream);
  return {loss, grad, region, correct, logsumexp};
}

// grad [B, C] times upstream, 0-dim or [B] float32, in place.
void scale_(Tensor grad, Tensor upstream) {
  const Dtype dtype = dtype_of(grad, "grad");
  require(grad.dim() == 2 && grad.is_contiguous() && grad.size(1) <= INT32_MAX, "grad: it must be [B, C] and contiguous");
  require(upstream.get_device_index() == grad.get_device_index() && upstream.scalar_type() == ScalarType::Float &&
              (upstream.dim() == 0 || (upstream.dim() == 1 && upstream.size(0) == grad.size(0))),
          "upstream: it must be of the loss's dtype, shape and device");
  const simt::DeviceGuard guard(grad.get_device_index());
  const Tensor factors = torch::stable::contiguous(upstream);  // the gradient of a sum over rows is an expanded scalar
  cuda::scale_rows(grad.mutable_data_ptr(), dtype, grad.size(0), grad.size(1), factors.const_data_ptr<float>(), factors.dim() == 1,
                   simt::current_stream(grad.get_device_index()));
}

// Why the loss cannot run on a device, or nothing.
std::string cuda_why_not(int64_t device) {
  const simt::DeviceGuard guard(static_cast<int32_t>(device));
  if (cuda::compiled_architecture() != 0) return "";
  return "ferkd._C_cuda holds no code for this GPU; build it on this machine, or with TORCH_CUDA_ARCH_LIST naming its compute capability";
}

}  // namespace

#if defined(FERKD_SIMT_EMULATED)
STABLE_TORCH_LIBRARY_IMPL(ferkd, CPU, m) { m.impl("loss_cuda", TORCH_BOX(&loss_cuda)); }
STABLE_TORCH_LIBRARY(ferkd_emulated, m) { m.def("scale_(Tensor(a!) grad, Tensor upstream) -> ()"); }
STABLE_TORCH_LIBRARY_IMPL(ferkd_emulated, CPU, m) { m.impl("scale_", TORCH_BOX(&scale_)); }
#else
#include <Python.h>

STABLE_TORCH_LIBRARY_IMPL(ferkd, CUDA, m) {
  m.impl("loss_cuda", TORCH_BOX(&loss_cuda));
  m.impl("scale_", TORCH_BOX(&scale_));
}
STABLE_TORCH_LIBRARY_IMPL(ferkd, CompositeExplicitAutograd, m) { m.impl("cuda_why_not", TORCH_BOX(&cuda_why_not)); }

// Importing the module is what registers the operators above.
extern "C" __attribute__((visibility("default"))) PyObject* PyInit__C_cuda(void) {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C_cuda", "ferkd's CUDA operators", 0, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
#endif
