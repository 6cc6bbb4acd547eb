"""The page of a store: what its labels look like, and thresholds to be chosen by looking."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any

from ferkd.classes import elsewhere_line
from ferkd.inspection import BANDS, CANDIDATES, SCALES, Bands, Inspection
from ferkd.pages.page import Markup, escaped, page, table
from ferkd.pages.photos import REGION_LEGEND, sample_photos
from ferkd.regions import Region
from ferkd.report import share
from ferkd.sources import Photos
from ferkd.store import LabelStore

_SLIDERS = {"discard_below": "Discard below", "calibrate_below": "Calibrate below", "discard_above": "Discard above"}


def store_page(store: LabelStore, inspection: Inspection, photos: Photos | None = None, note: str = "") -> str:
    """The page as text. `photos`: those that were labelled, to show some with their crops. `note`: one line more
    about the policy."""
    policy = inspection.policy
    figures: dict[str, Any] = {
        "policy": dataclasses.asdict(policy),
        "counts": {
            kind: {"edges": counts.edges.tolist(), **{of: getattr(counts, of).tolist() for of in ("crops", "agree", "images")}}
            for kind, counts in inspection.counts.items()
        },
        "candidates": CANDIDATES,
        "photos": sample_photos(store, photos, policy.confidence) if photos else [],
    }
    teacher = store.manifest.provenance.get("teacher")
    spec = teacher.get("spec") if isinstance(teacher, dict) else teacher
    unreadable = f" {inspection.unreadable:,} images could not be read when they were labelled." if inspection.unreadable else ""
    has_folder = inspection.has_folder
    elsewhere = "" if has_folder.all() else elsewhere_line(inspection.elsewhere, int(has_folder.sum()), len(has_folder))
    body = f"""
<p class="lead">{inspection.images:,} images × {store.crops} crops, the {store.k} most probable of {store.classes:,} classes,
answers of {escaped(spec or "an unknown teacher")}.{unreadable} “Agreement” is the share of crops whose most probable class is the
ground truth. {f"{escaped(elsewhere)}." if elsewhere else ""}</p>
{_thresholds(inspection, note)}
{_PHOTOS if photos else ""}
<h2>What other thresholds would do</h2>
<p>Each cell: the share of all crops that falls into the region, and below it the teacher's agreement in that part. Labels worth
discarding have a low agreement, labels worth keeping a high one.</p>
<div class="grid">{"".join(_candidates(inspection, kind) for kind in inspection.counts)}</div>
<h2>How the teacher does</h2>
<div class="grid">{_scales(inspection.by_scale)}{_confidences(inspection.by_confidence, policy.confidence)}</div>
"""
    return page(
        f"Labels of {Path(store.source).name or store.path.resolve().name}", Markup(body), figures, ["charts.js", "photos.js", "store.js"]
    )


_PHOTOS = f"""
<h2>Photographs and their crops</h2>
<p>Crops run from the teacher's least to its most confident one, framed by region. Below each the
teacher's answer: ✓ the ground truth, ✗ another class. They follow the thresholds above.</p>
{REGION_LEGEND}
<div class="photos" id="photos"></div>
"""


def _thresholds(inspection: Inspection, note: str) -> Markup:
    rows = "".join(
        f'<div class="threshold-row"><label for="{name}">{label}</label>'
        f'<input type="range" id="{name}_slider" aria-label="{label}" min="0" step="1" value="0">'
        f'<input type="number" id="{name}" min="0" max="1" step="any" inputmode="decimal"></div>'
        for name, label in _SLIDERS.items()
    )
    kinds = "".join(
        f'<label><input type="radio" name="confidence" id="by_{kind}"> {text}</label>'
        for kind, text in (("max", "max: the largest probability"), ("target", "target: the ground truth's probability"))
    )
    crops = max(1, inspection.crops)
    regions = table(
        ["region", "crops", "share", "agreement"],
        [
            [Markup(f'<i class="chip {name}"></i> {name}'), f"{count:,}", share(count, crops), share(agree, count)]
            for name, count, agree in zip(_names(), inspection.regions, inspection.region_agree, strict=True)
        ],
        "Crops by region",
        id="regions",
    )
    bar = "".join(
        f'<rect class="fill {name}" width="{100 * count / crops:.3f}" height="10"/>'
        for name, count in zip(_names(), inspection.regions, strict=True)
    )
    policy = inspection.policy
    return Markup(f"""
<h2 id="thresholds">Thresholds</h2>
<p>Discarded crops are never shown to the student; calibrated ones get the softened ground truth instead of the teacher's label.
This page was made for: discard below {policy.discard_below:.6g}, calibrate below {policy.calibrate_below:.6g}, discard above
{policy.discard_above:.6g}, confidence {policy.confidence}. {escaped(note)}</p>
<form id="controls" class="no-print" data-needs-script hidden>
<fieldset><legend>What places a crop (--confidence)</legend>{kinds}</fieldset>
{rows}
<button type="button" id="reset">As the page was made</button>
</form>
<div data-needs-script hidden><svg class="bar" id="bar" viewBox="0 0 100 10" preserveAspectRatio="none" aria-hidden="true">{bar}</svg></div>
{regions}
<p id="lost">{inspection.images_without_survivor:,} of {inspection.images:,} images have no crop left</p>
<div class="flags" data-needs-script hidden><label for="flags">Flags for ferkd train</label>
<textarea id="flags" readonly rows="2" placeholder="none: every label is kept (FKD)"></textarea>
<button type="button" id="copy">Copy</button><span id="copied" role="status"></span></div>
<figure id="histogram"></figure>
<p class="no-print" data-needs-script hidden><label><input type="checkbox" id="magnify"> Magnify small bars (square root)</label></p>
""")


def _candidates(inspection: Inspection, kind: Any) -> Markup:
    crops = max(1, inspection.crops)
    rows = [
        [
            " / ".join(f"{value:g}" if value else "–" for value in (candidate.policy.discard_below, candidate.policy.calibrate_below)),
            *(
                Markup(f"{share(count, crops)}<small>{share(agree, count, 0)}</small>")
                for count, agree in zip(candidate.crops, candidate.agree, strict=True)
            ),
        ]
        for candidate in inspection.candidates(kind)
    ]
    return table(["discard / calibrate below", *_names()], rows, f"By --confidence {kind}", id=f"candidates_{kind}")


def _scales(bands: Bands) -> Markup:
    names = [f"{low:.2f}–{high:.2f}" for low, high in itertools.pairwise(SCALES)]
    return _bands(bands, names, "By crop scale: the crop's area as a share of the photograph's", "crop scale")


def _confidences(bands: Bands, kind: str) -> Markup:
    names = [f"{band / BANDS:.2f}–{(band + 1) / BANDS:.2f}" for band in range(BANDS)]
    return _bands(bands, names, f"By confidence ({kind})", "confidence")


def _bands(bands: Bands, names: list[str], caption: str, what: str) -> Markup:
    crops = max(1, int(bands.crops.sum()))
    rows = [
        [name, f"{count:,}", share(count, crops), share(agree, count), f"{confidence / count:.1%}"]
        for name, count, agree, confidence in zip(names, bands.crops, bands.agree, bands.confidence, strict=True)
        if count
    ]
    return table([what, "crops", "share", "agreement", "mean confidence"], rows, caption)


def _names() -> list[str]:
    return [region.name.lower() for region in Region]
