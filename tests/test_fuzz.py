# ruff: noqa: PT017  (an error is one of the right outcomes)
"""Files damaged at random: a clear error or the right answer, never a crash, a wrong label or a wrong weight."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from photos import write_photos, write_store
from test_runs import folder, state

from ferkd import Records, RegionPolicy, ferkd_loss
from ferkd.errors import InputError, StoreError
from ferkd.records import label_words
from ferkd.store import LabelStore
from ferkd.teacher import load_run
from ferkd.weights import read_weights, save_weights

BOUNDED = settings(
    max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


@st.composite
def damages(draw: st.DrawFn) -> tuple[str, float, bytes]:
    """A kind of damage, where in the file, and bytes that take part in it."""
    kind = draw(st.sampled_from(["flip", "overwrite", "cut", "insert", "swap", "zero", "empty"]))
    return kind, draw(st.floats(0, 1, exclude_max=True)), draw(st.binary(min_size=1, max_size=40))


def damaged(data: bytes, damage: tuple[str, float, bytes]) -> bytes:
    kind, place, noise = damage
    at = int(place * len(data))
    if kind == "flip":
        return data[:at] + bytes([data[at] ^ (1 << noise[0] % 8)]) + data[at + 1 :]
    if kind == "overwrite":
        return data[:at] + noise + data[at + len(noise) :]
    if kind == "cut":
        return data[:at]
    if kind == "insert":
        return data[:at] + noise + data[at:]
    if kind == "swap":
        return data[at:] + data[:at]
    if kind == "zero":
        return data[:at] + bytes(min(64, len(data) - at)) + data[at + 64 :]
    return b""


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("fuzz")
    photos = write_photos(root / "photos")
    for name, compact in (("exact", False), ("compact", True)):
        write_store(photos, root / name, compact=compact)
    return {name: root / name for name in ("exact", "compact")}


def answers(path: Path) -> list[Any]:
    """Everything that a store says: of every image its class, boxes and labels, and a policy's counts."""
    store = LabelStore(path)
    said: list[Any] = [len(store), store.k, store.classes, dict(store.folders), store.class_names]
    for image in range(len(store)):
        labels = store.read(image)
        boxes, flips = labels.boxes(np.arange(store.crops))
        ids, probs = store.unpack(labels.label_words)
        said.append((labels.path, labels.target, boxes.tolist(), flips.tolist(), ids.tolist(), probs.tolist()))
    said.append(store.scan(RegionPolicy(discard_below=0.4)).counts.tolist())
    return said


@pytest.mark.parametrize("layout", ["exact", "compact"])
@BOUNDED
@given(damage=damages(), which=st.integers(0, 10))
def test_a_damaged_store_says_so_or_says_the_same(
    whole: dict[str, Path], tmp_path: Path, layout: str, damage: tuple[str, float, bytes], which: int
) -> None:
    path = tmp_path / "store"
    shutil.rmtree(path, ignore_errors=True)
    shutil.copytree(whole[layout], path)
    files = sorted(file for file in path.rglob("*") if file.is_file())
    file = files[which % len(files)]
    file.write_bytes(damaged(file.read_bytes(), damage))
    try:
        said = answers(path)
    except StoreError as error:
        assert str(path) in str(error) or file.name in str(error)
        assert "\n" not in str(error)
    else:
        assert said == answers(whole[layout])


@BOUNDED
@given(damage=damages(), both=st.booleans())
def test_a_damaged_checkpoint_is_never_taken_for_a_whole_one(tmp_path: Path, damage: tuple[str, float, bytes], both: bool) -> None:
    path = tmp_path / "run"
    shutil.rmtree(path, ignore_errors=True)
    run = folder(path)
    for step in (1, 2):
        run.save_checkpoint(state(step, size=40))
    before = (path / "checkpoint.pt").read_bytes()
    after = damaged(before, damage)
    (path / "checkpoint.pt").write_bytes(after)
    if both:
        previous = path / "checkpoint-previous.pt"
        previous.write_bytes(damaged(previous.read_bytes(), ("cut", damage[1], b"x")))
    try:
        loaded = folder(path).load_checkpoint(torch.device("cpu"))
    except InputError as error:
        assert both, error
    else:
        assert loaded is not None
        assert loaded["step"] == (2 if after == before else 1)
        assert torch.equal(loaded["model"]["weight"], state(loaded["step"], size=40)["model"]["weight"])


@BOUNDED
@given(damage=damages(), suffix=st.sampled_from([".safetensors", ".pth"]))
def test_damaged_weights_are_an_input_error_or_load(tmp_path: Path, damage: tuple[str, float, bytes], suffix: str) -> None:
    """Weights carry no checksum of their own: a flipped bit in a number cannot be known, but nothing else may happen."""
    path = tmp_path / f"weights{suffix}"
    model = torch.nn.Linear(3, 2)
    if suffix == ".pth":
        torch.save(model.state_dict(), path)
    else:
        from ferkd.preprocessing import Preprocessing

        save_weights(path, model, "timm:resnet10t", ["a", "b"], Preprocessing(16))
    path.write_bytes(damaged(path.read_bytes(), damage))
    try:
        tensors, _ = read_weights(path)
    except InputError as error:
        assert "weights" in str(error)
    else:
        assert all(isinstance(tensor, torch.Tensor) for tensor in tensors.values())
    if suffix == ".safetensors":
        with pytest.raises(InputError):  # at the least the architecture does not fit two numbers a class
            load_run(path)


@BOUNDED
@given(data=st.data(), codec=st.sampled_from(["half", "packed"]), classes=st.sampled_from([2, 10, 1000, 70_000]))
def test_words_of_noise_never_reach_beyond_the_logits(data: st.DataObject, codec: Any, classes: int) -> None:
    k = data.draw(st.integers(1, min(5, classes)))
    width = label_words(codec, k, classes)
    noise = data.draw(st.binary(min_size=4 * width * 3, max_size=4 * width * 3))
    words = torch.frombuffer(bytearray(noise), dtype=torch.int32).view(3, width)
    logits = torch.randn(3, classes, requires_grad=True)
    try:
        loss = ferkd_loss(logits, Records(words, codec, k, classes), torch.zeros(3, dtype=torch.int64))
    except ValueError as error:
        assert "labels" in str(error) or "probab" in str(error) or "id" in str(error)
    else:
        assert isinstance(loss, torch.Tensor)
        loss.backward()
        assert logits.grad is not None
        assert logits.grad.isfinite().all()
