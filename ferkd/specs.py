"""The kinds of SPEC that name a model: `timm:NAME`, `torchvision:NAME`, `python:MODULE:CALLABLE`.

timm and torchvision are imported only when a SPEC asks for them.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import inspect
import os
import sys
from collections.abc import Mapping
from types import ModuleType
from typing import Any, cast

import torch
from torch import Tensor, nn

from ferkd.crops import Interpolation
from ferkd.errors import InputError, one_line
from ferkd.preprocessing import Preprocessing


@dataclasses.dataclass(frozen=True)
class Built:
    model: nn.Module
    preprocessing: Preprocessing
    class_names: tuple[str, ...] | None = None
    assumed: tuple[str, ...] = ()


def build(
    spec: str, num_classes: int | None, pretrained: bool, input_size: int | None, drop_path_rate: float | None, *, for_weights: bool = False
) -> Built:
    """The model of a SPEC. `for_weights`: to be given the library's own weights from a file, so built as the library builds it for them.

    Raises InputError as load_model does.
    """
    kind, _, name = spec.partition(":")
    if not name or kind not in ("timm", "torchvision", "python"):
        guess = f"run:{spec}" if os.path.exists(spec) else f"timm:{spec}" if spec and ":" not in spec else ""
        advice = f" (perhaps {guess})" if guess else ""
        raise InputError(f"{spec!r} names no model; write timm:NAME, torchvision:NAME, run:DIR or python:MODULE:CALLABLE{advice}")
    if kind == "timm":
        return _build_timm(name, num_classes, pretrained, input_size, drop_path_rate)
    if drop_path_rate:
        raise InputError(f"drop_path_rate: {drop_path_rate} can be set for timm models only, not for {spec}")
    if kind == "torchvision":
        return _build_torchvision(name, num_classes, pretrained, input_size, for_weights)
    return _call_python(spec, name, num_classes)


def _build_timm(name: str, num_classes: int | None, pretrained: bool, input_size: int | None, drop_path_rate: float | None) -> Built:
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
        raise InputError(f"timm:{name}: could not be built ({one_line(error)})") from error
    data = timm.data.resolve_model_data_config(model)
    channels, height, width = data["input_size"]
    if channels != 3 or height != width:
        raise InputError(f"timm:{name}: wants images of {channels} x {height} x {width}; ferkd shows square RGB images only")
    interpolation, assumed = _interpolation(data["interpolation"])
    preprocessing = Preprocessing(height, tuple(data["mean"]), tuple(data["std"]), interpolation, float(data["crop_pct"]))
    return Built(model, preprocessing, None, assumed)


BUILT_FOR_WEIGHTS: dict[str, dict[str, Any]] = {"googlenet": {"transform_input": True}, "inception_v3": {"transform_input": True}}
"""What torchvision tells models only where it loads their weights itself: these turn ImageNet's normalisation into their own."""


def _build_torchvision(name: str, num_classes: int | None, pretrained: bool, input_size: int | None, for_weights: bool) -> Built:
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
            own = dict(BUILT_FOR_WEIGHTS.get(name, {})) if for_weights else {}
            if for_weights and name.startswith("vit_"):  # one size has its own positions
                own["image_size"] = input_size or weights.meta["min_size"][0]
            model = models.get_model(name, weights=None, num_classes=num_classes or len(categories), **own)
    except Exception as error:
        if pretrained:
            raise InputError(_no_download(f"torchvision:{name}", error)) from error
        raise InputError(f"torchvision:{name}: could not be built ({one_line(error)})") from error
    shown = weights.transforms()
    interpolation, assumed = _interpolation(shown.interpolation.value)
    preprocessing = Preprocessing(
        input_size=shown.crop_size[0],
        mean=tuple(shown.mean),
        std=tuple(shown.std),
        interpolation=interpolation,
        crop_pct=min(1.0, shown.crop_size[0] / shown.resize_size[0]),
    )
    return Built(model, preprocessing, tuple(categories) if num_classes in (None, len(categories)) else None, assumed)


def _call_python(spec: str, name: str, num_classes: int | None) -> Built:
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
        raise InputError(f"{spec}: importing it failed: {one_line(error)}; install what it needs") from error
    except Exception as error:
        raise InputError(f"{spec}: importing it raised {type(error).__name__}: {one_line(error)}") from error
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
        raise InputError(f"{spec}: calling it raised {type(error).__name__}: {one_line(error)}") from error
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
    return Built(model, preprocessing, tuple(classes) if classes is not None else None, assumed)


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
        wanted = "'ferkd[timm]'" if library == "timm" else library
        raise InputError(f"{spec}: needs {library}, which is not installed; pip install {wanted}") from error
    return module


def _no_download(spec: str, error: Exception) -> str:
    return (
        f"{spec}: its pretrained weights could not be fetched ({type(error).__name__}: {one_line(error)}); "
        "download them where there is a network and pass the file with --teacher-weights FILE (for a student: --init FILE)"
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
        with torch.no_grad():  # not inference_mode: what a model makes at its first forward and keeps could not be trained with
            answer = model(torch.zeros(2, 3, size, size, device=device))
    except Exception as error:
        raise InputError(
            f"{spec}: fails on images of {size} x {size} pixels ({type(error).__name__}: {one_line(error)}); "
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
