"""One step: pixels, updates that are skipped, the moving average, compilation; thresholds as quantiles, an online teacher."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from photos import colour_teacher, tiny_net, write_photos, write_store
from safetensors.torch import load_file
from torch import Tensor, nn

from ferkd.data import CropView, StoredCrops
from ferkd.distributed import Ranks
from ferkd.errors import CheckFailed, InputError
from ferkd.labeling import LabelSettings, label
from ferkd.meter import Meter, check_skipped
from ferkd.mixing import Mixing
from ferkd.normalise import Normalise
from ferkd.online import load_online_teacher
from ferkd.photos import LabelledPhotos
from ferkd.quantiles import quantile_policy, threshold
from ferkd.recipes import TrainConfig
from ferkd.regions import Region, RegionPolicy
from ferkd.sources import scan_split
from ferkd.sources.folders import FolderPhotos
from ferkd.step import MovingAverage, compile_mode, make_optimizer
from ferkd.store import LabelStore
from ferkd.stream import Visit
from ferkd.task import Job
from ferkd.train import train

CONFIG = TrainConfig(
    epochs=8.0, warmup_epochs=0.0, batch_size=12, crops_per_image=4, lr=0.1, eval_every=8.0, log_every=4, workers=0, eval_crop_pct=1.0
)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_photos(tmp_path_factory.mktemp("photos") / "data")


@pytest.fixture(scope="module")
def store(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> LabelStore:
    return write_store(photos, tmp_path_factory.mktemp("labels") / "store")


def job(photos: Path, out: Path, labels: LabelStore | None = None, student: str = "python:photos:tiny_net", **changes: Any) -> Job:
    names = {field.name for field in dataclasses.fields(Job)}
    own = {name: changes.pop(name) for name in list(changes) if name in names}
    config = dataclasses.replace(CONFIG, **changes)
    return Job(photos, student, out, config, labels.path if labels else None, **{"say": lambda line: None, **own})


def lines(run: Path, kind: str = "train") -> list[dict[str, Any]]:
    return [line for text in (run / "log.jsonl").read_text().splitlines() if (line := json.loads(text))["kind"] == kind]


# ------------------------------------------------------------------------------------------------------------------- the pixels


@pytest.mark.parametrize("as_photographs", [True, False])
def test_pixels_are_normalised_by_channel(as_photographs: bool) -> None:
    mean, std = (0.1, 0.5, 0.7), (0.2, 0.25, 0.3)
    pixels = torch.randint(0, 256, (5, 3, 6, 6), dtype=torch.uint8)
    given = pixels.contiguous(memory_format=torch.channels_last) if as_photographs else pixels
    wanted = (pixels.double() / 255 - torch.tensor(mean).double()[:, None, None]) / torch.tensor(std).double()[:, None, None]
    found = Normalise(6, mean, std)(given)
    assert found.dtype == torch.float32
    assert found.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-6)
    assert (given == pixels).all()  # left as they were


# ------------------------------------------------------------------------------------------------------------- gradients that are lost


class _Lapsing(nn.Module):
    """A student whose answers are NaN in some of its training steps, told by a counter."""

    def __init__(self, net: nn.Module, lapses: tuple[int, ...]) -> None:
        super().__init__()
        self.net, self.lapses, self.steps = net, lapses, 0

    def forward(self, images: Tensor) -> Tensor:
        if self.training:
            self.steps += 1
            if self.steps in self.lapses:
                images = images * math.nan
        out: Tensor = self.net(images)
        return out


def lapsing_once(num_classes: int) -> tuple[nn.Module, dict[str, object]]:
    net, described = tiny_net(num_classes)
    return _Lapsing(net, (1, 6)), described


def lapsing_always(num_classes: int) -> tuple[nn.Module, dict[str, object]]:
    net, described = tiny_net(num_classes)
    return _Lapsing(net, tuple(range(9, 1000))), described


@pytest.mark.parametrize("changes", [{}, {"optimizer": "adamw", "lr": 0.01}, {"ema_decay": 0.9, "clip_grad": 1.0}], ids=str)
def test_a_lost_gradient_is_skipped_and_counted(photos: Path, store: LabelStore, tmp_path: Path, changes: dict[str, Any]) -> None:
    """The first update too: PyTorch's fused SGD takes unset memory for its momentum then, if it is left to itself."""
    summary = train(job(photos, tmp_path / "run", store, "python:test_step:lapsing_once", nan="skip", **changes))
    assert [line.get("skipped_steps", 0) for line in lines(tmp_path / "run")] == [1, 1, 0, 0]
    assert all(0 < line["loss"] < 5 for line in lines(tmp_path / "run"))
    weights = load_file(tmp_path / "run/last.safetensors")
    assert all(value.float().abs().max() < 10 for name, value in weights.items() if "num_batches" not in name)
    assert summary["top1"] > 0


def test_a_skipped_update_changes_nothing(photos: Path, store: LabelStore, tmp_path: Path) -> None:
    """Two steps, and the same two with a third that is lost: the same weights, momentum and running statistics."""
    changes = {"min_lr": 0.1, "single_crop_epochs": 0.0, "ema_decay": None}
    train(job(photos, tmp_path / "two", store, epochs=1.0, **changes))
    train(job(photos, tmp_path / "three", store, "python:test_step:lapsing_third", nan="skip", epochs=1.5, **changes))
    two = load_file(tmp_path / "two/last.safetensors")
    three = {name.removeprefix("net."): value for name, value in load_file(tmp_path / "three/last.safetensors").items()}
    assert two.keys() == three.keys()
    assert all(torch.equal(three[name], value) for name, value in two.items() if "num_batches" not in name)
    momenta = []
    for name in ("two", "three"):
        state = torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)["state"]["optimizer"]["state"]
        momenta.append([values["momentum_buffer"] for values in state.values()])
    assert all(torch.equal(a, b) for a, b in zip(*momenta, strict=True))


def lapsing_third(num_classes: int) -> tuple[nn.Module, dict[str, object]]:
    net, described = tiny_net(num_classes)
    return _Lapsing(net, (3,)), described


def test_gradients_that_stay_lost_stop_the_run(photos: Path, tmp_path: Path) -> None:
    student = "python:test_step:lapsing_always"
    with pytest.raises(InputError, match=r"nan: 8 of the 16 updates before step 16 had to be skipped, so .*the checkpoint of step 8 is"):
        train(job(photos, tmp_path / "skip", student=student, nan="skip", eval_every=4.0))
    with pytest.raises(InputError, match=r"loss: nan within the 4 steps before step 12; the checkpoint of step 8 is safe; lower --lr"):
        train(job(photos, tmp_path / "stop", student=student, eval_every=4.0))
    saved = load_file(tmp_path / "stop/last.safetensors")
    assert all(value.isfinite().all() for value in saved.values())


def lapsing_beside_an_evaluation(num_classes: int) -> tuple[nn.Module, dict[str, object]]:
    net, described = tiny_net(num_classes)
    return _Lapsing(net, (4, 5)), described


def test_a_lost_update_beside_an_evaluation_is_one_of_many(photos: Path, store: LabelStore, tmp_path: Path) -> None:
    """Between the evaluation at step 4 and the line at step 5 it is the only one; it is judged, and counted, with those before."""
    student = "python:test_step:lapsing_beside_an_evaluation"
    summary = train(job(photos, tmp_path / "run", store, student, nan="skip", eval_every=2.0, log_every=5))
    assert summary["steps"] == 16
    assert [line.get("skipped_steps", 0) for line in lines(tmp_path / "run")] == [2, 0, 0, 0]
    assert all(math.isfinite(line["loss"]) for line in lines(tmp_path / "run"))


def test_updates_are_judged_over_stretches_of_at_least_twenty_steps() -> None:
    meter = Meter(Ranks())

    def judge(steps: int, skipped: int, step: int, is_last: bool = False, log_every: int = 1) -> None:
        meter.judged_steps, meter.judged_skips = meter.judged_steps + steps, meter.judged_skips + skipped
        check_skipped(meter, log_every, step, is_last, lambda: None)

    judge(19, 19, 119)
    with pytest.raises(InputError, match="nan: 19 of the 20 updates before step 120 had to be skipped"):
        judge(1, 0, 120)
    judge(20, 9, 140)
    judge(10, 10, 150, is_last=True)  # the rest of a run that was judged before
    judge(20, 0, 170)
    judge(20, 20, 190, log_every=50)
    with pytest.raises(InputError, match="nan: 30 of the 60 updates"):
        judge(40, 10, 230, log_every=50)
    with pytest.raises(InputError, match="nan: 2 of the 3 updates"):
        judge(3, 2, 3, is_last=True)  # the whole run


class _Keeping(nn.Module):
    """A student that makes a constant at its first forward, as many make grids and masks, and keeps it."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.kept: Tensor | None = None

    def forward(self, images: Tensor) -> Tensor:
        if self.kept is None:
            self.kept = torch.ones(1, 1, *images.shape[2:])
        out: Tensor = self.net(images * self.kept)
        return out


def keeping_net(num_classes: int) -> tuple[nn.Module, dict[str, object]]:
    net, described = tiny_net(num_classes)
    return _Keeping(nn.Sequential(nn.Conv2d(3, 3, 1), net)), described


def test_a_student_may_keep_what_its_first_forward_made(photos: Path, store: LabelStore, tmp_path: Path) -> None:
    assert train(job(photos, tmp_path / "run", store, "python:test_step:keeping_net", epochs=2.0, eval_every=1.0))["steps"] == 4


def test_a_first_update_that_is_skipped_leaves_the_momentum_unharmed() -> None:
    """What GradScaler does when the first fp16 gradients overflow."""
    model = nn.Linear(4, 3)
    optimizer = make_optimizer(model, TrainConfig())
    for lost in (1.0, 0.0):
        for p in model.parameters():
            p.grad = torch.full_like(p, math.nan if lost else 1.0)
        optimizer.grad_scale, optimizer.found_inf = None, torch.tensor(lost)  # type: ignore[attr-defined]
        optimizer.step()
    for p in model.parameters():
        momentum = optimizer.state[p]["momentum_buffer"]
        assert (momentum - 1).abs().max() < 1e-3  # the gradient and a little weight decay


def test_fp16_trains_with_its_scaler_on_a_cpu(photos: Path, store: LabelStore, tmp_path: Path) -> None:
    train(job(photos, tmp_path / "run", store, amp="fp16", clip_grad=1.0, nan="skip"))
    assert all(0 < line["loss"] < 5 for line in lines(tmp_path / "run"))


# ------------------------------------------------------------------------------------------------------------------ moving average


def test_the_moving_average_follows_weights_and_buffers() -> None:
    torch.manual_seed(0)
    model = tiny_net(3)[0]
    average = MovingAverage(model, 0.5)
    expected = {name: value.clone().double() for name, value in model.state_dict().items()}
    for step in range(4):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p))
            model[1].running_mean.add_(1.0)  # type: ignore[index, union-attr, operator]
            model[1].num_batches_tracked.add_(1)  # type: ignore[index, union-attr, operator]
        average.update(step)
        decay = min(0.5, (1 + step) / (10 + step))
        for name, value in model.state_dict().items():
            expected[name] += (1 - decay) * (value.double() - expected[name])
    for name, value in average.module.state_dict().items():
        if value.is_floating_point():
            torch.testing.assert_close(value.double(), expected[name], rtol=1e-5, atol=1e-6)
        else:
            assert value == 4
    assert not average.module.training


def test_a_moving_average_of_a_model_that_counts_nothing() -> None:
    model = nn.Linear(2, 2)
    average = MovingAverage(model, 0.0)
    with torch.no_grad():
        model.weight.fill_(3.0)
    average.update(0)
    torch.testing.assert_close(average.module.weight, model.weight)


# ---------------------------------------------------------------------------------------------------------------------- compilation


@pytest.mark.slow
def test_a_compiled_step_has_no_breaks_and_is_compiled_once_a_kind(photos: Path, store: LabelStore, tmp_path: Path) -> None:
    """Mixing draws other boxes, partners and lambdas at every step, and the last epochs another number of crops: no new graph for any."""
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    mixing = Mixing("mixup_cutmix", mix_group=3, mix_per="row")
    policy = RegionPolicy(discard_below=0.3, calibrate_below=0.7)
    changes = {"epochs": 12.0, "single_crop_epochs": 2.0, "mixing": mixing, "policy": policy, "log_every": 1, "ema_decay": 0.9}
    train(job(photos, tmp_path / "eager", store, **changes))
    train(job(photos, tmp_path / "run", store, compile="default", **changes))
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    compiled = ["compile_seconds" in line for line in lines(tmp_path / "run")]
    assert compiled == [True] + [False] * 23
    eager, other = load_file(tmp_path / "eager/last.safetensors"), load_file(tmp_path / "run/last.safetensors")
    for name, value in eager.items():
        torch.testing.assert_close(other[name], value, rtol=1e-3, atol=1e-4)


@pytest.fixture
def quick_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Traces as always, and runs what it traced as it is; keeps two versions of a function."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    monkeypatch.setattr(torch._dynamo.config, "recompile_limit", 2)


def breaking_net(num_classes: int) -> tuple[nn.Module, dict[str, object]]:
    net, described = tiny_net(num_classes)
    net.append(_Break())
    return net, described


class _Break(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return images


def test_one_training_after_the_other_is_compiled(photos: Path, store: LabelStore, tmp_path: Path, quick_compiler: None) -> None:
    """PyTorch keeps so many versions of a function and no more, whoever made them."""
    for number in range(5):
        train(job(photos, tmp_path / f"run{number}", store, epochs=1.0, compile="default", temperature=1.0 + number))


@pytest.mark.parametrize(("student", "why"), [("breaking_net", "graph_break"), ("lapsing_always", "again and again")])
def test_a_student_that_is_not_one_graph_is_refused_in_one_line(
    photos: Path, store: LabelStore, tmp_path: Path, quick_compiler: None, student: str, why: str
) -> None:
    with pytest.raises(
        InputError, match=rf"^compile: the student cannot be compiled as one graph \(.*{why}.*\); train it with --compile no"
    ):
        train(job(photos, tmp_path / "run", store, f"python:test_step:{student}", compile="default"))


def test_synchronised_batchnorm_is_not_compiled() -> None:
    """PyTorch's own cannot be traced into one graph."""
    two = Ranks(world=2, device=torch.device("cuda"))
    assert compile_mode(CONFIG, two) == "default"
    together = dataclasses.replace(CONFIG, sync_batchnorm=True)
    assert compile_mode(together, two) == "no"
    assert compile_mode(together, Ranks(device=torch.device("cuda"))) == "default"
    with pytest.raises(InputError, match="compile: max-autotune cannot trace PyTorch's SyncBatchNorm"):
        compile_mode(dataclasses.replace(together, compile="max-autotune"), two)


def test_cuda_graphs_do_not_go_with_parts() -> None:
    with pytest.raises(InputError, match="compile: reduce-overhead records CUDA graphs"):
        dataclasses.replace(CONFIG, compile="reduce-overhead", accumulate=2)


# ------------------------------------------------------------------------------------------------------------ thresholds as quantiles


@pytest.mark.parametrize("confidence", ["max", "target"])
@pytest.mark.parametrize("compact", [False, True])
def test_quantiles_divide_the_store_as_they_say(photos: Path, tmp_path: Path, confidence: Any, compact: bool) -> None:
    store = write_store(photos, tmp_path / "store", crops=40, compact=compact)
    policy = quantile_policy(store, RegionPolicy(0.2, 0.5, 0.9, confidence=confidence))
    assert 0 < policy.discard_below < policy.calibrate_below < policy.discard_above < 1
    counts = store.scan(policy).counts / store.scan(policy).counts.sum()
    assert counts[Region.DISCARDED] == pytest.approx(0.3, abs=0.01)
    assert counts[Region.CALIBRATED] == pytest.approx(0.3, abs=0.01)
    nothing = RegionPolicy(smoothing=0.2)
    assert quantile_policy(store, nothing) is nothing


def test_crops_of_one_confidence_fall_on_one_side() -> None:
    counts = np.zeros(int(np.float32(1).view(np.uint32) >> 8) + 2, np.int64)
    half, one = (int(np.float32(p).view(np.uint32) >> 8) for p in (0.5, 1.0))
    counts[half], counts[one] = 60, 40
    assert threshold(counts, 0.6) == pytest.approx(0.5, abs=1e-4)
    assert threshold(counts, 0.6) > 0.5  # the sixty lie below it
    assert threshold(counts, 0.7) == 1.0  # nothing is above, and what is below is below
    assert (threshold(counts, 0.0), threshold(counts, 1.0)) == (0.0, 1.0)


def test_a_run_says_which_probabilities_its_quantiles_were(photos: Path, store: LabelStore, tmp_path: Path) -> None:
    said: list[str] = []
    policy = RegionPolicy(discard_below=0.25, calibrate_below=0.5)
    summary = train(job(photos, tmp_path / "run", store, policy=policy, thresholds="quantile", say=said.append))
    resolved = quantile_policy(store, policy)
    assert summary["policy"] == dataclasses.asdict(resolved)
    assert json.loads((tmp_path / "run/config.json").read_text())["policy"] == dataclasses.asdict(resolved)
    assert summary["stored_regions"]["discarded"] == pytest.approx(0.25 * 24 * 12, abs=3)
    assert any(f"discard_below {resolved.discard_below:.6g}" in line for line in said)
    with pytest.raises(InputError, match="thresholds: quantiles are a store's; add --labels STORE"):
        train(job(photos, tmp_path / "no-store", thresholds="quantile"))


# --------------------------------------------------------------------------------------------------------------- an online teacher


TEACHER = "python:photos:colour_teacher"


def test_an_online_teacher_answers_as_the_one_that_labels(photos: Path, tmp_path: Path) -> None:
    settings = LabelSettings(photos, TEACHER, tmp_path / "store", crops=6, topk=2, skip_preflight=True, flip=False)
    store = label(settings, say=lambda line: None)
    assert store is not None
    config = dataclasses.replace(CONFIG, topk=2)
    teacher = load_online_teacher(TEACHER, None, None, config, scan_split(photos, "train"), torch.device("cpu"), None)
    assert teacher.classes.names == tuple(store.class_names)
    view = CropView(teacher.size, teacher.loaded.preprocessing.interpolation)
    crops = StoredCrops(LabelledPhotos(FolderPhotos(photos / "train"), store), store, np.arange(len(store)), RegionPolicy(), view, 0)
    for image in (0, 9, 20):
        item = crops[Visit(image, 0, 6)]
        ids, probs = teacher(item.pixels)
        stored_ids, stored_probs = store.unpack(item.words.numpy().view(np.uint32))  # type: ignore[union-attr]
        assert ids.tolist() == stored_ids.tolist()
        np.testing.assert_allclose(probs.numpy(), stored_probs, rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize("size", [16, 24])
def test_a_student_learns_from_an_online_teacher(photos: Path, tmp_path: Path, size: int) -> None:
    changes = {"topk": 2, "epochs": 40.0, "teacher_input_size": size, "min_scale": 0.5}
    summary = train(job(photos, tmp_path / "run", teacher=TEACHER, **changes))
    assert (summary["method"], summary["stored_regions"]) == ("online FKD", None)
    assert summary["top1"] > 0.9
    changes |= {"epochs": 8.0, "policy": RegionPolicy(discard_below=0.77, calibrate_below=0.79), "mixing": Mixing("selfmix")}
    summary = train(job(photos, tmp_path / "rule", teacher="python:test_step:unsure_teacher", **changes))
    assert summary["method"] == "online FerKD"
    regions = [line["regions"] for line in lines(tmp_path / "rule")]
    assert all(max(line[name] for line in regions) > 0 for name in ("discarded", "calibrated", "kept"))


def test_an_online_teacher_s_workers_change_nothing(photos: Path, tmp_path: Path) -> None:
    for workers in (0, 2):
        train(job(photos, tmp_path / str(workers), teacher=TEACHER, topk=2, teacher_input_size=20, epochs=2.0, workers=workers))
    one, other = (load_file(tmp_path / name / "last.safetensors") for name in ("0", "2"))
    assert all(torch.equal(value, other[name]) for name, value in one.items())


def test_what_does_not_go_with_an_online_teacher_is_refused(photos: Path, store: LabelStore, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="teacher: a store brings its teacher's answers; give either"):
        train(job(photos, tmp_path / "run", store, teacher=TEACHER))
    with pytest.raises(InputError, match="teacher_weights, teacher_input_size: whose"):
        train(job(photos, tmp_path / "run", teacher_input_size=16))
    with pytest.raises(InputError, match="topk: 9, but the teacher has only 3 classes"):
        train(job(photos, tmp_path / "run", teacher=TEACHER, topk=9))
    with pytest.raises(InputError, match="policy: discards every crop of the 4 steps before step 4; lower"):
        train(job(photos, tmp_path / "nothing", teacher=TEACHER, policy=RegionPolicy(discard_above=0.5)))
    with pytest.raises(CheckFailed):
        train(job(photos, tmp_path / "run", teacher="python:test_step:wrong_teacher", topk=2))
    assert not (tmp_path / "run").exists()


class _Unsure(nn.Module):
    def __init__(self, teacher: nn.Module) -> None:
        super().__init__()
        self.teacher = teacher

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.teacher(images)
        return logits / 8


def unsure_teacher() -> tuple[nn.Module, dict[str, object]]:
    teacher, described = colour_teacher()
    return _Unsure(teacher), described


def wrong_teacher() -> tuple[nn.Module, dict[str, object]]:
    teacher, described = colour_teacher()
    return teacher, {**described, "mean": (0.9, 0.1, 0.1), "std": (0.1, 1.0, 1.0)}


def softmax_teacher() -> tuple[nn.Module, dict[str, object]]:
    teacher, described = colour_teacher()
    return nn.Sequential(teacher, nn.Softmax(1)), described


def test_a_run_of_another_teacher_is_not_resumed(photos: Path, tmp_path: Path) -> None:
    train(job(photos, tmp_path / "run", teacher=TEACHER, topk=2, skip_preflight=True))
    with pytest.raises(InputError, match="was made with teacher_input_size = 16, this command says 24"):
        train(job(photos, tmp_path / "run", teacher=TEACHER, teacher_input_size=24, topk=2, skip_preflight=True, resume=True))
    with pytest.raises(InputError, match="was made with teacher = "):
        train(job(photos, tmp_path / "run", topk=2, resume=True))
