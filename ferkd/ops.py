"""The torch.library operators: schemas, fakes, autograd and the choice of backend. The only file that knows backends.

Every backend is one op of the same schema, so that a graph or a profile shows which one ran: `ferkd::loss_reference`,
`ferkd::loss_cpu`, `ferkd::loss_triton`, `ferkd::loss_cuda`. The gradient is computed in the forward and kept for the backward,
which multiplies it by the upstream gradient.

    loss, grad, region, correct, logsumexp = torch.ops.ferkd.loss_cpu(logits, labels, probs, target, ...)

    logits      [B, C] float32, float64, bfloat16 or float16; the last stride 1, rows may be strided
    labels      [B, W] int32 words of records, or [B, k] int64 ids when codec is "pairs"
    probs       [B, k] float32 or float64 with "pairs", else None
    target      [B] int64
    partner     [B] int64, lam [B] float32, or both None
    normalizer  0-dim float32 or None: what the mean divides by instead of sum S
    upstream    0-dim float32 or None: the upstream gradient, promised beforehand and already in `grad`
    loss        0-dim, or [B] for reduction "none"; float32, float64 for float64 logits
    grad        [B, C] contiguous, of the logits' dtype; [0] unless with_grad
    region      [B] int8, correct [B] bool, logsumexp [B] like the loss; [0] unless stats
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import logging
import os
from typing import Any

import torch
from torch import Tensor

from ferkd import reference
from ferkd.errors import InputError

logger = logging.getLogger("ferkd")

BACKENDS = ("reference", "cpu", "triton", "cuda")
IMPLS = ("auto", *BACKENDS)

_SCHEMA = (
    "(Tensor logits, Tensor labels, Tensor? probs, Tensor target, Tensor? partner, Tensor? lam, Tensor? normalizer, Tensor? upstream, "
    "str codec, int k, float discard_below, float calibrate_below, float discard_above, float smoothing, str confidence, "
    "float temperature, str tail, str reduction, bool tau_squared, bool with_grad, bool stats, bool validate) "
    "-> (Tensor loss, Tensor grad, Tensor region, Tensor correct, Tensor logsumexp)"
)
_ARGUMENTS = _SCHEMA[: _SCHEMA.index("->")].count(",") + 1
_UPSTREAM, _REDUCTION = 7, 17  # positions in the schema

_library = torch.library.Library("ferkd", "DEF")
for _name in BACKENDS:
    _library.define(f"loss_{_name}{_SCHEMA}", tags=torch.Tag.pt2_compliant_tag)
_library.define("scale_(Tensor(a!) grad, Tensor upstream) -> ()", tags=torch.Tag.pt2_compliant_tag)
_library.define("cpu_isa() -> str")
_library.define("cuda_why_not(int device) -> str")


# ------------------------------------------------------------------------------------------------ backends


def _load(module: str) -> str | None:
    """Imports an extension module, which registers its operators; why that failed, or None."""
    try:
        importlib.import_module(module)
    except ImportError as error:
        build = "`pip install --no-build-isolation -e .` or `python setup.py build_ext --inplace`"
        return f"{module} is not importable ({error}); build it: {build}"
    return None


_NO_CPU = _load("ferkd._C")
_NO_CUDA = _load("ferkd._C_cuda")


def why_not(impl: str, device: str, dtype: torch.dtype = torch.float32, index: int | None = None) -> str | None:
    """Why a backend cannot run on logits of a device type ("cpu", "cuda", ...) and dtype, or None when it can. `index`: which of the GPUs,
    the current one if None."""
    if impl == "reference":
        return None
    if impl == "cpu":
        return f"the logits are on {device}" if device != "cpu" else _NO_CPU
    if dtype == torch.float64:
        return "it computes in float32, and the logits are float64"
    if impl == "cuda":
        if device != "cuda":
            return f"the logits are on {device}"
        return _NO_CUDA if _NO_CUDA is not None else _why_not_on_gpu(torch.cuda.current_device() if index is None else index)
    if device not in ("cpu", "cuda"):
        return f"the logits are on {device}; its launches are written for CUDA and ROCm"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if importlib.util.find_spec("ferkd.kernels") is None:
        return "ferkd.kernels is not importable; install it: `pip install --no-build-isolation -e .`"
    if device == "cpu" and not _interpreted():
        return "the logits are on cpu (Triton's interpreter, TRITON_INTERPRET=1, is for tests)"
    return None


@functools.cache
def _why_not_on_gpu(index: int) -> str | None:
    return str(torch.ops.ferkd.cuda_why_not(index)) or None


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


_said: set[tuple[str, str]] = set()


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def choose(impl: str, device: str, dtype: torch.dtype = torch.float32, index: int | None = None) -> str:
    """The backend to run: `impl` itself, or for "auto" the fastest one that can run, said once on the logger "ferkd".

    Raises InputError for an unknown name and for a named backend that cannot run, with the reason: nothing falls back in silence.
    """
    if impl not in IMPLS:
        raise InputError(f"impl: {impl!r} is unknown; choose one of {', '.join(IMPLS)}")
    if impl != "auto":
        reason = why_not(impl, device, dtype, index)
        if reason is not None:
            raise InputError(f"impl: {impl!r} cannot run here: {reason}")
        return impl
    reasons = {}
    for candidate in ("cpu",) if device == "cpu" else ("cuda", "triton"):
        reason = why_not(candidate, device, dtype, index)
        if reason is None:
            if (candidate, device) not in _said:
                _said.add((candidate, device))
                logger.info("ferkd_loss on %s runs its `%s` backend", device, candidate)
            return candidate
        reasons[candidate] = reason
    if ("reference", device) not in _said:
        _said.add(("reference", device))
        logger.warning(
            "ferkd_loss on %s runs its slow `reference` backend: %s", device, "; ".join(f"{name}: {why}" for name, why in reasons.items())
        )
    return "reference"


def cpu_isa() -> str:
    """The instruction set the CPU kernel uses: "plain", "avx2" or "avx512"; the environment variable FERKD_CPU overrides it."""
    if _NO_CPU is not None:
        raise InputError(f"cpu_isa: {_NO_CPU}")
    return str(torch.ops.ferkd.cpu_isa())


# ------------------------------------------------------------------------------------------------ fakes and Python implementations

torch.library.impl("ferkd::loss_reference", "CompositeExplicitAutograd", reference.loss, lib=_library)


@torch.library.impl("ferkd::loss_triton", "CompositeExplicitAutograd", lib=_library)
def _loss_triton(*arguments: Any) -> reference.Answer:
    from ferkd.kernels import loss  # here, so that `import ferkd` does not load Triton

    answer: reference.Answer = loss.loss(*arguments)
    return answer


def _fake(logits: Tensor, *rest: Any) -> reference.Answer:
    reduction, _, with_grad, stats, _ = rest[_REDUCTION - 1 :]
    rows, classes = logits.shape
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    counted = rows if stats else 0
    return reference.Answer(
        loss=logits.new_empty(rows if reduction == "none" else (), dtype=wide),
        grad=logits.new_empty((rows, classes) if with_grad else 0),
        region=logits.new_empty(counted, dtype=torch.int8),
        correct=logits.new_empty(counted, dtype=torch.bool),
        logsumexp=logits.new_empty(counted, dtype=wide),
    )


def _scale_without_cuda(grad: Tensor, upstream: Tensor) -> None:
    """grad [B, C] times upstream, 0-dim or [B], in place. Kernels do it in one launch that ends at once where upstream is 1."""
    if grad.device.type == "cuda" and why_not("triton", "cuda", grad.dtype) is None:
        from ferkd.kernels import scale

        scale.scale_(grad, upstream)
        return
    grad.copy_(_scaled(grad, upstream))


torch.library.impl("ferkd::scale_", "CompositeExplicitAutograd", _scale_without_cuda, lib=_library)


def _scaled(grad: Tensor, upstream: Tensor) -> Tensor:
    """A copy of the stored gradient times the upstream gradient, formed in float32 (float64) before it is rounded to grad's dtype."""
    return (grad * upstream.reshape(-1, 1) if grad.dtype == upstream.dtype else grad.to(upstream.dtype) * upstream.reshape(-1, 1)).to(
        grad.dtype
    )


# ------------------------------------------------------------------------------------------------ autograd


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[1], inputs[_UPSTREAM])


def _setup_raw(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _setup(ctx, inputs, output)
    ctx.mark_non_differentiable(*output[1:])


def _backward(ctx: Any, upstream: Tensor | None, second: Tensor | None = None, *_: Any) -> tuple[Tensor | None, ...]:
    return (_logits_gradient(ctx, upstream, second), *(None,) * (_ARGUMENTS - 1))


def _logits_gradient(ctx: Any, upstream: Tensor | None, second: Tensor | None) -> Tensor | None:
    """The stored gradient times the upstream gradient: scaled in place where that cannot be noticed, else a scaled copy."""
    if second is not None:
        raise RuntimeError("ferkd_loss: it is differentiable once; its gradient was itself differentiated (create_graph=True, nested grad)")
    if upstream is None:
        return None
    grad: Tensor
    grad, promised = ctx.saved_tensors
    if grad.dim() != 2:
        raise RuntimeError("ferkd_loss: the op was run with with_grad=False and has no gradient")
    alone = _owned_by_this_backward(grad, upstream)
    if promised is not None:
        _assert_promise(upstream, promised, grad)
        return grad.detach() if alone else grad.clone()
    if not alone:
        return _scaled(grad, upstream)
    own = grad.detach()
    _scale_in_place(own, upstream)
    return own


def _scale_in_place(grad: Tensor, upstream: Tensor) -> None:
    """By the op; but where the CUDA part is built and cannot run (float64, another GPU), its kernel would still answer for the op."""
    cuda_cannot = grad.device.type == "cuda" and why_not("cuda", "cuda", grad.dtype, grad.device.index) is not None
    (_scale_without_cuda if cuda_cannot else _SCALE)(grad, upstream)


def _owned_by_this_backward(grad: Tensor, upstream: Tensor) -> bool:
    """Whether nothing but this backward will ever see the stored gradient: the graph is not kept, nothing traces or compiles."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or not _plain(grad) or not _plain(upstream):
        return False
    if not grad.is_contiguous():  # a saved-tensor hook gave it back in another layout, which scale_ does not walk
        return False
    keep_graph = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)  # a private name: it may go
    return keep_graph is not None and not keep_graph()


def _plain(tensor: Tensor) -> bool:
    """Whether a tensor is neither of a subclass (fake, functional, ...) nor wrapped by torch.func or by is_grads_batched."""
    functorch = torch._C._functorch
    return type(tensor) is Tensor and not functorch.is_functorch_wrapped_tensor(tensor) and not functorch.is_legacy_batchedtensor(tensor)


def _assert_promise(upstream: Tensor, promised: Tensor, grad: Tensor) -> None:
    kept = (upstream == promised).all()
    message = "ferkd_loss: the gradient that reached the loss is not the `upstream` promised in the forward"
    if grad.device.type == "cpu" and _plain(kept) and not torch.compiler.is_compiling():
        if not bool(kept):
            raise RuntimeError(f"{message} ({upstream[upstream != promised].flatten()[0].item()} instead of {promised.item()})")
        return
    torch._assert_async(kept, message)


def _run(impl: str, arguments: tuple[Any, ...]) -> tuple[Tensor, ...]:
    try:
        return tuple(_OPS[impl](*arguments))
    except ValueError as error:  # std::invalid_argument
        raise InputError(str(error)) from None


class _Loss(torch.autograd.Function):
    """The op in eager code. What apply is given and gives is kept small: every argument and output of it costs time in every step.

    `grad` stays differentiable although nobody is handed it: a second differentiation then reaches `backward`, which refuses it,
    instead of finding a constant.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, impl: str, rest: tuple[Any, ...], statistics: list[Tensor]) -> Any:
        with _below_autograd():  # otherwise the op's own autograd, which has nothing to do here, would look at every argument
            loss, grad, *counted = _run(impl, (logits, *rest))
        statistics += counted
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(grad, rest[_UPSTREAM - 1])
        return loss, grad

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, second: Tensor | None) -> Any:
        return _logits_gradient(ctx, upstream, second), None, None, None


class _FuncLoss(torch.autograd.Function):
    """The op under torch.func, which wants its setup_context apart and every tensor among the arguments and outputs.

    It refuses the class that register_autograd generates. Outside torch.func it would cost more: PyTorch binds the arguments by
    inspecting forward's signature.
    """

    @staticmethod
    def forward(impl: str, *arguments: Any) -> Any:
        return _run(impl, arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _setup(ctx, inputs[1:], output)
        ctx.mark_non_differentiable(*output[2:])

    @staticmethod
    def backward(ctx: Any, *upstream: Any) -> Any:
        return (None, *_backward(ctx, *upstream))


_OPS = {}
for _name in BACKENDS:
    torch.library.register_fake(f"ferkd::loss_{_name}", _fake, lib=_library)
    torch.library.register_autograd(f"ferkd::loss_{_name}", _backward, setup_context=_setup_raw, lib=_library)
    _OPS[_name] = getattr(torch.ops.ferkd, f"loss_{_name}").default
torch.library.register_fake("ferkd::scale_", lambda grad, upstream: None, lib=_library)
_SCALE = torch.ops.ferkd.scale_.default

# Private names, which may go: without them the slower ways are taken.
_below_autograd = getattr(torch._C, "_AutoDispatchBelowAutograd", contextlib.nullcontext)
_functorch_is_active = getattr(torch._C, "_are_functorch_transforms_active", lambda: True)


def loss(impl: str, logits: Tensor, *rest: Any) -> reference.Answer:
    """Runs a chosen backend on checked arguments, in the schema's order; differentiable with respect to the logits, once.

    Raises InputError when the data are wrong (always on a CPU, under validate=True on a GPU).
    """
    if torch.compiler.is_compiling():
        return reference.Answer(*_OPS[impl](logits, *rest))
    if _functorch_is_active():
        return reference.Answer(*_FuncLoss.apply(impl, logits, *rest))
    statistics: list[Tensor] = []
    value, grad = _Loss.apply(logits, impl, rest, statistics)
    return reference.Answer(value, grad, *statistics)
