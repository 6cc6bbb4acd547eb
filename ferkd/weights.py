"""A model's weights as files: written with what is needed to load them anywhere, read without ever running code from them."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import logging
import os
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from ferkd.errors import InputError, few, one_line
from ferkd.preprocessing import Preprocessing

log = logging.getLogger(__name__)

RUN_WEIGHTS = ("best.safetensors", "last.safetensors")
PICKLED_WEIGHTS = (".pth", ".pt", ".th", ".bin", ".tar")


def save_weights(
    path: Path,
    model: nn.Module,
    architecture: str,
    classes: Sequence[str],
    preprocessing: Preprocessing,
    extra: Mapping[str, str] | None = None,
) -> None:
    """Writes the model's state as safetensors with what load_run needs in the metadata; whole or not at all.

    The tensor names are the plain model's (no `module.` of DDP, no `_orig_mod.` of torch.compile), so that
    timm.create_model(NAME, checkpoint_path=path) loads it. The same weights and metadata give the same bytes.

    Raises InputError naming the file when it cannot be written.
    """
    from ferkd import __version__

    metadata = {
        **(extra or {}),
        "architecture": architecture if ":" in architecture else f"timm:{architecture}",
        "classes": json.dumps(list(classes), ensure_ascii=False),
        "preprocessing": json.dumps(preprocessing.as_dict()),
        "ferkd_version": __version__,
    }
    tensors: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, tensor in _without_prefixes(dict(model.state_dict())).items():
        plain = tensor.detach().cpu().contiguous()
        # Safetensors refuses tensors that share memory (tied layers); each name gets its own copy, as load_state_dict expects.
        if plain.untyped_storage().data_ptr() in storages:
            plain = plain.clone()
        storages.add(plain.untyped_storage().data_ptr())
        tensors[name] = plain
    path = Path(path)
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(aside, "wb") as file:
            file.writelines(_in_order(save(tensors, metadata)))
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except (OSError, SafetensorError) as error:
        with contextlib.suppress(OSError):
            aside.unlink()
        raise InputError(f"{path}: cannot be written ({error}); free some space or choose another folder") from error


def _in_order(content: bytes) -> tuple[bytes, bytes, memoryview]:
    """The same safetensors file, in pieces, with its metadata sorted: the library writes them in another order every time."""
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the tensors stay aligned
    return len(text).to_bytes(8, "little"), text, memoryview(content)[end:]


def weights_sha256(model: nn.Module) -> str:
    """SHA-256 over the state's sorted names, shapes, dtypes and bytes (little-endian, as in memory)."""
    digest = hashlib.sha256()
    for name, tensor in sorted(_without_prefixes(dict(model.state_dict())).items()):
        digest.update(f"{name}\0{tuple(tensor.shape)}\0{tensor.dtype}\0".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        if flat.numel():
            digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def read_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """A weights file's tensors by name, and its metadata (safetensors only; otherwise empty).

    Reads .safetensors, and .pth/.pt/.th/.bin/.pth.tar with weights_only=True: tensors and plain values (and the argparse.Namespace that
    timm's checkpoints hold), never code. A training checkpoint is unwrapped
    (state_dict, model, or their exponential moving average, which is preferred) and prefixes of DDP and torch.compile removed.
    Raises InputError naming the file.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such weights file")
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt") as file:
                return _without_prefixes({name: file.get_tensor(name) for name in file.keys()}), dict(file.metadata() or {})  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise InputError(f"{path}: not a whole safetensors file ({error}); fetch or write it again") from error
    if path.suffix not in PICKLED_WEIGHTS:
        raise InputError(f"{path}: unknown kind of weights file; ferkd reads .safetensors and {', '.join(PICKLED_WEIGHTS)}")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # which has no code of its own; timm saves its arguments as one
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise InputError(
            f"{path}: holds more than tensors, and ferkd never unpickles code. Where you trust it, save its weights alone: "
            "torch.save(model.state_dict(), FILE), or as safetensors"
        ) from error
    except MemoryError:
        raise
    except Exception as error:  # what a damaged file makes of the unpickler: IndexError, TypeError, struct.error ...
        raise InputError(f"{path}: not a whole PyTorch weights file ({one_line(error)}); fetch or write it again") from error
    wrappers = ("state_dict_ema", "model_ema", "state_dict", "model")
    if isinstance(content, Mapping):
        for key in wrappers:
            if isinstance(content.get(key), Mapping):
                log.info("%s: a training checkpoint; taking its %r", path, key)
                content = content[key]
                break
    if not isinstance(content, Mapping):
        raise InputError(f"{path}: holds a {type(content).__name__}, not tensors by name; save model.state_dict()")
    state = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
    if not state:
        raise InputError(f"{path}: holds no tensors by name (its keys: {few(list(map(str, content)))}); save model.state_dict()")
    return _without_prefixes(state), {}


def load_state(model: nn.Module, path: Path, *, new_last_layer: bool = False) -> str | None:
    """Loads a weights file (see read_weights) into the model.

    `new_last_layer`: weights of the same network for another number of classes are taken but for those that depend on that number, which
    stay as the model has them; returns the line that says so. Raises InputError when anything is missing, left over or of another shape.
    """
    state = read_weights(path)[0]
    classes = classes_in(state, model) if new_last_layer else None
    if classes is None:
        fit_state(model, state, str(path))
        return None
    own = model.state_dict()
    left = [name for name in state if state[name].shape != own[name].shape]
    fit_state(model, {name: own[name] if name in left else tensor for name, tensor in state.items()}, str(path))
    return f"{path}: is for {classes:,} classes, the student has {_last_rows(model):,}: {few(left)} begin anew, the rest is taken"


def fit_state(model: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    own = model.state_dict()
    shapes = [
        f"{name} {tuple(state[name].shape)} instead of {tuple(own[name].shape)}"
        for name in own
        if name in state and state[name].shape != own[name].shape
    ]
    # A BatchNorm's counter of batches is absent from old files and plays no part in evaluation.
    missing = [name for name in own if name not in state and not name.endswith("num_batches_tracked")]
    extra = [name for name in state if name not in own]
    if not (shapes or missing or extra):
        model.load_state_dict(dict(state), strict=False)
        return
    found = []
    if shapes:
        found.append(f"{len(shapes):,} of another shape ({few(shapes)})")
    if missing:
        found.append(f"{len(missing):,} missing ({few(missing)})")
    if extra:
        found.append(f"{len(extra):,} unknown ({few(extra)})")
    classes = classes_in(state, model)
    advice = (
        f"the file is for {classes:,} classes, the model has {_last_rows(model):,}"
        if classes is not None
        else "these are the weights of another architecture"
    )
    raise InputError(f"{source}: its {len(state):,} tensors do not fit {type(model).__name__}: {'; '.join(found)}; {advice}")


def classes_in(state: Mapping[str, Tensor], model: nn.Module) -> int | None:
    """The number of classes of `state`, when the model differs from it in nothing but that number."""
    own = model.state_dict()
    if set(state) - set(own):
        return None
    different = [(own[name].shape, state[name].shape) for name in state if own[name].shape != state[name].shape]
    counts = {(old[0], new[0]) for old, new in different if len(old) == len(new) and old[1:] == new[1:] and len(new)}
    if len(counts) != 1 or any(old[1:] != new[1:] for old, new in different):
        return None
    return next(iter(counts))[1]


def _last_rows(model: nn.Module) -> int:
    return next((tensor.shape[0] for tensor in reversed(list(model.state_dict().values())) if tensor.ndim), 0)


def _without_prefixes(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names as the plain model has them: without the `module.` of DDP or weight averaging and the `_orig_mod.` of torch.compile."""
    while True:
        for prefix in ("module.", "_orig_mod."):
            if state and all(name.startswith(prefix) for name in state if name != "n_averaged"):
                state = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name != "n_averaged"}
                break
        else:
            return state


def read_metadata(metadata: Mapping[str, str], source: str) -> tuple[tuple[str, ...], Preprocessing]:
    """Class names and preprocessing from the metadata that save_weights wrote."""
    try:
        classes = json.loads(metadata["classes"])
        preprocessing = json.loads(metadata["preprocessing"])
        metadata["architecture"]
    except (KeyError, json.JSONDecodeError) as error:
        raise InputError(f"{source}: its metadata is incomplete ({one_line(error)}); write it again with this version of ferkd") from error
    if not isinstance(classes, list) or not classes or not isinstance(preprocessing, dict):
        raise InputError(f"{source}: its metadata names no classes or no preprocessing; write it again with this version of ferkd")
    return tuple(map(str, classes)), Preprocessing.from_dict(preprocessing)
