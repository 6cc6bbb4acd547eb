"""What the loss's tests share: labels, an oracle that owes nothing to ferkd.reference, tolerances, and a look at which op ran."""

from __future__ import annotations

import cuda_on_cpu
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from ferkd import Region, RegionPolicy, ferkd_loss, ops
from ferkd.records import pack_labels

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

_WHY_NO_CPU = ops.why_not("cpu", "cpu")
CPU = pytest.param("cpu", marks=pytest.mark.skipif(_WHY_NO_CPU is not None, reason=str(_WHY_NO_CPU)))
# On a machine without a GPU Triton's own interpreter runs the kernels (tests/conftest.py switches it on).
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
_WHY_NO_TRITON = ops.why_not("triton", DEVICE)
TRITON = pytest.param("triton", marks=pytest.mark.skipif(_WHY_NO_TRITON is not None, reason=str(_WHY_NO_TRITON)))
# And the CUDA kernels' source runs on fibers (tests/cuda_on_cpu.py).
_WHY_NO_CUDA = ops.why_not("cuda", "cuda") if DEVICE == "cuda" else cuda_on_cpu.load()
CUDA = pytest.param("cuda", marks=pytest.mark.skipif(_WHY_NO_CUDA is not None, reason=str(_WHY_NO_CUDA)))
IMPLS = ("reference", CPU, TRITON, CUDA)
ON_GPU = ("triton", "cuda")  # float32, bfloat16 and float16; there data are checked under validate=True alone
if _WHY_NO_TRITON is None and DEVICE == "cpu":
    # The interpreter cuts a float32 off to a bfloat16, and its rounding loses carries; every GPU rounds to nearest, ties to even.
    from triton.runtime import interpreter

    _convert_float = interpreter._convert_float

    def _rounded(value, source, to, mode):
        if (source.name, to.name) != ("fp32", "bf16"):
            return _convert_float(value, source, to, mode)
        return torch.from_numpy(np.ascontiguousarray(value)).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)

    interpreter._convert_float = _rounded

# Everything a row can be, at once: about a tenth each discarded (below and above) and calibrated, the rest kept.
POLICY = RegionPolicy(discard_below=0.2, calibrate_below=0.4, discard_above=0.98)


def device():
    """Where a test's tensors belong: tests/conftest.py makes the GPU the default device of tests of its backends."""
    return torch.get_default_device()


def random(*shape, seed=0, dtype=torch.float32):
    """Uniform numbers from 0 to 1, the same on every device."""
    return torch.rand(*shape, generator=torch.Generator("cpu").manual_seed(seed), dtype=dtype, device="cpu").to(device())


def labels(batch, classes, k, seed=0, dtype=torch.float32):
    """(ids, probs, target): teachers from unsure to 0.99999 sure, probabilities falling, the target among the k about half the time."""
    generator = torch.Generator("cpu").manual_seed(seed)
    sharpness = torch.linspace(0.0, 14.0, batch, dtype=torch.float64, device="cpu")[:, None]
    answers = torch.softmax(torch.randn(batch, classes, generator=generator, dtype=torch.float64, device="cpu") * sharpness, dim=1)
    probs, ids = answers.topk(k)
    known = torch.rand(batch, generator=generator, device="cpu") < 0.5
    target = torch.where(known, ids[:, 0], torch.randint(classes, (batch,), generator=generator, device="cpu"))
    return ids.to(device()), probs.to(device(), dtype), target.to(device())


def logits(batch, classes, dtype=torch.float32, seed=1, scale=3.0):
    generator = torch.Generator("cpu").manual_seed(seed)
    return (torch.randn(batch, classes, generator=generator, dtype=torch.float64, device="cpu") * scale).to(dtype).to(device())


def words_of(ids, probs, codec, classes):
    """The words of records, [B, W] int32, as a store would hold these answers."""
    return torch.from_numpy(pack_labels(ids.cpu().numpy(), probs.cpu().numpy(), codec, classes).view("int32")).to(device())


def dense_label(ids, probs, target, classes, policy, temperature=1.0, tail="smooth"):
    """One row's label written out over all classes in float64, and its region: the definition, class by class."""
    k = len(ids)
    single = np.float64 if probs.dtype == torch.float64 else np.float32
    p = [single(value) for value in probs.tolist()]
    ids, target = ids.tolist(), int(target)
    total = single(0)
    for value in p:
        total = single(total + value)
    if policy.confidence == "max":
        confidence = max(p)
    elif target in ids:
        confidence = single(0)
        for i, value in zip(ids, p, strict=True):
            confidence = single(confidence + value) if i == target else confidence
    else:
        confidence = single(max(single(0), single(1) - total) / single(max(classes - k, 1)))
    y = np.zeros(classes)
    if confidence < single(policy.discard_below) or confidence > single(policy.discard_above):
        return y, Region.DISCARDED
    if confidence < single(policy.calibrate_below):
        y[:] = policy.smoothing / (classes - 1)
        y[target] = 1.0 - policy.smoothing
        return y, Region.CALIBRATED
    v = np.array(p, dtype=np.float64)
    beta = max(0.0, 1.0 - v.sum()) / (classes - k) if classes > k else 0.0
    if tail == "renorm":
        if v.sum() == 0.0:
            return y, Region.DISCARDED
        v, beta = v / v.sum(), 0.0
    if temperature != 1.0:
        v, beta = v ** (1.0 / temperature), beta ** (1.0 / temperature)
        whole = v.sum() + (classes - k) * beta
        v, beta = (v / whole, beta / whole) if whole else (v, beta)
    y[:] = beta
    seen = set()
    for i, value in zip(ids, v, strict=True):
        y[i] = y[i] + value - beta if i in seen else value  # a repeated id adds
        seen.add(i)
    return y, Region.KEPT


def oracle(x, ids, probs, target, *, policy, temperature=1.0, tail="smooth", mix=None, reduction="mean", tau_squared=False):
    """(loss, gradient, regions, mass) in float64: dense labels, torch's own cross_entropy and autograd."""
    classes = x.shape[1]
    x, ids, probs, target = x.cpu(), ids.cpu(), probs.cpu(), target.cpu()
    rows = [dense_label(i, p, t, classes, policy, temperature, tail) for i, p, t in zip(ids, probs, target, strict=True)]
    y = torch.from_numpy(np.stack([row for row, _ in rows])) if rows else torch.zeros(0, classes, dtype=torch.float64, device="cpu")
    if mix is not None:
        partner, lam = mix[0].cpu(), mix[1].cpu().double()[:, None]
        y = lam * y + (1.0 - lam) * y[partner]
    x = x.detach().double().requires_grad_()
    loss = F.cross_entropy(x / temperature, y, reduction="none") * (temperature**2 if tau_squared else 1.0)
    if reduction != "none":
        loss = loss.sum()
    if reduction == "mean":
        loss = loss / max(float(y.sum()), 1e-300)
    (gradient,) = torch.autograd.grad(loss.sum(), x)
    regions = torch.tensor([int(region) for _, region in rows], dtype=torch.int8)
    return loss.detach().to(device()), gradient.to(device()), regions.to(device()), y.sum(dim=1).to(device())


def assert_close(loss, gradient, expected_loss, expected_gradient, dtype):
    """Compares with float64 figures; a half type's gradient may be off by its own rounding and no more."""
    # float32: sums of up to 4,096 terms lose a few last bits; the gradient of a confident row cancels against 1.
    rtol, atol = {torch.float64: (1e-11, 1e-12), torch.float32: (4e-6, 2e-6)}.get(dtype, (4e-6, 2e-6))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert loss.dtype == wide
    torch.testing.assert_close(loss.double(), expected_loss, rtol=rtol, atol=atol * max(1.0, float(expected_loss.abs().max())))
    assert gradient.dtype == dtype
    assert gradient.is_contiguous()
    size = max(float(expected_gradient.abs().max()), 1e-3) if expected_gradient.numel() else 1.0
    rounding = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}.get(dtype, rtol)
    least = {torch.float16: 2.0**-24}.get(dtype, 0.0)  # float16's spacing near 0
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=rounding, atol=least + atol * size)


class OpsRun(TorchDispatchMode):
    """Records which ferkd ops run inside the `with`."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "ferkd":
            self.names.append(function._opname)
        return function(*args, **(kwargs or {}))


def loss_and_gradient(x, labels, target, **settings):
    x = x.detach().requires_grad_()
    loss = ferkd_loss(x, labels, target, **settings)
    (gradient,) = torch.autograd.grad(loss.sum(), x)
    return loss.detach(), gradient
