// ferkd._C_cuda: the CUDA implementations of the operators whose schemas ferkd/ops.py defines, on PyTorch's stable ABI.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <Python.h>

#include <stdexcept>

#include "scale_cuda.h"

namespace {

using ferkd::cuda::Dtype;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

void scale_(Tensor grad, Tensor upstream) {
  Dtype dtype;
  switch (grad.scalar_type()) {
    case ScalarType::Float:
      dtype = Dtype::FLOAT32;
      break;
    case ScalarType::BFloat16:
      dtype = Dtype::BFLOAT16;
      break;
    case ScalarType::Half:
      dtype = Dtype::FLOAT16;
      break;
    default:
      throw std::invalid_argument("grad: this dtype is not supported on CUDA; use float32, bfloat16 or float16 logits");
  }
  if (grad.dim() != 2 || !grad.is_contiguous()) throw std::invalid_argument("grad: it must be [B, C] and contiguous");
  if (!upstream.is_cuda() || upstream.scalar_type() != ScalarType::Float ||
      (upstream.dim() != 0 && (upstream.dim() != 1 || upstream.size(0) != grad.size(0)))) {
    throw std::invalid_argument("upstream: it must be of the loss's dtype, shape and device");
  }
  const torch::stable::accelerator::DeviceGuard guard(grad.get_device_index());
  const Tensor factors = torch::stable::contiguous(upstream);  // the gradient of a sum over rows is an expanded scalar
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(grad.get_device_index(), &stream));
  ferkd::cuda::scale_rows(grad.mutable_data_ptr(), dtype, grad.size(0), grad.size(1), factors.const_data_ptr<float>(),
                          factors.dim() == 1, stream);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ferkd, CUDA, m) { m.impl("scale_", TORCH_BOX(&scale_)); }

// Importing the module is what registers the operator above.
extern "C" __attribute__((visibility("default"))) PyObject* PyInit__C_cuda(void) {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C_cuda", "ferkd's CUDA operators", 0, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
