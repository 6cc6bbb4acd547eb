"""Pictures and tables from finished stores and runs."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from ferkd.classes import elsewhere_line
from ferkd.crops import take_crop
from ferkd.errors import InputError
from ferkd.inspection import BANDS, SCALES, Inspection, sample_crops, sample_images
from ferkd.photos import LabelledPhotos
from ferkd.regions import Region, RegionPolicy, confidence_of, region_of
from ferkd.sources import Photos
from ferkd.store import LabelStore

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = {Region.DISCARDED: "#d1495b", Region.CALIBRATED: "#edae49", Region.KEPT: "#2e933c"}
METHOD_COLOURS = {"hard labels": "#5c6b73", "FKD": "#30638e", "FerKD": "#d1495b"}


def inspection_table(inspection: Inspection) -> str:
    """The counts as text: by region, by confidence band, by crop scale, and for candidate thresholds. Agreement: the teacher's first
    answer is the ground truth."""
    policy, crops, has_folder = inspection.policy, max(1, inspection.crops), inspection.has_folder
    lines = [
        f"{inspection.crops:,} crops of {inspection.images:,} images; {inspection.images_without_survivor:,} images have no crop left"
        + (f"; {inspection.unreadable:,} could not be read when they were labelled" if inspection.unreadable else ""),
        f"policy: discard below {policy.discard_below:.6g}, calibrate below {policy.calibrate_below:.6g}, discard above "
        f"{policy.discard_above:.6g}, confidence {policy.confidence}",
        *([elsewhere_line(inspection.elsewhere, int(has_folder.sum()), len(has_folder))] if not has_folder.all() else []),
        "",
        f"{'region':<12}{'crops':>14}{'share':>9}{'agreement':>12}",
    ]
    lines += [
        f"{region.name.lower():<12}{count:>14,}{count / crops:>9.1%}{share(agree, count):>12}"
        for region, count, agree in zip(Region, inspection.regions, inspection.region_agree, strict=True)
    ]
    lines += ["", f"{'confidence':<12}{'crops':>14}{'share':>9}{'agreement':>12}"]
    largest = max(1, int(inspection.by_confidence.crops.max()))
    for band, (count, agree) in enumerate(zip(inspection.by_confidence.crops, inspection.by_confidence.agree, strict=True)):
        bar = "#" * round(30 * count / largest)
        lines.append(f"{band / BANDS:.2f}-{(band + 1) / BANDS:.2f}   {count:>14,}{count / crops:>9.1%}{share(agree, count):>12}  {bar}")
    lines += ["", f"{'crop scale':<12}{'crops':>14}{'share':>9}{'agreement':>12}{'mean confidence':>18}"]
    by_scale = inspection.by_scale
    for (low, high), count, agree, confidence in zip(
        itertools.pairwise(SCALES), by_scale.crops, by_scale.agree, by_scale.confidence, strict=True
    ):
        if count:
            mean = confidence / count
            lines.append(f"{low:.2f}-{high:.2f}   {count:>14,}{count / crops:>9.1%}{share(agree, count):>12}{mean:>18.1%}")
    return "\n".join([*lines, "", *_candidates_table(inspection)])


def _candidates_table(inspection: Inspection) -> list[str]:
    """Each pair of thresholds on a line, by either confidence: the share of crops in each region, and their agreement."""
    crops = max(1, inspection.crops)
    head = "".join(f"{region.name.lower():>13}" for region in Region)
    lines = [
        "What other thresholds would do: share of the crops (the teacher's agreement in them)",
        " " * 18 + "".join(f"  by --confidence {kind}".ljust(3 * 13 + 2) for kind in inspection.counts).rstrip(),
        f"{'discard':>7} {'calibrate':>9} " + ("  " + head) * len(inspection.counts),
    ]
    for candidates in zip(*(inspection.candidates(kind) for kind in inspection.counts), strict=True):
        policy = candidates[0].policy
        calibrate = f"< {policy.calibrate_below:g}" if policy.calibrate_below else "-"
        line = f"{f'< {policy.discard_below:g}' if policy.discard_below else '-':>7} {calibrate:>9} "
        for candidate in candidates:
            line += "  " + "".join(
                f"{f'{count / crops:.0%} ({share(agree, count, 0)})':>13}"
                for count, agree in zip(candidate.crops, candidate.agree, strict=True)
            )
        lines.append(line)
    return lines


def confidence_picture(inspection: Inspection, path: Path) -> None:
    """Histogram of confidence with the thresholds, and below it the teacher's agreement with the ground truth by band."""
    figure = _figure(7.0, 5.0)
    histogram, agreement = figure.subplots(2, 1, sharex=True, height_ratios=[1.2, 1.0])
    centres = (np.arange(BANDS) + 0.5) / BANDS
    counts, agree = inspection.by_confidence.crops, inspection.by_confidence.agree
    shares = counts / max(1, counts.sum())
    region = region_of(torch.from_numpy(centres).float(), inspection.policy)
    histogram.bar(centres, shares, width=0.9 / BANDS, color=[COLOURS[Region(int(r))] for r in region])
    agreement.bar(centres, np.divide(agree, counts, out=np.zeros(BANDS), where=counts > 0), width=0.9 / BANDS, color="#30638e")
    if inspection.policy.confidence == "max":
        agreement.plot([0, 1], [0, 1], linewidth=1, color="#999999", linestyle="--", label="a teacher as right as it is confident")
        agreement.legend(fontsize=8, frameon=False, loc="upper left")
    policy = inspection.policy
    for axes in (histogram, agreement):
        for threshold, name in (
            (policy.discard_below, "discard below"),
            (policy.calibrate_below, "calibrate below"),
            (policy.discard_above, "discard above"),
        ):
            if 0.0 < threshold < 1.0:
                axes.axvline(threshold, color="black", linewidth=1, linestyle=":")
                if axes is histogram:
                    axes.text(threshold, histogram.get_ylim()[1], f" {name} {threshold:g}", fontsize=7, va="top", rotation=90)
    for value, colour in COLOURS.items():
        histogram.bar(0, 0, color=colour, label=f"{value.name.lower()} {inspection.regions[value] / max(1, inspection.crops):.1%}")
    histogram.legend(fontsize=8, frameon=False)
    histogram.set_ylabel("share of crops")
    agreement.set_ylabel("teacher is right")
    agreement.set_xlabel(f"teacher's confidence ({policy.confidence})")
    agreement.set_xlim(0, 1)
    agreement.set_ylim(0, 1)
    _save(figure, path)


def crops_picture(store: LabelStore, photos: Photos, policy: RegionPolicy, path: Path, images: int = 4, crops: int = 6) -> None:
    """Photographs with some of their crops drawn on them and cut out beside them, framed in the colour of their region.

    The crops of an image run from its least to its most confident one.
    """
    known = sample_images(store, images)
    if not known:
        raise InputError(f"{store.source}: none of its images could be read when it was labelled, so there is nothing to draw")
    from matplotlib.patches import Patch, Rectangle

    source = LabelledPhotos(photos, store)
    figure = _figure(1.5 * (crops + 1.6), 1.85 * len(known))
    grid = figure.subplots(len(known), crops + 1, squeeze=False, width_ratios=[1.6] + [1.0] * crops)
    for row, image in zip(grid, known, strict=True):
        labels, photo = store.read(image), source(image)
        ids, probs = store.unpack(labels.label_words)
        confidence = confidence_of(
            torch.from_numpy(ids), torch.from_numpy(probs), torch.full((store.crops,), labels.target), store.classes, policy.confidence
        )
        region = region_of(confidence, policy)
        chosen = sample_crops(confidence.numpy(), crops)
        boxes, flips = labels.boxes(chosen)
        row[0].imshow(photo.permute(1, 2, 0).numpy())
        row[0].set_title(f"{_short(store.class_names[labels.target])}", fontsize=8)
        for axes in row:
            axes.axis("off")
        for axes, crop, box, flip in zip(row[1:], chosen.tolist(), boxes.tolist(), flips.tolist(), strict=False):
            colour = COLOURS[Region(int(region[crop]))]
            left, top, width, height = box
            row[0].add_patch(Rectangle((left - 0.5, top - 0.5), width, height, fill=False, edgecolor=colour, linewidth=1.5))
            axes.imshow(take_crop(photo, (left, top, width, height), flip, 96, "bilinear").permute(1, 2, 0).numpy())
            axes.add_patch(Rectangle((0, 0), 1, 1, transform=axes.transAxes, fill=False, edgecolor=colour, linewidth=4))
            axes.set_title(f"{_short(store.class_names[int(ids[crop, 0])], 14)} {float(probs[crop, 0]):.0%}", fontsize=8)
    figure.legend(
        [Patch(color=colour) for colour in COLOURS.values()],
        [region.name.lower() for region in COLOURS],
        ncols=3,
        loc="lower center",
        fontsize=8,
        frameon=False,
    )
    _save(figure, path, bottom=0.35 / figure.get_figheight())


def curves_picture(runs: Sequence[Path], path: Path) -> None:
    """Validation top-1 against crops seen: a thin line a run, a thick one for the mean of the runs of a method."""
    figure = _figure(7.0, 4.0)
    axes = figure.subplots()
    curves: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
    for run in runs:
        method = json.loads((run / "summary.json").read_text())["method"]
        lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
        evaluations = [(line["crops"], line["top1"]) for line in lines if line["kind"] == "eval"]
        crops, top1 = (np.array(column) for column in zip(*evaluations, strict=True))
        curves.setdefault(method, []).append((crops, top1))
    for method, lines in curves.items():
        colour = METHOD_COLOURS.get(method, "black")
        for crops, top1 in lines:
            axes.plot(crops, 100 * top1, color=colour, alpha=0.3, linewidth=1)
        if all(np.array_equal(crops, lines[0][0]) for crops, _ in lines):
            axes.plot(
                lines[0][0],
                100 * np.mean([top1 for _, top1 in lines], axis=0),
                color=colour,
                linewidth=2.2,
                label=f"{method} (n = {len(lines)})",
            )
    axes.set_xlabel("crops seen")
    axes.set_ylabel("validation top-1 (%)")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    _save(figure, path)


def _figure(width: float, height: float) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError("pictures need matplotlib, which is not installed: pip install 'ferkd[plots]'") from error
    return Figure(figsize=(width, height), dpi=110)


def _save(figure: Figure, path: Path, bottom: float = 0.0) -> None:
    figure.tight_layout(rect=(0, bottom, 1, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def share(part: int, whole: int, digits: int = 1) -> str:
    """A share as people read it; a dash for one of nothing."""
    return f"{part / whole:.{digits}%}" if whole else "-"


def _short(name: str, length: int = 24) -> str:
    return name if len(name) <= length else name[: length - 1] + "…"
