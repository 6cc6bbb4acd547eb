"""Sample photographs with some of their crops, as figures for a page."""

from __future__ import annotations

import base64
import io
from typing import Any, get_args

import numpy as np
import torch
from PIL import Image

from ferkd.errors import InputError
from ferkd.inspection import sample_crops, sample_images
from ferkd.pages.page import Markup
from ferkd.photos import LabelledPhotos
from ferkd.regions import Confidence, confidence_of
from ferkd.sources import Photos
from ferkd.store import LabelStore

_LONG_SIDE, _QUALITY = 400, 80
_KINDS: tuple[Confidence, ...] = get_args(Confidence)

REGION_LEGEND = Markup(
    '<p class="legend">'
    + "".join(
        f'<span><i class="chip {region}"></i>{region} ({stroke})</span>'
        for region, stroke in (("discarded", "dotted"), ("calibrated", "dashed"), ("kept", "solid"))
    )
    + "</p>"
)


def sample_photos(store: LabelStore, photos: Photos, order_by: Confidence, images: int = 8, crops: int = 8) -> list[dict[str, Any]]:
    """Photographs, made small, as data: URIs of JPEG, each with crops from its least to its most confident one (by `order_by`).

    A crop: box (in the photograph's own pixels), flip, both confidences,
    the teacher's first answer, its probability, and whether it is the ground truth. Raises StoreError for a photograph that changed.
    """
    source, found = LabelledPhotos(photos, store), []
    for image in sample_images(store, images):
        labels = store.read(image)
        ids, probs = store.unpack(labels.label_words)
        truth = torch.full((store.crops,), labels.target)
        by_kind = {
            kind: confidence_of(torch.from_numpy(ids), torch.from_numpy(probs), truth, store.classes, kind).numpy() for kind in _KINDS
        }
        chosen = sample_crops(by_kind[order_by], crops)
        boxes, flips = labels.boxes(chosen)
        found.append(
            {
                "path": labels.path, "truth": store.class_names[labels.target], "width": labels.width, "height": labels.height,
                "jpeg": _small_jpeg(source(image).permute(1, 2, 0).numpy()),
                "crops": [
                    {"box": box, "flip": bool(flip), "answer": store.class_names[int(ids[crop, 0])], "probability": float(probs[crop, 0]),
                     "agrees": bool(ids[crop, 0] == labels.target), **{kind: float(by_kind[kind][crop]) for kind in _KINDS}}
                    for crop, box, flip in zip(chosen.tolist(), boxes.tolist(), flips.tolist(), strict=True)
                ],
            }
        )  # fmt: skip
    if not found:
        raise InputError(f"{store.source}: none of its images could be read when it was labelled, so there is nothing to draw")
    return found


def _small_jpeg(pixels: np.ndarray) -> str:
    photo = Image.fromarray(pixels)
    photo.thumbnail((_LONG_SIDE, _LONG_SIDE))
    file = io.BytesIO()
    photo.save(file, "JPEG", quality=_QUALITY)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
