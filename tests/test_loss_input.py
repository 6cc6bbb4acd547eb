"""Wrong input to ferkd_loss is an error that names the argument and what was found; labels never reach beyond the logits."""

import pytest
import torch
from loss_cases import IMPLS, device, labels, logits

from ferkd import FerKDLoss, Records, ferkd_loss
from ferkd.errors import InputError
from ferkd.loss import label_mass

IDS, PROBS, TARGET = labels(4, 10, 3)
X = logits(4, 10)
WORDS = torch.zeros(4, 3, dtype=torch.int32)

WRONG = {
    "logits of one dimension": ({"logits": X[0]}, r"logits: \[10\] float32; give a \[B, C\] tensor"),
    "integer logits": ({"logits": X.long()}, r"logits: \[4, 10\] int64; give float32"),
    "one class": ({"logits": X[:, :1]}, "logits: .* at least 2 classes"),
    "other batch size": ({"logits": X[:3]}, "labels: 4 rows, but the logits have 3"),
    "target of another batch": ({"target": TARGET[:3]}, r"target: \[3\] int64; with 4 rows of logits it must be \[4\] int64"),
    "target of another dtype": ({"target": TARGET.int()}, r"target: \[4\] int32"),
    "no target": ({"target": None}, "target: NoneType"),
    "no labels": ({"labels": None}, "labels: NoneType; give Records or a pair"),
    "ids and probs of other shapes": ({"labels": (IDS, PROBS[:, :2])}, r"labels: ids \[4, 3\] int64, probs \[4, 2\] float32"),
    "floating ids": ({"labels": (PROBS, PROBS)}, "labels: .* give integer ids"),
    "integer probs": ({"labels": (IDS, IDS)}, "labels: .* floating probabilities"),
    "probs that want a gradient": ({"labels": (IDS, PROBS.clone().requires_grad_())}, "labels: probs: requires a gradient"),
    "lam that wants a gradient": ({"mix": (TARGET % 4, torch.ones(4, requires_grad=True))}, "mix: lam: requires a gradient"),
    "normalizer that wants a gradient": ({"normalizer": torch.tensor(3.0, requires_grad=True)}, "normalizer: requires a gradient"),
    "upstream that wants a gradient": ({"upstream": torch.tensor(3.0, requires_grad=True)}, "upstream: requires a gradient"),
    "ids and probs as lists": ({"labels": (IDS.tolist(), PROBS.tolist())}, "labels: ids list, probs list; give tensors"),
    "records of an array": ({"labels": Records(WORDS.numpy(), "half", 3, 10)}, "labels: words ndarray; give an int32 tensor"),
    "k above C": (
        {"labels": (torch.zeros(4, 11, dtype=torch.int64), torch.zeros(4, 11))},
        "labels: k = 11 with 10 classes; choose 1 to 10",
    ),
    "no pairs": ({"labels": (IDS[:, :0], PROBS[:, :0])}, "labels: k = 0"),
    "records of other classes": ({"labels": Records(WORDS, "half", 3, 11)}, "labels: made for 11 classes, but the logits have 10"),
    "records of another width": ({"labels": Records(WORDS, "half", 2, 10)}, r"labels: words \[4, 3\] int32; half labels of k=2.* \[B, 2\]"),
    "records of another dtype": ({"labels": Records(WORDS.long(), "half", 3, 10)}, r"labels: words \[4, 3\] int64"),
    "records of another batch": ({"labels": Records(WORDS[:2], "half", 3, 10)}, "labels: 2 rows, but the logits have 4"),
    "records of an unknown codec": ({"labels": Records(WORDS, "zip", 3, 10)}, "codec: 'zip' is unknown"),
    "temperature of zero": ({"temperature": 0.0}, "temperature: 0.0; give a number above 0"),
    "temperature that is not a number": ({"temperature": float("nan")}, "temperature: nan"),
    "unknown tail": ({"tail": "cut"}, "tail: 'cut' is unknown; choose 'smooth' or 'renorm'"),
    "unknown reduction": ({"reduction": "max"}, "reduction: 'max' is unknown"),
    "unknown impl": ({"impl": "gpu"}, "impl: 'gpu' is unknown; choose one of auto, reference, cpu, triton, cuda"),
    "a policy of another kind": ({"policy": 0.3}, "policy: float; give a RegionPolicy"),
    "mix without lam": ({"mix": TARGET}, "mix: Tensor; give a pair"),
    "partner of another dtype": ({"mix": (TARGET.int(), PROBS[:, 0])}, r"mix: partner: \[4\] int32"),
    "lam of another dtype": ({"mix": (TARGET, PROBS[:, 0].double())}, r"mix: lam: \[4\] float64"),
    "normalizer that is a number": ({"normalizer": 3.0}, "normalizer: 3.0; give a 0-dim float32 tensor"),
    "normalizer of a sum": ({"normalizer": torch.tensor(3.0), "reduction": "sum"}, "normalizer: given with reduction 'sum'"),
    "upstream of one dimension": ({"upstream": torch.ones(1)}, r"upstream: \[1\] float32; give a 0-dim float32 tensor"),
    "upstream of another dtype": ({"upstream": torch.tensor(1.0).double()}, r"upstream: \[\] float64"),
    "labels on another device": ({"labels": (IDS.to("meta"), PROBS.to("meta"))}, "labels: on meta, but the logits are on cpu"),
}


@pytest.mark.parametrize("name", WRONG)
def test_the_call_is_refused_with(name):
    changed, message = WRONG[name]
    arguments = {"logits": X, "labels": (IDS, PROBS), "target": TARGET} | changed
    with pytest.raises(InputError, match=message):
        ferkd_loss(**arguments)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("row", [0, 3])
def test_wrong_data_are_refused_by_row(row, impl):
    x, ids, probs, target_ = (tensor.to(device()) for tensor in (X, IDS, PROBS, TARGET))

    def at(tensor, value):
        changed = tensor.clone()
        changed[(row, 1) if tensor.dim() == 2 else row] = value
        return changed

    cases = [
        ({"labels": (at(ids, 10), probs)}, f"labels: class id 10 in row {row}; the logits have 10 classes, 0 to 9"),
        ({"labels": (at(ids, -1), probs)}, f"labels: class id -1 in row {row}"),
        ({"labels": (at(ids, 2**40), probs)}, f"labels: class id {2**40} in row {row}"),
        ({"labels": (ids, at(probs, 1.25))}, f"labels: probability 1.25.* in row {row}; every probability must be from 0 to 1"),
        ({"labels": (ids, at(probs, -0.5))}, f"labels: probability -0.5.* in row {row}"),
        ({"labels": (ids, at(probs, float("nan")))}, f"labels: probability nan in row {row}"),
        ({"labels": (ids, at(probs.double(), 1.25))}, f"labels: probability 1.25.* in row {row}"),
        ({"target": at(target_, 10)}, f"target: class id 10 in row {row}; the logits have 10 classes, 0 to 9"),
        ({"target": at(target_, -100)}, f"target: class id -100 in row {row}"),
        ({"mix": (at(target_ % 4, 4), probs[:, 0])}, f"mix: partner 4 in row {row}; the batch has 4 rows"),
        ({"mix": (target_ % 4, at(probs[:, 0], 1.5))}, f"mix: lam 1.5.* in row {row}; every lam must be from 0 to 1"),
        ({"mix": (target_ % 4, at(probs[:, 0], float("nan")))}, f"mix: lam nan in row {row}"),
    ]
    for changed, message in cases:
        arguments = {"logits": x, "labels": (ids, probs), "target": target_, "impl": impl, "validate": True} | changed
        with pytest.raises(InputError, match=message):
            ferkd_loss(**arguments)
        with torch.no_grad(), pytest.raises(InputError, match=message):
            ferkd_loss(**arguments)


def test_label_mass_refuses_what_it_would_otherwise_broadcast_or_misread():
    with pytest.raises(InputError, match="labels: made for 10 classes, but classes is 11"):
        label_mass(Records(WORDS, "half", 3, 10), TARGET, classes=11)
    with pytest.raises(InputError, match=r"target: \[1\] int64"):
        label_mass((IDS, PROBS), TARGET[:1], classes=10)
    with pytest.raises(InputError, match=r"mix: lam: \[1\] float32"):
        label_mass((IDS, PROBS), TARGET, classes=10, mix=(TARGET % 4, torch.ones(1)))


@pytest.mark.parametrize("name", ["triton", "cuda"])
def test_a_backend_that_cannot_run_is_refused_with_its_reason(name):
    with pytest.raises(InputError, match=f"impl: '{name}' cannot run here: it computes in float32, and the logits are float64"):
        FerKDLoss(impl=name)(X.double(), (IDS, PROBS), TARGET)
