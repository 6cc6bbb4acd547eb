"""Loading a teacher (or a student) with its preprocessing, from a SPEC; saving and reading a run's weights.

SPEC is `timm:NAME`, `torchvision:NAME`, `run:DIR` (a student trained by ferkd) or `python:MODULE:CALLABLE`. timm and torchvision are
imported only when a SPEC asks for them. Weights never bring code with them: files are read as safetensors or with weights_only=True.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import hashlib
import importlib
import inspect
import json
import logging
import os
import pickle
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, cast, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ferkd.classes import IMAGENET_VARIANTS, ClassNumbers, class_mapping, wordnet_ids
from ferkd.crops import Interpolation
from ferkd.errors import InputError

log = logging.getLogger(__name__)

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

RUN_WEIGHTS = ("best.safetensors", "last.safetensors")
PICKLED_WEIGHTS = (".pth", ".pt", ".th", ".bin")


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """What a model wants to be shown: square RGB images of `input_size` pixels, (x / 255 - mean) / std for each channel.

    `crop_pct` is the share of the shorter side that a centre view shows.
    Raises InputError when a value is of the wrong kind or outside what makes sense.
    """

    input_size: int = 224
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    interpolation: Interpolation = "bilinear"
    crop_pct: float = 0.875

    def __post_init__(self) -> None:
        if not isinstance(self.input_size, int) or isinstance(self.input_size, bool) or not 1 <= self.input_size <= 4096:
            raise InputError(f"input_size: {self.input_size!r} is not a number of pixels from 1 to 4,096")
        for name in ("mean", "std"):
            value = getattr(self, name)
            numbers = isinstance(value, (tuple, list)) and len(value) == 3 and all(isinstance(v, (int, float)) for v in value)
            if not numbers or not np.isfinite(value).all():
                raise InputError(f"{name}: {value!r} is not three numbers (red, green, blue; of pixels in [0, 1])")
            object.__setattr__(self, name, tuple(float(v) for v in value))
        if min(self.std) <= 0 or max(self.std) > 16 or max(self.mean) > 16:
            raise InputError(f"mean {self.mean}, std {self.std}: give them for pixels in [0, 1] (those of 0..255 divided by 255)")
        if self.interpolation not in get_args(Interpolation):
            raise InputError(f"interpolation: {self.interpolation!r} is unknown; choose one of {', '.join(get_args(Interpolation))}")
        if not isinstance(self.crop_pct, (int, float)) or not 0 < self.crop_pct <= 1:
            raise InputError(f"crop_pct: {self.crop_pct!r} is not a share of the shorter side above 0 and up to 1")

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**dataclasses.asdict(self), "mean": list(self.mean), "std": list(self.std)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Preprocessing:
        """The inverse of as_dict; missing keys take the defaults. Raises InputError on an unknown key."""
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(set(values) - known):
            raise InputError(f"preprocessing: unknown key(s) {', '.join(unknown)}; known are {', '.join(sorted(known))}")
        return cls(**values)

    def normalise(self, pixels: Tensor) -> Tensor:
        """uint8 [B, 3, H, W] -> float32 of the same shape, memory layout and device."""
        scale = 1.0 / (255.0 * torch.tensor(self.std, dtype=torch.float64))
        shift = -torch.tensor(self.mean, dtype=torch.float64) / torch.tensor(self.std, dtype=torch.float64)
        image = pixels.to(torch.float32)
        shape = (1, 3, 1, 1)
        return image.mul_(scale.to(image).view(shape)).add_(shift.to(image).view(shape))


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """A model ready to be shown images.

    `class_names`: by class index, None when nobody names them. `outputs`: the number of classes C. `assumed`: the preprocessing keys that
    the model's source did not give and that were filled in by default. `weights_sha256`: see weights_sha256(). `own_size`: the input size
    that the source gives, where `preprocessing` was told another.
    """

    model: nn.Module
    preprocessing: Preprocessing
    class_names: tuple[str, ...] | None
    spec: str
    weights_sha256: str
    outputs: int
    assumed: tuple[str, ...] = ()
    own_size: int | None = None


def load_teacher(spec: str, weights: Path | None = None, input_size: int | None = None) -> LoadedModel:
    """load_model, in evaluation mode, without gradients, to be shown images of `input_size` pixels (default: the model's own).

    Raises InputError as load_model does, and when the model does not take images of that size.
    """
    loaded = load_model(spec, weights=weights, input_size=input_size)
    loaded.model.eval().requires_grad_(False)
    return loaded


def load_model(
    spec: str, *, num_classes: int | None = None, weights: Path | None = None, pretrained: bool = True, input_size: int | None = None
) -> LoadedModel:
    """The model that SPEC names, on the CPU, with its preprocessing and, where known, its class names.

    `num_classes`: another number of classes than the SPEC's own (its last layer is then new). `weights`: a local file, instead of a
    download. `input_size`: the size of the images it will be shown, where that differs from the model's own.

    Raises InputError when the SPEC names nothing, its library is not installed, its weights cannot be had or do not fit, or when
    the model cannot be run on images of its size or does not answer [B, C].
    """
    if spec.startswith("run:"):
        if weights is not None or num_classes is not None:
            raise InputError(f"{spec}: a run brings its own weights and classes; name the architecture (timm:NAME) to load others")
        loaded = load_run(Path(spec.removeprefix("run:")))
        own = loaded.preprocessing.input_size
        if input_size is not None:
            loaded = dataclasses.replace(loaded, preprocessing=dataclasses.replace(loaded.preprocessing, input_size=input_size))
        outputs = count_outputs(loaded.model, loaded.preprocessing.input_size, spec)
        return dataclasses.replace(loaded, spec=spec, outputs=outputs, own_size=own)

    state, metadata = read_weights(weights) if weights is not None else (None, {})
    download = pretrained and state is None
    built = _build(spec, num_classes, download, input_size, None)
    if state is not None:
        if num_classes is None and (classes := _classes_in(state, built.model)) is not None and not spec.startswith("python:"):
            built = _build(spec, classes, False, input_size, None)
        _fit_state(built.model, state, str(weights))
        if "ferkd_version" in metadata:
            classes_json, preprocessing = _read_metadata(metadata, str(weights))
            built = dataclasses.replace(built, class_names=classes_json, preprocessing=preprocessing, assumed=())
    preprocessing = built.preprocessing
    if input_size is not None:
        preprocessing = dataclasses.replace(preprocessing, input_size=input_size)
    outputs = count_outputs(built.model, preprocessing.input_size, spec)
    names = built.class_names if built.class_names is not None and len(built.class_names) == outputs else None
    if built.class_names is not None and names is None and num_classes is None and spec.startswith("python:"):
        raise InputError(f"{spec}: names {len(built.class_names):,} classes but answers {outputs:,}; name every output once")
    assumed = tuple(key for key in built.assumed if key != "input_size" or input_size is None)
    own_size = None if "input_size" in built.assumed else built.preprocessing.input_size
    return LoadedModel(built.model, preprocessing, names, spec, weights_sha256(built.model), outputs, assumed, own_size)


def build_model(
    spec: str, *, num_classes: int, pretrained: bool = False, drop_path_rate: float | None = None, input_size: int | None = None
) -> tuple[nn.Module, Preprocessing]:
    """A student: a new model of `num_classes` outputs from `timm:NAME`, `NAME` (= timm), `torchvision:NAME` or `python:MODULE:CALLABLE`.

    A python callable is called with num_classes=... `pretrained` takes the library's weights for all but the last layer.
    `input_size` is put into the preprocessing (default: the architecture's own) and tells a ViT how many positions to have.
    Raises InputError as load_model does.
    """
    if ":" not in spec:
        spec = f"timm:{spec}"
    built = _build(spec, num_classes, pretrained, input_size, drop_path_rate)
    preprocessing = built.preprocessing
    if input_size is not None:
        preprocessing = dataclasses.replace(preprocessing, input_size=input_size)
    return built.model, preprocessing


def load_run(path: Path) -> LoadedModel:
    """A model trained by ferkd: `path` is a weights file written by save_weights, or a run's folder (its best weights, else the last).

    Raises InputError when there is none, when the file was not written by ferkd, or when it does not fit its architecture.
    """
    path = Path(path)
    if path.is_dir():
        found = [path / name for name in RUN_WEIGHTS if (path / name).is_file()]
        if not found:
            raise InputError(f"{path}: holds neither {' nor '.join(RUN_WEIGHTS)}; give the folder of a finished ferkd train run")
        path = found[0]
    state, metadata = read_weights(path)
    if "ferkd_version" not in metadata:
        raise InputError(f"{path}: was not written by ferkd train (no metadata); name its architecture, timm:NAME, and pass it as weights")
    classes, preprocessing = _read_metadata(metadata, str(path))
    architecture = metadata["architecture"]
    if architecture.startswith("run:"):
        raise InputError(f"{path}: its architecture is {architecture!r}, another run")
    model, _ = build_model(architecture, num_classes=len(classes), input_size=preprocessing.input_size)
    _fit_state(model, state, str(path))
    return LoadedModel(model, preprocessing, classes, f"run:{path}", weights_sha256(model), len(classes), (), preprocessing.input_size)


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
    timm.create_model(NAME, checkpoint_path=path) loads it. Raises InputError naming the file when it cannot be written.
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
        save_file(tensors, aside, metadata)
        with open(aside, "rb+") as file:
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


def weights_sha256(model: nn.Module) -> str:
    """SHA-256 over the state's sorted names, shapes, dtypes and bytes (little-endian, as in memory)."""
    digest = hashlib.sha256()
    for name, tensor in sorted(_without_prefixes(dict(model.state_dict())).items()):
        digest.update(f"{name}\0{tuple(tensor.shape)}\0{tensor.dtype}\0".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        if flat.numel():
            digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


# ---- Answers -------------------------------------------------------------------------------------------------------------------


ClassChoice = Literal["teacher", "folder"]


@dataclasses.dataclass(frozen=True)
class TeacherClasses:
    """Which of the teacher's outputs are kept, and which of these each folder means.

    `names`: the C names of the classes kept, by class id; a folder's class carries the folder's name. `columns`: int64 [C], the
    teacher's output of each, None when all are kept in their order. `class_of_folder`: int64 [F], the class id of each folder.
    """

    choice: ClassChoice
    names: tuple[str, ...]
    columns: Tensor | None
    class_of_folder: NDArray[np.int64]

    def select(self, logits: Tensor) -> Tensor:
        """[B, outputs] -> [B, C]."""
        return logits if self.columns is None else logits.index_select(1, self.columns.to(logits.device))


def choose_classes(
    choice: ClassChoice, folders: Sequence[str], teacher: LoadedModel, numbers: ClassNumbers | None = None
) -> TeacherClasses:
    """`teacher`: all of the teacher's outputs; `folder`: only the folders' classes, in the sorted order of the folders, so that the softmax
    is over these alone. `numbers`: the dataset's own. Raises InputError when a folder
    has no class (see class_mapping)."""
    mapping = class_mapping(folders, teacher.class_names, teacher.outputs, numbers)
    outputs = np.array([mapping[folder] for folder in folders], np.int64)
    if choice == "folder":
        if len(folders) < 2:
            raise InputError(f"classes: 'folder' leaves {len(folders)} class; a label needs at least 2: use --classes teacher")
        order = sorted(range(len(folders)), key=lambda i: folders[i])
        class_of_folder = np.empty(len(folders), np.int64)
        class_of_folder[order] = np.arange(len(folders))
        return TeacherClasses("folder", tuple(folders[i] for i in order), torch.from_numpy(outputs[order]), class_of_folder)
    names = list(teacher.class_names or [])
    if not names and teacher.outputs in IMAGENET_VARIANTS and any(folder.startswith("n") for folder in folders):
        names = wordnet_ids(teacher.outputs)
    names = names or [f"class {i}" for i in range(teacher.outputs)]
    for folder, output in zip(folders, outputs, strict=True):
        names[output] = folder
    return TeacherClasses("teacher", tuple(names), None, outputs)


def answer_logits(model: nn.Module, preprocessing: Preprocessing, pixels: Tensor, autocast: torch.dtype | None = None) -> Tensor:
    """All of the model's outputs, float32 [B, outputs], for uint8 pixels [B, 3, S, S] on the model's device. No gradients."""
    with torch.inference_mode():
        if autocast is None:
            logits: Tensor = model(preprocessing.normalise(pixels))
        else:
            with torch.autocast(pixels.device.type, autocast):
                logits = model(preprocessing.normalise(pixels))
        return logits.float()


# ---- Weights files -------------------------------------------------------------------------------------------------------------


def read_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """A weights file's tensors by name, and its metadata (safetensors only; otherwise empty).

    Reads .safetensors, and .pth/.pt/.th/.bin with weights_only=True: tensors, never code. A training checkpoint is unwrapped
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
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise InputError(
            f"{path}: holds more than tensors, and ferkd never unpickles code. Where you trust it, save its weights alone: "
            "torch.save(model.state_dict(), FILE), or as safetensors"
        ) from error
    except MemoryError:
        raise
    except Exception as error:  # what a damaged file makes of the unpickler: IndexError, TypeError, struct.error ...
        raise InputError(f"{path}: not a whole PyTorch weights file ({_one_line(error)}); fetch or write it again") from error
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
        raise InputError(f"{path}: holds no tensors by name (its keys: {_few(list(map(str, content)))}); save model.state_dict()")
    return _without_prefixes(state), {}


def load_state(model: nn.Module, path: Path) -> None:
    """Loads a weights file (see read_weights) into the model. Raises InputError when anything is missing, left over or of another shape."""
    _fit_state(model, read_weights(path)[0], str(path))


def _fit_state(model: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
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
        found.append(f"{len(shapes):,} of another shape ({_few(shapes)})")
    if missing:
        found.append(f"{len(missing):,} missing ({_few(missing)})")
    if extra:
        found.append(f"{len(extra):,} unknown ({_few(extra)})")
    classes = _classes_in(state, model)
    advice = (
        f"the file is for {classes:,} classes, the model has {_last_rows(model):,}"
        if classes is not None
        else "these are the weights of another architecture"
    )
    raise InputError(f"{source}: its {len(state):,} tensors do not fit {type(model).__name__}: {'; '.join(found)}; {advice}")


def _classes_in(state: Mapping[str, Tensor], model: nn.Module) -> int | None:
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


def _read_metadata(metadata: Mapping[str, str], source: str) -> tuple[tuple[str, ...], Preprocessing]:
    """Class names and preprocessing from the metadata that save_weights wrote."""
    try:
        classes = json.loads(metadata["classes"])
        preprocessing = json.loads(metadata["preprocessing"])
        metadata["architecture"]
    except (KeyError, json.JSONDecodeError) as error:
        raise InputError(f"{source}: its metadata is incomplete ({_one_line(error)}); write it again with this version of ferkd") from error
    if not isinstance(classes, list) or not classes or not isinstance(preprocessing, dict):
        raise InputError(f"{source}: its metadata names no classes or no preprocessing; write it again with this version of ferkd")
    return tuple(map(str, classes)), Preprocessing.from_dict(preprocessing)


# ---- The kinds of SPEC ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Built:
    model: nn.Module
    preprocessing: Preprocessing
    class_names: tuple[str, ...] | None = None
    assumed: tuple[str, ...] = ()


def _build(spec: str, num_classes: int | None, pretrained: bool, input_size: int | None, drop_path_rate: float | None) -> _Built:
    kind, _, name = spec.partition(":")
    if not name or kind not in ("timm", "torchvision", "python"):
        raise InputError(f"{spec!r} names no model; write timm:NAME, torchvision:NAME, run:DIR or python:MODULE:CALLABLE")
    if kind == "timm":
        return _build_timm(name, num_classes, pretrained, input_size, drop_path_rate)
    if drop_path_rate:
        raise InputError(f"drop_path_rate: {drop_path_rate} can be set for timm models only, not for {spec}")
    if kind == "torchvision":
        return _build_torchvision(name, num_classes, pretrained)
    return _call_python(spec, name, num_classes)


def _build_timm(name: str, num_classes: int | None, pretrained: bool, input_size: int | None, drop_path_rate: float | None) -> _Built:
    timm = _import_library("timm", f"timm:{name}")
    architecture = name.partition(".")[0]
    if not timm.is_model(architecture):
        near = difflib.get_close_matches(architecture, timm.list_models(), n=3, cutoff=0.6)
        raise InputError(f"timm:{name}: timm has no such model{'; did you mean ' + ' or '.join(near) + '?' if near else ''}")
    options: dict[str, Any] = {}
    if num_classes is not None:
        options["num_classes"] = num_classes
    if drop_path_rate:
        options["drop_path_rate"] = drop_path_rate
    config = timm.get_pretrained_cfg(name, allow_unregistered=True)
    if input_size is not None and config is not None and config.fixed_input_size and input_size != config.input_size[-1]:
        options["img_size"] = input_size
    try:
        model = timm.create_model(name, pretrained=pretrained, **options)
    except Exception as error:  # timm and the hub raise whatever they like: no such tag, no weights, no network
        if pretrained:
            raise InputError(_no_download(f"timm:{name}", error)) from error
        raise InputError(f"timm:{name}: could not be built ({_one_line(error)})") from error
    data = timm.data.resolve_model_data_config(model)
    channels, height, width = data["input_size"]
    if channels != 3 or height != width:
        raise InputError(f"timm:{name}: wants images of {channels} x {height} x {width}; ferkd shows square RGB images only")
    interpolation, assumed = _interpolation(data["interpolation"])
    preprocessing = Preprocessing(height, tuple(data["mean"]), tuple(data["std"]), interpolation, float(data["crop_pct"]))
    return _Built(model, preprocessing, None, assumed)


def _build_torchvision(name: str, num_classes: int | None, pretrained: bool) -> _Built:
    models = _import_library("torchvision.models", f"torchvision:{name}")
    if name not in models.list_models(module=models):
        near = difflib.get_close_matches(name, models.list_models(module=models), n=3, cutoff=0.6)
        raise InputError(
            f"torchvision:{name}: torchvision has no such classifier{'; did you mean ' + ' or '.join(near) + '?' if near else ''}"
        )
    weights = models.get_model_weights(name).DEFAULT
    categories: list[str] = weights.meta["categories"]
    if pretrained and num_classes not in (None, len(categories)):
        raise InputError(
            f"torchvision:{name}: pretrained weights have {len(categories):,} classes, not {num_classes:,}; "
            "use the model's timm name to fine-tune with a new last layer, or start without pretrained weights"
        )
    try:
        if pretrained:
            model = models.get_model(name, weights=weights)
        else:
            model = models.get_model(name, weights=None, num_classes=num_classes or len(categories))
    except Exception as error:
        if pretrained:
            raise InputError(_no_download(f"torchvision:{name}", error)) from error
        raise InputError(f"torchvision:{name}: could not be built ({_one_line(error)})") from error
    shown = weights.transforms()
    interpolation, assumed = _interpolation(shown.interpolation.value)
    preprocessing = Preprocessing(
        input_size=shown.crop_size[0],
        mean=tuple(shown.mean),
        std=tuple(shown.std),
        interpolation=interpolation,
        crop_pct=min(1.0, shown.crop_size[0] / shown.resize_size[0]),
    )
    return _Built(model, preprocessing, tuple(categories) if num_classes in (None, len(categories)) else None, assumed)


def _call_python(spec: str, name: str, num_classes: int | None) -> _Built:
    module_name, _, attribute = name.partition(":")
    if not module_name or not attribute:
        raise InputError(f"{spec}: write python:MODULE:CALLABLE, a function of an importable module (or of MODULE.py in this folder)")
    here = os.getcwd()
    if here not in sys.path and "" not in sys.path:
        sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is not None and (module_name + ".").startswith(error.name + "."):
            raise InputError(f"{spec}: no module {module_name!r}, neither installed nor in {here}") from error
        raise InputError(f"{spec}: importing it failed: {_one_line(error)}; install what it needs") from error
    except Exception as error:
        raise InputError(f"{spec}: importing it raised {type(error).__name__}: {_one_line(error)}") from error
    function = getattr(module, attribute, None)
    if not callable(function):
        raise InputError(f"{spec}: {getattr(module, '__file__', module_name)} has no callable {attribute!r}")
    options = {}
    if num_classes is not None:
        try:
            parameters: Mapping[str, inspect.Parameter] = inspect.signature(function).parameters
        except ValueError:  # built-in functions do not tell
            parameters = {}
        if "num_classes" not in parameters and not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            raise InputError(f"{spec}: takes no num_classes, which a student needs; write def {attribute}(num_classes)")
        options["num_classes"] = num_classes
    try:
        answer = function(**options)
    except Exception as error:
        raise InputError(f"{spec}: calling it raised {type(error).__name__}: {_one_line(error)}") from error
    model, settings = answer if isinstance(answer, tuple) and len(answer) == 2 else (answer, {})
    if not isinstance(model, nn.Module) or not isinstance(settings, Mapping):
        raise InputError(f"{spec}: returned {type(answer).__name__}; return an nn.Module, or a pair of it and a dict of its preprocessing")
    known = [field.name for field in dataclasses.fields(Preprocessing)]
    if unknown := sorted(set(settings) - {*known, "classes"}):
        raise InputError(f"{spec}: its dict has unknown key(s) {', '.join(map(repr, unknown))}; known are {', '.join(known)}, classes")
    try:
        preprocessing = Preprocessing.from_dict({key: value for key, value in settings.items() if key != "classes"})
    except InputError as error:
        raise InputError(f"{spec}: {error}") from error
    classes = settings.get("classes")
    if classes is not None and (not isinstance(classes, (list, tuple)) or not all(isinstance(c, str) for c in classes)):
        raise InputError(f"{spec}: classes: give a list of folder names by class index")
    # crop_pct only decides what a centre view shows, so its default is no assumption about the model.
    assumed = tuple(key for key in known if key not in settings and key != "crop_pct")
    return _Built(model, preprocessing, tuple(classes) if classes is not None else None, assumed)


def _interpolation(name: str) -> tuple[Interpolation, tuple[str, ...]]:
    """A library's interpolation, or the nearest that ferkd has; and what was thereby assumed."""
    known = {"bilinear": "bilinear", "bicubic": "bicubic"}
    return cast(Interpolation, known.get(name, "bicubic" if name == "lanczos" else "bilinear")), () if name in known else ("interpolation",)


def _import_library(name: str, spec: str) -> Any:
    library = name.partition(".")[0]
    try:
        module: ModuleType = importlib.import_module(name)
        if name == "timm":
            importlib.import_module("timm.data")
    except ImportError as error:
        wanted = "ferkd[timm]" if library == "timm" else library
        raise InputError(f"{spec}: needs {library}, which is not installed; pip install {wanted}") from error
    return module


def _no_download(spec: str, error: Exception) -> str:
    return (
        f"{spec}: its pretrained weights could not be fetched ({type(error).__name__}: {_one_line(error)}); "
        "download them where there is a network and pass the file with --teacher-weights FILE"
    )


def count_outputs(model: nn.Module, size: int, spec: str, size_flag: str = "--input-size") -> int:
    """The number of classes, found by showing the model two grey images (in evaluation mode, so that nothing is learnt from them).

    Raises InputError when the model fails on images of `size` pixels (which `size_flag` sets) or does not answer [B, C] with C > 1.
    """
    was_training = model.training
    model.eval()
    parameter = next(model.parameters(), None)
    device = parameter.device if parameter is not None else torch.device("cpu")
    try:
        with torch.inference_mode():
            answer = model(torch.zeros(2, 3, size, size, device=device))
    except Exception as error:
        raise InputError(
            f"{spec}: fails on images of {size} x {size} pixels ({type(error).__name__}: {_one_line(error)}); "
            f"give the size that it wants, {size_flag} PX"
        ) from error
    finally:
        model.train(was_training)
    if not isinstance(answer, Tensor) or answer.ndim != 2 or answer.shape[0] != 2 or not answer.is_floating_point():
        found = f"a tensor of shape {tuple(answer.shape)}" if isinstance(answer, Tensor) else f"a {type(answer).__name__}"
        raise InputError(f"{spec}: answers two images with {found}; a classifier answers logits of shape [2, classes]")
    if answer.shape[1] < 2:
        raise InputError(f"{spec}: has {answer.shape[1]} output; a classifier has at least 2 classes")
    return int(answer.shape[1])


def _one_line(error: BaseException, most: int = 200) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= most else text[: most - 3] + "..."


def _few(items: Sequence[str], most: int = 3) -> str:
    return ", ".join(items[:most]) + (", ..." if len(items) > most else "")
