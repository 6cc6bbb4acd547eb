// An operator call's arguments: checked, and as the kernels take them. Both extension modules include this.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>

#include "label_math.h"

namespace ferkd {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline void require(bool holds, const char* what) {
  if (!holds) throw std::invalid_argument(what);
}

// ferkd/loss.py refuses wrong arguments with better words; here stands what memory is safe by, for calls of the operator itself.
inline void require_layout(const Tensor& logits, const Tensor& labels, const std::optional<Tensor>& probs, const Tensor& target,
                    const std::optional<Tensor>& partner, const std::optional<Tensor>& lam, const std::string& codec, int64_t k) {
  require(logits.dim() == 2 && logits.size(1) >= 2 && logits.stride(1) == 1, "logits: they must be [B, C] with C >= 2 and a last stride of 1");
  const int64_t B = logits.size(0), C = logits.size(1);
  require(k >= 1 && k <= MAX_K && k <= C, "k: it must be from 1 to 64 and at most C");
  const bool pairs = codec == "pairs";
  require(pairs || codec == "half" || codec == "packed", "codec: it must be pairs, half or packed");
  require(pairs == probs.has_value(), "probs: given with codec pairs and with no other");
  const int64_t width = pairs ? k : label_words(codec == "half" ? Codec::HALF : Codec::PACKED, int(k), C);
  require(labels.dim() == 2 && labels.size(0) == B && labels.size(1) == width && labels.is_contiguous(), "labels: wrong shape or not contiguous");
  require(!probs || (probs->dim() == 2 && probs->size(0) == B && probs->size(1) == k && probs->is_contiguous() &&
                     (probs->scalar_type() == ScalarType::Float || probs->scalar_type() == ScalarType::Double)),
          "probs: they must be [B, k] float32 or float64 and contiguous");
  const auto is_row = [B](const Tensor& tensor) { return tensor.dim() == 1 && tensor.size(0) == B && tensor.is_contiguous(); };
  require(is_row(target), "target: it must be [B] and contiguous");
  require(partner.has_value() == lam.has_value() && (!partner || (is_row(*partner) && is_row(*lam))),
          "mix: partner and lam come together, [B] and contiguous");
}

// The labels of an operator call whose layout is as required.
inline LabelJob label_job(const Tensor& labels, const std::optional<Tensor>& probs, const Tensor& target, const std::optional<Tensor>& partner,
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
  if (job.codec == Codec::PACKED) job.grid = packed_grid(classes);
  job.target = target.const_data_ptr<int64_t>();
  job.partner = partner ? partner->const_data_ptr<int64_t>() : nullptr;
  job.lam = lam ? lam->const_data_ptr<float>() : nullptr;
  job.rows = labels.size(0);
  job.classes = classes;
  job.policy = {discard_below, calibrate_below, discard_above, smoothing, smoothing / double(classes - 1), confidence == "target"};
  job.temperature = temperature;
  job.exponent = 1.0 / temperature;
  job.renorm = tail == "renorm";
  return job;
}

// Throws the words for what is wrong with row `b` of the job, which is called `row_number` to the caller.
[[noreturn]] inline void refuse(const LabelJob& job, int64_t b, Fault fault, int64_t row_number) {
  const std::string row = " in row " + std::to_string(row_number);
  const std::string span = "; the logits have " + std::to_string(job.classes) + " classes, 0 to " + std::to_string(job.classes - 1);
  each_pair(job, b, [&](int, int64_t id, auto p) {
    if (fault == Fault::ID && (id < 0 || id >= job.classes)) {
      throw std::invalid_argument("labels: class id " + std::to_string(id) + row + span);
    }
    if (fault == Fault::PROBABILITY && !is_probability(p)) {
      throw std::invalid_argument("labels: probability " + std::to_string(p) + row + "; every probability must be from 0 to 1");
    }
  });
  if (fault == Fault::TARGET) {
    throw std::invalid_argument("target: class id " + std::to_string(job.target[b]) + row + span);
  }
  if (fault == Fault::PARTNER) {
    throw std::invalid_argument("mix: partner " + std::to_string(job.partner[b]) + row + "; the batch has " + std::to_string(job.rows) +
                                " rows");
  }
  throw std::invalid_argument("mix: lam " + std::to_string(job.lam[b]) + row + "; every lam must be from 0 to 1");
}

}  // namespace ferkd
