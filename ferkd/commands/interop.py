"""Commands about labels that exist already: convert, export, merge."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ferkd.commands.parsing import Output, choose, parse

if TYPE_CHECKING:
    from ferkd.store import LabelStore


def convert(arguments: Sequence[str]) -> None:
    """Turn other people's label files into a store. Nothing in them is ever run.

    `ferkd convert fkd --help`, `ferkd convert ml-dr --help`

    Example:
      ferkd convert fkd FKD_soft_label_500_crops/imagenet labels --data imagenet
    """
    choose(convert, {"fkd": convert_fkd, "ml-dr": convert_mldr}, arguments)


def convert_fkd(arguments: Sequence[str]) -> None:
    """Turn FKD's files (train/CLASS/IMAGE.tar) into a store. Boxes become those that FKD's training script cuts, to the pixel.

    May be stopped at any moment and started again.

    Example:
      ferkd convert fkd FKD_soft_label_500_crops/imagenet labels --data imagenet
    """
    from ferkd.filling import to_stderr
    from ferkd.interop.fkd import FkdSettings
    from ferkd.interop.fkd import convert_fkd as run

    settings, output = parse(convert_fkd, FkdSettings, arguments, name="convert fkd")
    print_store(run(settings, to_stderr), output)


def convert_mldr(arguments: Sequence[str]) -> None:
    """Turn a reinforced dataset of apple/ml-dr (INDEX.pth.tar) whose augmentation is crop and flip into a store.

    May be stopped at any moment and started again.

    Example:
      ferkd convert ml-dr imagenet_plus_rrc labels --data imagenet
    """
    from ferkd.filling import to_stderr
    from ferkd.interop.mldr import MlDrSettings
    from ferkd.interop.mldr import convert_mldr as run

    settings, output = parse(convert_mldr, MlDrSettings, arguments, name="convert ml-dr")
    print_store(run(settings, to_stderr), output)


def export(arguments: Sequence[str]) -> None:
    """Write a store as other people's label files.

    `ferkd export fkd --help`

    Example:
      ferkd export fkd labels fkd-labels --discard-below 0.1 --calibrate-below 0.3
    """
    choose(export, {"fkd": export_fkd}, arguments)


def export_fkd(arguments: Sequence[str]) -> None:
    """Write files that FKD's own training script reads. A policy's discarded crops are left out, calibrated ones softened.

    Example:
      ferkd export fkd labels fkd-labels --discard-below 0.1 --calibrate-below 0.3 --data photos
    """
    from ferkd.filling import to_stderr
    from ferkd.interop.fkd_export import ExportSettings
    from ferkd.interop.fkd_export import export_fkd as run

    settings, output = parse(export_fkd, ExportSettings, arguments, name="export fkd")
    exported = run(settings, to_stderr)
    if output.json:
        print(json.dumps({"out": str(settings.out), **exported.as_dict()}))


def merge(arguments: Sequence[str]) -> None:
    """Average stores over the same crops: an ensemble of teachers. `ferkd label --like STORE` makes a second store for it.

    Example:
      ferkd merge labels-a labels-b labels-both
    """
    from ferkd.filling import to_stderr
    from ferkd.merge import MergeSettings
    from ferkd.merge import merge as run

    settings, output = parse(merge, MergeSettings, arguments)
    print_store(run(settings, to_stderr), output)


def print_store(store: LabelStore, output: Output) -> None:
    """A new store as JSON, if that was asked for; people were told on the way."""
    if output.json:
        failed = len(store.manifest.failed)
        summary = {"images": len(store), "crops": len(store) * store.crops, "classes": store.classes, "k": store.k, "failed": failed}
        print(json.dumps({"store": str(store.path), **summary}))
