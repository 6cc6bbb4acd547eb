"""The training loop: what it learns from, what it leaves behind, that it goes on exactly, and what it refuses."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from photos import write_photos, write_store
from safetensors import safe_open
from safetensors.torch import load_file

from ferkd.errors import InputError, StoreError
from ferkd.mixing import Mixing
from ferkd.recipes import RECIPES, TrainConfig, recipe
from ferkd.regions import RegionPolicy
from ferkd.store import LabelStore
from ferkd.teacher import load_run
from ferkd.train import Job, train

CONFIG = TrainConfig(
    epochs=8.0,
    warmup_epochs=0.0,
    batch_size=12,
    crops_per_image=4,
    lr=0.1,
    eval_every=4.0,
    log_every=3,
    workers=0,
    eval_crop_pct=1.0,
    channels_last=False,
)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_photos(tmp_path_factory.mktemp("photos") / "data")


@pytest.fixture(scope="module")
def store(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> LabelStore:
    return write_store(photos, tmp_path_factory.mktemp("labels") / "store")


def job(
    photos: Path, out: Path, labels: LabelStore | None = None, student: str = "python:photos:tiny_net", resume: bool = False, **changes: Any
) -> Job:
    config = dataclasses.replace(CONFIG, **changes)
    return Job(photos, student, out, config, labels.path if labels else None, resume=resume, say=lambda line: None)


def lines(run: Path, kind: str) -> list[dict[str, Any]]:
    return [line for text in (run / "log.jsonl").read_text().splitlines() if (line := json.loads(text))["kind"] == kind]


def same_bits(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def test_hard_labels_are_learnt_from_fresh_crops(photos: Path, tmp_path: Path) -> None:
    summary = train(job(photos, tmp_path / "run", epochs=60.0, min_scale=0.5))
    assert summary["method"] == "hard labels"
    assert summary["top1"] > 0.9  # the classes are three colours
    assert summary["val_images"] == 12
    assert lines(tmp_path / "run", "train")[-1]["loss"] < lines(tmp_path / "run", "train")[0]["loss"]


def test_stored_labels_are_learnt_with_and_without_thresholds(photos: Path, store: LabelStore, tmp_path: Path) -> None:
    fkd = train(job(photos, tmp_path / "fkd", store))
    policy = RegionPolicy(discard_below=0.5, calibrate_below=0.7)
    ferkd = train(job(photos, tmp_path / "ferkd", store, policy=policy))
    assert (fkd["method"], ferkd["method"]) == ("FKD", "FerKD")
    assert fkd["steps"] == 8 * 24 // 12
    seen = [line["regions"] for line in lines(tmp_path / "ferkd", "train")]
    assert all(regions["discarded"] == 0 for regions in seen)  # the sampler never shows one
    assert any(regions["calibrated"] > 0 for regions in seen)
    assert all(line["regions"]["kept"] == 1 for line in lines(tmp_path / "fkd", "train"))
    assert ferkd["stored_regions"]["discarded"] == int(store.scan(policy).counts[0]) > 0


def test_a_compact_store_shows_the_same_crops_and_nearly_the_same_labels(photos: Path, tmp_path: Path) -> None:
    exact, compact = write_store(photos, tmp_path / "exact"), write_store(photos, tmp_path / "compact", compact=True)
    assert compact.manifest.crop_bytes < exact.manifest.crop_bytes
    policy = RegionPolicy(discard_below=0.5, calibrate_below=0.7)
    losses = []
    for store in (exact, compact):
        train(job(photos, tmp_path / f"run-{store.label_codec}", store, policy=policy, epochs=2.0))
        losses.append([line["loss"] for line in lines(tmp_path / f"run-{store.label_codec}", "train")])
    assert losses[0] == pytest.approx(losses[1], rel=0.02)
    assert losses[0] != losses[1]


def test_what_the_teacher_says_is_what_is_learnt(photos: Path, store: LabelStore, tmp_path: Path) -> None:
    """Labels made up at random teach nothing; calibrating every one of them by the ground truth does."""
    changes = {"epochs": 60.0, "lr": 0.2}
    random_labels = train(job(photos, tmp_path / "random", store, **changes))
    corrected = train(job(photos, tmp_path / "corrected", store, policy=RegionPolicy(calibrate_below=1.0, smoothing=0.0), **changes))
    assert random_labels["top1"] < 0.75
    assert corrected["top1"] > 0.9


@pytest.mark.parametrize("mix", ["mixup", "cutmix", "mixup_cutmix", "selfmix"])
def test_every_mixing_trains(photos: Path, store: LabelStore, tmp_path: Path, mix: Any) -> None:
    mixing = Mixing(mix, mix_group=3)
    train(job(photos, tmp_path / "run", store, mixing=mixing))
    train(job(photos, tmp_path / "hard", None, mixing=mixing))
    assert all(0 < line["loss"] < 5 for run in ("run", "hard") for line in lines(tmp_path / run, "train"))


def test_two_trainings_of_one_run_are_refused(photos: Path, tmp_path: Path) -> None:
    """The second says so and touches nothing; a killed one's lock is free."""

    def second(line: str) -> None:
        if not tried:
            tried.append(line)
            with pytest.raises(InputError, match=r"run: another ferkd train is at work on it \(process \d+ on .*\); let it finish"):
                train(job(photos, tmp_path / "run", resume=True))

    tried: list[str] = []
    train(dataclasses.replace(job(photos, tmp_path / "run"), say=second))
    assert tried
    (tmp_path / "run/lock").write_text('{"host": null, "pid": 1}')
    train(job(photos, tmp_path / "run", resume=True))
    assert not (tmp_path / "run/lock").exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer": "adamw", "lr": 0.01, "betas": (0.9, 0.95)},
        {"amp": "bf16"},
        {"ema_decay": 0.9},
        {"clip_grad": 0.1, "decay_norms_and_biases": False},
        {"channels_last": True, "cache": "decoded"},
        {"temperature": 2.0, "tail": "renorm", "tau_squared": True},
        {"warmup_epochs": 2.0, "single_crop_warmup": True, "lr_step": "pass"},
        {"impl": "reference"},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_settings_train(photos: Path, store: LabelStore, tmp_path: Path, changes: dict[str, Any]) -> None:
    summary = train(job(photos, tmp_path / "run", store, **changes))
    assert summary["steps"] == 16
    assert all(0 < line["loss"] < 10 for line in lines(tmp_path / "run", "train"))


@pytest.mark.slow
def test_a_compiled_forward_pass_learns_the_same(photos: Path, store: LabelStore, tmp_path: Path) -> None:
    policy = RegionPolicy(discard_below=0.5, calibrate_below=0.7)
    mixing = Mixing("mixup_cutmix", mix_group=3)
    train(job(photos, tmp_path / "eager", store, epochs=3.0, policy=policy, mixing=mixing))
    train(job(photos, tmp_path / "compiled", store, epochs=3.0, policy=policy, mixing=mixing, compile="default"))
    eager, compiled = load_file(tmp_path / "eager/last.safetensors"), load_file(tmp_path / "compiled/last.safetensors")
    assert eager.keys() == compiled.keys()
    for name, value in eager.items():
        torch.testing.assert_close(compiled[name], value, rtol=1e-3, atol=1e-4)


def test_the_same_seed_gives_the_same_weights_and_another_does_not(photos: Path, store: LabelStore, tmp_path: Path) -> None:
    weights = {}
    for name, seed, workers in (("one", 0, 0), ("two", 0, 2), ("three", 1, 0)):
        train(job(photos, tmp_path / name, store, seed=seed, workers=workers))
        weights[name] = load_file(tmp_path / name / "last.safetensors")
    assert same_bits(weights["one"], weights["two"])
    assert not same_bits(weights["one"], weights["three"])


RUN_IN_PROCESS = """
import dataclasses, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_train import CONFIG
from ferkd.errors import Stopped
from ferkd.train import Job, train
import ferkd.step
slow = float(sys.argv[4])
if slow:
    import time
    original = ferkd.step.ForwardPass.forward
    def forward(*args):
        time.sleep(slow)
        return original(*args)
    ferkd.step.ForwardPass.forward = forward
config = dataclasses.replace(CONFIG, epochs=12.0, eval_every=1.0, ema_decay=0.9, warmup_epochs=2.0, workers=int(sys.argv[5]))
try:
    train(Job(Path(sys.argv[1]), "python:photos:dropping_net", Path(sys.argv[3]), config, Path(sys.argv[2]), resume=True))
except Stopped:
    sys.exit(75)
"""


def test_an_interrupted_run_ends_with_the_same_weights(photos: Path, store: LabelStore, tmp_path: Path) -> None:
    """Stopped twice at whatever step it was, and resumed: the same bits of weights and the same log. Signals reach the loaders too.
    tests/kill_training.py does the same with kills."""

    def start(out: Path, slow: float = 0.0, workers: int = 0) -> subprocess.Popen[bytes]:
        script = RUN_IN_PROCESS.format(tests=str(Path(__file__).parent))
        arguments = [str(photos), str(store.path), str(out), str(slow), str(workers)]
        return subprocess.Popen([sys.executable, "-c", script, *arguments], stderr=subprocess.DEVNULL, start_new_session=True)

    assert start(tmp_path / "whole").wait() == 0
    out = tmp_path / "broken"
    for at_least, blow in zip((3, 9), (signal.SIGTERM, signal.SIGINT), strict=True):
        process = start(out, slow=0.15, workers=2)
        while process.poll() is None and _evaluations(out) * 2 < at_least:
            time.sleep(0.02)
        os.killpg(process.pid, blow)
        assert process.wait() == 75
    assert _evaluations(out) * 2 < 24
    assert start(out).wait() == 0
    for name in ("last", "best"):
        assert same_bits(load_file(out / f"{name}.safetensors"), load_file(tmp_path / "whole" / f"{name}.safetensors"))
    evaluations = [[(line["step"], line["top1"]) for line in lines(run, "eval")] for run in (out, tmp_path / "whole")]
    assert evaluations[0] == evaluations[1]


def _evaluations(run: Path) -> int:
    log = run / "log.jsonl"
    return log.read_text().count('"eval"') if log.exists() else 0


def test_the_run_folder_says_what_was_done(photos: Path, store: LabelStore, tmp_path: Path) -> None:
    summary = train(job(photos, tmp_path / "run", store))
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["config"] == json.loads(json.dumps(dataclasses.asdict(CONFIG)))
    assert config["store"] == store.manifest_sha256
    assert config["machine"]["torch"] == torch.__version__
    assert json.loads((tmp_path / "run" / "summary.json").read_text()) == json.loads(json.dumps(summary))
    with safe_open(tmp_path / "run" / "last.safetensors", "pt") as file:
        metadata = file.metadata()
    assert json.loads(metadata["classes"]) == ["blue", "green", "red"]
    assert metadata["architecture"] == "python:photos:tiny_net"
    assert json.loads(metadata["preprocessing"])["input_size"] == 16
    assert load_run(tmp_path / "run").outputs == 3
    for line in lines(tmp_path / "run", "train"):
        assert line.keys() >= {"step", "epoch", "crops", "seconds", "lr", "loss", "crops_per_second", "data_wait", "regions"}
        assert 0 <= line["data_wait"] <= 1


def test_timm_loads_the_weights(photos: Path, store: LabelStore, tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    train(job(photos, tmp_path / "run", store, student="resnet10t", epochs=1.0, image_size=32))
    model = timm.create_model("resnet10t", num_classes=3, checkpoint_path=str(tmp_path / "run" / "last.safetensors"))
    saved = load_file(tmp_path / "run" / "last.safetensors")
    assert all(torch.equal(value, saved[name]) for name, value in model.state_dict().items())


def test_init_starts_from_given_weights(photos: Path, store: LabelStore, tmp_path: Path) -> None:
    train(job(photos, tmp_path / "first", store))
    changed = dataclasses.replace(
        job(photos, tmp_path / "second", store, lr=1e-12, weight_decay=0.0), init=tmp_path / "first" / "last.safetensors"
    )
    train(changed)
    first, second = load_file(tmp_path / "first/last.safetensors"), load_file(tmp_path / "second/last.safetensors")
    torch.testing.assert_close(second["0.weight"], first["0.weight"], atol=1e-7, rtol=0)


def test_an_evaluation_that_fails_loses_nothing(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was learnt before it is saved, and the resumed run makes up for it and ends as if nothing had been."""
    train(job(photos, tmp_path / "whole"))

    def fail(*_: Any, **__: Any) -> None:
        raise InputError("the disk is gone")

    with monkeypatch.context() as patch:
        patch.setattr("ferkd.train.evaluate", fail)
        with pytest.raises(InputError, match="the disk is gone"):
            train(job(photos, tmp_path / "run"))
    assert (tmp_path / "run" / "checkpoint.pt").exists()
    assert not lines(tmp_path / "run", "eval")
    train(job(photos, tmp_path / "run", resume=True))
    for name in ("last", "best"):
        assert same_bits(load_file(tmp_path / "run" / f"{name}.safetensors"), load_file(tmp_path / "whole" / f"{name}.safetensors"))
    evaluations = [[(line["step"], line["top1"]) for line in lines(tmp_path / run, "eval")] for run in ("run", "whole")]
    assert evaluations[0] == evaluations[1]


def test_an_evaluation_killed_after_its_line_is_logged_once(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("ferkd.train.RunFolder.save_weights", killed)
        with pytest.raises(KeyboardInterrupt):
            train(job(photos, tmp_path / "run"))
    assert len(lines(tmp_path / "run", "eval")) == 1
    train(job(photos, tmp_path / "run", resume=True))
    steps = [line["step"] for line in lines(tmp_path / "run", "eval")]
    assert steps == sorted(set(steps))


def test_a_lost_loss_is_never_saved_over_good_weights(photos: Path, tmp_path: Path) -> None:
    train(job(photos, tmp_path / "run", epochs=4.0))
    with pytest.raises(InputError, match="loss: nan"):
        train(job(photos, tmp_path / "lost", lr=1e30, epochs=20.0, log_every=1000, eval_every=10.0))
    assert not (tmp_path / "lost" / "checkpoint.pt").exists()


# ------------------------------------------------------------------------------------------------------------------ what is refused


def test_weights_without_a_checkpoint_are_not_overwritten(photos: Path, tmp_path: Path) -> None:
    train(job(photos, tmp_path / "run", epochs=1.0))
    (tmp_path / "run" / "checkpoint.pt").unlink()  # to save space, when a run is done
    before = (tmp_path / "run" / "last.safetensors").read_bytes()
    with pytest.raises(InputError, match="holds a run already"):
        train(job(photos, tmp_path / "run", epochs=1.0, seed=1))
    assert (tmp_path / "run" / "last.safetensors").read_bytes() == before


def test_a_checkpoint_of_other_photographs_is_refused(photos: Path, tmp_path: Path) -> None:
    train(job(photos, tmp_path / "run", epochs=1.0))
    other = write_photos(tmp_path / "data")
    for path in sorted((other / "train" / "red").iterdir()):
        path.rename(path.with_name(f"other-{path.name}"))
    with pytest.raises(InputError, match="was made with photos = "):
        train(job(other, tmp_path / "run", epochs=1.0, resume=True))


def test_a_run_folder_that_goes_away_is_named(photos: Path, tmp_path: Path) -> None:
    def vanish(line: str) -> None:
        if line.startswith("step "):
            shutil.rmtree(tmp_path / "run", ignore_errors=True)

    with pytest.raises(InputError, match=r"run/log\.jsonl: cannot be written \(No such file or directory\)"):
        train(dataclasses.replace(job(photos, tmp_path / "run"), say=vanish))


@pytest.mark.parametrize("policy", [RegionPolicy(discard_below=0.2), RegionPolicy(discard_above=0.9), RegionPolicy(calibrate_below=0.3)])
def test_thresholds_without_labels_are_refused(photos: Path, tmp_path: Path, policy: RegionPolicy) -> None:
    with pytest.raises(InputError, match="thresholds are for a teacher's labels; add --labels STORE"):
        train(job(photos, tmp_path / "run", policy=policy))


@pytest.mark.parametrize("with_labels", [False, True])
def test_a_student_of_other_classes_is_refused(photos: Path, store: LabelStore, tmp_path: Path, with_labels: bool) -> None:
    with pytest.raises(InputError, match="four_outputs: answers 4 classes, but the data have 3"):
        train(job(photos, tmp_path / "run", store if with_labels else None, student="python:photos:four_outputs"))
    assert not (tmp_path / "run").exists()


def test_a_batch_that_cannot_be_mixed_is_refused_before_training(photos: Path, store: LabelStore, tmp_path: Path) -> None:
    """Ten images fit one group; the last epochs' 40 images, of one crop each, do not divide into groups of 16."""
    with pytest.raises(InputError, match="mix_group: 16 images do not divide the 40 images"):
        train(job(photos, tmp_path / "run", store, batch_size=40, epochs=16.0, mixing=Mixing("mixup")))
    assert not (tmp_path / "run").exists()


def test_one_class_is_refused(photos: Path, tmp_path: Path) -> None:
    other = write_photos(tmp_path / "data")
    for split in ("train", "val"):
        for name in ("red", "blue"):
            shutil.rmtree(other / split / name)
    with pytest.raises(InputError, match="has only the class 'green'"):
        train(job(other, tmp_path / "run"))


def test_val_must_have_every_class_of_the_labels(photos: Path, store: LabelStore, tmp_path: Path) -> None:
    other = write_photos(tmp_path / "data")
    shutil.rmtree(other / "val" / "red")
    with pytest.raises(InputError, match="val: lacks the classes red of the store"):
        train(job(other, tmp_path / "run", store))


def test_a_run_is_not_overwritten(photos: Path, tmp_path: Path) -> None:
    train(job(photos, tmp_path / "run", epochs=1.0))
    with pytest.raises(InputError, match="holds a run already; add --resume"):
        train(job(photos, tmp_path / "run", epochs=1.0))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"lr": 0.2}, "was made with lr = 0.1, this command says 0.2"),
        ({"student": "python:photos:dropping_net"}, "was made with student = 'python:photos:tiny_net'"),
        ({"policy": RegionPolicy(discard_below=0.2)}, "was made with policy"),
    ],
)
def test_a_checkpoint_of_other_settings_is_refused(
    photos: Path, store: LabelStore, tmp_path: Path, changes: dict[str, Any], says: str
) -> None:
    train(job(photos, tmp_path / "run", store))
    with pytest.raises(InputError, match=says):
        train(job(photos, tmp_path / "run", store, resume=True, **changes))


def test_a_checkpoint_of_another_model_is_refused(photos: Path, store: LabelStore, tmp_path: Path) -> None:
    train(job(photos, tmp_path / "run", store))
    train(job(photos, tmp_path / "other", store, student="python:photos:dropping_net"))
    (tmp_path / "run" / "checkpoint.pt").write_bytes((tmp_path / "other" / "checkpoint.pt").read_bytes())
    with pytest.raises(InputError, match=r"checkpoint\.pt: was made with student = 'python:photos:dropping_net'"):
        train(job(photos, tmp_path / "run", store, resume=True))


@pytest.mark.parametrize("damage", [b"", b"not a checkpoint", None])
def test_a_damaged_checkpoint_is_named(photos: Path, tmp_path: Path, damage: bytes | None) -> None:
    train(job(photos, tmp_path / "run", epochs=1.0))
    path = tmp_path / "run" / "checkpoint.pt"
    path.write_bytes(path.read_bytes()[:1000] if damage is None else damage)
    with pytest.raises(InputError, match=r"checkpoint\.pt: is no whole checkpoint"):
        train(job(photos, tmp_path / "run", epochs=1.0, resume=True))


def test_a_finished_run_resumes_to_its_result(photos: Path, tmp_path: Path) -> None:
    first = train(job(photos, tmp_path / "run"))
    again = train(job(photos, tmp_path / "run", resume=True))
    assert {name: again[name] for name in ("top1", "steps", "best_top1")} == {name: first[name] for name in ("top1", "steps", "best_top1")}


def test_val_folders_must_be_classes_of_the_labels(photos: Path, store: LabelStore, tmp_path: Path) -> None:
    other = write_photos(tmp_path / "data")
    (other / "val" / "red").rename(other / "val" / "pink")
    with pytest.raises(InputError, match="pink are not in the store"):
        train(job(other, tmp_path / "run", store))
    with pytest.raises(InputError, match="pink"):
        train(job(other, tmp_path / "run"))


def test_another_dataset_is_refused(photos: Path, store: LabelStore, tmp_path: Path) -> None:
    other = write_photos(tmp_path / "data", seed=5)
    with pytest.raises(StoreError, match="not the photograph that was labelled"):
        train(job(other, tmp_path / "run", store))


def test_a_policy_that_discards_everything_is_refused(photos: Path, store: LabelStore, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="discards every crop of every image"):
        train(job(photos, tmp_path / "run", store, policy=RegionPolicy(discard_above=0.0)))


def test_a_loss_that_is_no_number_stops_the_run(photos: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="loss: nan within the 3 steps before step"):
        train(job(photos, tmp_path / "run", lr=1e30, epochs=20.0))


def test_torchrun_is_refused_until_it_is_supported(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="torchrun"):
        train(job(photos, tmp_path / "run"))


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"batch_size": 10}, "10 crops are no multiple of crops_per_image 4"),
        ({"epochs": 0.0}, "epochs: 0.0"),
        ({"lr": float("nan")}, "lr: nan"),
        ({"min_lr": 1.0}, "min_lr: 1.0 is above lr 0.1"),
        ({"warmup_epochs": 9.0}, "warmup_epochs: 9.0 are more than"),
        ({"warmup_epochs": -1.0}, "warmup_epochs: -1.0 is not"),
        ({"min_scale": 0.0}, "min_scale: 0.0"),
        ({"ema_decay": 1.0}, "ema_decay: 1.0"),
        ({"eval_crop_pct": 1.2}, "eval_crop_pct: 1.2"),
        ({"single_crop_epochs": -1.0}, "single_crop_epochs: -1.0"),
        ({"clip_grad": float("nan")}, "clip_grad: nan"),
        ({"clip_grad": -1.0}, "clip_grad: -1.0"),
        ({"betas": (0.9, 1.0)}, "betas: "),
        ({"drop_path": 1.0}, "drop_path: 1.0"),
        ({"workers": -1}, "workers: -1"),
        ({"seed": -1}, "seed: -1"),
    ],
)
def test_wrong_settings_are_refused(wrong: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        dataclasses.replace(CONFIG, **wrong)


# ---------------------------------------------------------------------------------------------------------------------- recipes


def test_every_recipe_is_a_whole_setting() -> None:
    assert all(isinstance(recipe(name), TrainConfig) for name in RECIPES)
    with pytest.raises(InputError, match="recipe: 'resnet' is unknown"):
        recipe("resnet")


def test_fkd_recipes_have_the_published_values() -> None:
    resnet, vit = recipe("fkd_resnet50"), recipe("fkd_vit")
    assert (resnet.optimizer, resnet.lr, resnet.momentum, resnet.weight_decay, resnet.epochs) == ("sgd", 0.1, 0.9, 1e-4, 300)
    assert (resnet.batch_size, resnet.crops_per_image, resnet.single_crop_epochs) == (1024, 4, None)
    assert (vit.optimizer, vit.lr, vit.weight_decay, vit.warmup_epochs, vit.min_lr) == ("adamw", 0.002, 0.05, 5, 1e-5)
    assert all((r.image_size, r.eval_crop_pct, r.interpolation) == (224, 224 / 256, "bilinear") for r in (resnet, vit))
    assert resnet.learning_rate(0.0) == 0.1  # the cosine begins at once
    assert resnet.learning_rate(150.0) == pytest.approx(0.05)


def test_the_learning_rate_warms_up_and_falls_as_a_cosine() -> None:
    config = dataclasses.replace(CONFIG, epochs=20.0, warmup_epochs=4.0, min_lr=0.01)
    assert config.learning_rate(0.0) == pytest.approx(0.001)
    assert config.learning_rate(2.0) == pytest.approx(0.05)
    assert config.learning_rate(4.0) == pytest.approx(0.1)
    assert config.learning_rate(12.0) == pytest.approx(0.055)
    assert config.learning_rate(20.0) == pytest.approx(0.01)


def test_lr_step_pass_holds_the_rate_over_a_pass(photos: Path, store: LabelStore, tmp_path: Path) -> None:
    train(job(photos, tmp_path / "run", store, lr_step="pass", log_every=1, epochs=16.0))
    rates = [line["lr"] for line in lines(tmp_path / "run", "train")]
    passes = [rates[start : start + 8] for start in range(0, 24, 8)]  # 24 images, 3 a step: 8 steps a pass of 4 epochs
    assert all(len(set(a_pass)) == 1 for a_pass in passes)
    assert len({a_pass[0] for a_pass in passes}) == 3
    changes = {"warmup_epochs": 3.0, "single_crop_warmup": True, "single_crop_epochs": 1.0}
    train(job(photos, tmp_path / "warm", store, lr_step="pass", log_every=1, epochs=12.0, **changes))
    rates = [line["lr"] for line in lines(tmp_path / "warm", "train")]
    assert len(rates) == 24  # 2 steps an epoch: 3 epochs of one crop, two passes of 4 epochs, one epoch of one crop
    held = [rates[:2], rates[2:4], rates[4:6], rates[6:14], rates[14:22], rates[22:]]
    assert all(len(set(a_pass)) == 1 for a_pass in held)
    assert [a_pass[0] for a_pass in held[:4]] == pytest.approx([0.001, 0.1 / 3, 0.2 / 3, 0.1])
    assert held[3][0] > held[4][0] > held[5][0]


def test_crops_are_resized_as_the_settings_say(photos: Path, store: LabelStore, tmp_path: Path) -> None:
    learnt = {}
    for name in ("bilinear", "bicubic"):
        train(job(photos, tmp_path / name, store, interpolation=name, epochs=1.0))
        assert load_run(tmp_path / name).preprocessing.interpolation == name
        learnt[name] = load_file(tmp_path / name / "last.safetensors")["0.weight"]
    assert not torch.equal(learnt["bilinear"], learnt["bicubic"])
    own = load_run(tmp_path / "bilinear").preprocessing
    train(job(photos, tmp_path / "own", store, epochs=1.0))
    assert load_run(tmp_path / "own").preprocessing == own


def test_hard_labels_refuse_what_only_acts_on_a_teacher_s(photos: Path, tmp_path: Path) -> None:
    for changes in ({"temperature": 4.0}, {"tail": "renorm"}):
        with pytest.raises(InputError, match=r"^temperature, tail: are for a teacher's labels; leave them out for hard labels"):
            train(job(photos, tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()
