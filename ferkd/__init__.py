"""FerKD: knowledge distillation from stored teacher labels, with one fused loss kernel.

Names are loaded on first use, so that a program which wants only the loss pays for nothing else.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "ferkd_loss": "ferkd.loss",
    "FerKDLoss": "ferkd.loss",
    "LossStats": "ferkd.loss",
    "RegionPolicy": "ferkd.regions",
    "Region": "ferkd.regions",
    "Records": "ferkd.records",
    "LabelStore": "ferkd.store",
    "CropLoader": "ferkd.loader",
}

__all__ = ["CropLoader", "FerKDLoss", "LabelStore", "LossStats", "Records", "Region", "RegionPolicy", "__version__", "ferkd_loss"]

if TYPE_CHECKING:
    from ferkd.loader import CropLoader
    from ferkd.loss import FerKDLoss, LossStats, ferkd_loss
    from ferkd.records import Records
    from ferkd.regions import Region, RegionPolicy
    from ferkd.store import LabelStore


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'ferkd' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOME[name]), name)
