"""Loading a teacher (or a student) with its preprocessing, from a SPEC; which classes it answers for.

SPEC is `timm:NAME`, `torchvision:NAME`, `run:DIR` (a student trained by ferkd) or `python:MODULE:CALLABLE`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ferkd.classes import IMAGENET_VARIANTS, ClassNumbers, class_mapping, wordnet_ids
from ferkd.errors import InputError
from ferkd.preprocessing import Preprocessing
from ferkd.specs import build, count_outputs
from ferkd.weights import RUN_WEIGHTS, classes_in, fit_state, read_metadata, read_weights, weights_sha256


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
    for_weights = state is not None and "ferkd_version" not in metadata
    built = build(spec, num_classes, download, input_size, None, for_weights=for_weights)
    if state is not None:
        if num_classes is None and (classes := classes_in(state, built.model)) is not None and not spec.startswith("python:"):
            built = build(spec, classes, False, input_size, None, for_weights=for_weights)
        fit_state(built.model, state, str(weights))
        if "ferkd_version" in metadata:
            classes_json, preprocessing = read_metadata(metadata, str(weights))
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
    built = build(spec, num_classes, pretrained, input_size, drop_path_rate)
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
    elif not path.exists():
        raise InputError(f"{path}: no such run; give the --out folder of ferkd train, or a weights file in it")
    state, metadata = read_weights(path)
    if "ferkd_version" not in metadata:
        raise InputError(f"{path}: was not written by ferkd train (no metadata); name its architecture, timm:NAME, and pass it as weights")
    classes, preprocessing = read_metadata(metadata, str(path))
    architecture = metadata["architecture"]
    if architecture.startswith("run:"):
        raise InputError(f"{path}: its architecture is {architecture!r}, another run")
    model, _ = build_model(architecture, num_classes=len(classes), input_size=preprocessing.input_size)
    fit_state(model, state, str(path))
    return LoadedModel(model, preprocessing, classes, f"run:{path}", weights_sha256(model), len(classes), (), preprocessing.input_size)


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

    def to(self, device: torch.device) -> TeacherClasses:
        """The same for logits on `device`: `select` copies `columns` there else, and the host waits for the GPU at every batch."""
        return self if self.columns is None else dataclasses.replace(self, columns=self.columns.to(device))

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
