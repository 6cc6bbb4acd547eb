"""Writes docs/api.md from the signatures and docstrings of what ferkd offers to other people's code.

python docs/make_api.py            (a test compares)
"""

from __future__ import annotations

import dataclasses
import enum
import importlib
import inspect
import re
from pathlib import Path
from typing import Any

import ferkd

MODULES = {
    "The loss": {"ferkd": ["ferkd_loss", "FerKDLoss", "LossStats", "Records"], "ferkd.loss": ["label_mass"]},
    "The rule": {"ferkd": ["RegionPolicy", "Region"], "ferkd.quantiles": ["quantile_policy"]},
    "Stores": {"ferkd": ["LabelStore"], "ferkd.store": ["ImageLabels", "StoreWriter", "StorePlan", "LabelledImage"]},
    "Crops and batches": {
        "ferkd": ["CropLoader"],
        "ferkd.data": ["CropBatch"],
        "ferkd.crops": ["CropSettings", "draw_crops", "decode", "take_crop"],
        "ferkd.mixing": ["Mixing", "draw_mixing", "mix_pixels", "MixedRows"],
    },
    "Whole jobs": {
        "ferkd.labeling": ["label", "LabelSettings"],
        "ferkd.task": ["Job"],
        "ferkd.train": ["train"],
        "ferkd.recipes": ["TrainConfig", "recipe"],
        "ferkd.evaluation": ["evaluate_model", "Accuracy"],
        "ferkd.teacher": ["load_teacher", "load_run"],
        "ferkd.preprocessing": ["Preprocessing"],
    },
    "Errors": {"ferkd.errors": ["InputError", "StoreError", "CheckFailed", "Stopped"]},
}


def page() -> str:
    parts = [
        "# The Python interface",
        f"What `import ferkd` (version {ferkd.__version__}) and its modules offer; everything else may change without notice. "
        "Made from the code by `python docs/make_api.py`.",
    ]
    for title, modules in MODULES.items():
        parts.append(f"## {title}")
        for module, names in modules.items():
            parts += [described(module, name) for name in names]
    return "\n\n".join(parts) + "\n"


def described(module: str, name: str) -> str:
    thing = getattr(importlib.import_module(module), name)
    parts = [f"### `{module}.{name}`"]
    if inspect.isclass(thing):
        parts += [*call(name, thing), text(thing), *fields(thing), *methods(thing)]
    else:
        parts += [*call(name, thing), text(thing)]
    return "\n\n".join(part for part in parts if part)


def call(name: str, thing: Any) -> list[str]:
    """The signature in a block of code; none where the fields say it all."""
    if inspect.isclass(thing) and (dataclasses.is_dataclass(thing) or issubclass(thing, (tuple, enum.Enum, Exception))):
        return []
    signature = unquoted(str(inspect.signature(thing)))
    # A default is shown by its class alone: its whole text would fill the page.
    signature = re.sub(r"= (\w+)\([^()]*\)", r"= \1()", signature)
    if len(name + signature) > 100:
        signature = re.sub(r", (?=[\w*]+(?:: |, |=|\)))(?![^\[]*\])", ",\n    ", signature).replace("(", "(\n    ", 1)
    return [f"```python\n{name}{signature}\n```"]


def unquoted(signature: str) -> str:
    """Without the quotes of postponed annotations; those of default values stay."""
    signature = re.sub(r"<function (\w+) at 0x\w+>", r"\1", signature)
    return re.sub(r"(: |-> )'([^']*)'", r"\1\2", signature)


def text(thing: Any) -> str:
    """The docstring; a table of arguments in it becomes a list."""
    paragraphs = inspect.cleandoc(thing.__doc__ or "").split("\n\n")
    return "\n\n".join(listed(paragraph) if re.match(r"\w+ {3,}\S", paragraph) else paragraph for paragraph in paragraphs)


def listed(paragraph: str) -> str:
    items: list[str] = []
    for line in paragraph.splitlines():
        if named := re.match(r"(\w+) {2,}(\S.*)", line):
            items.append(f"- `{named[1]}`: {named[2]}")
        else:
            items[-1] += f" {line.strip()}"
    return "\n".join(items)


def fields(thing: Any) -> list[str]:
    """Fields of a dataclass or a named tuple, each with the words written below it."""
    if issubclass(thing, enum.Enum):
        return ["\n".join(f"- `{member.name}` = {member.value}" for member in thing)]
    names = list(getattr(thing, "_fields", ())) or (
        [field.name for field in dataclasses.fields(thing) if not field.name.startswith("_")] if dataclasses.is_dataclass(thing) else []
    )
    if not names:
        return []
    words = dict(re.findall(r'^    (\w+): [^\n]*\n    """(.*?)"""', inspect.getsource(thing), re.M | re.S))
    kinds = thing.__annotations__
    lines = []
    for name in names:
        default = default_of(thing, name)
        about = f": {' '.join(words[name].split())}" if name in words else ""
        kind = str(getattr(kinds[name], "__forward_arg__", kinds[name])).replace("DataFlag", "str | Path")  # with a word for --help
        lines.append(f"- `{name}: {kind}{default}`{about}")
    return ["\n".join(lines)]


def default_of(thing: Any, name: str) -> str:
    if dataclasses.is_dataclass(thing):
        field = next(field for field in dataclasses.fields(thing) if field.name == name)
        value = field.default
    else:
        value = thing._field_defaults.get(name, dataclasses.MISSING)
    if value is dataclasses.MISSING:
        return ""
    if dataclasses.is_dataclass(value):
        return f" = {type(value).__name__}()"
    return f" = {value.__name__}" if callable(value) else f" = {value!r}"


def methods(thing: Any) -> list[str]:
    """Public methods and properties that say something of themselves."""
    parts = []
    ours = {} if issubclass(thing, (tuple, enum.Enum)) and not hasattr(thing, "__orig_bases__") else vars(thing)
    for name, member in ours.items():
        function = member.fget if isinstance(member, property) else getattr(member, "__func__", member)
        shown = name in ("__call__", "__len__", "__iter__") or not name.startswith("_")
        if not shown or not (inspect.isfunction(function) and function.__doc__):
            continue
        signature = "" if isinstance(member, property) else unquoted(str(inspect.signature(function)))
        signature = re.sub(r"\((self|cls)(, )?", "(", signature)
        parts.append(f"- **`{name}{signature}`** {' '.join(inspect.cleandoc(function.__doc__).split())}")
    return ["\n".join(parts)] if parts else []


if __name__ == "__main__":
    (Path(__file__).parent / "api.md").write_text(page())
