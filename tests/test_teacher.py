"""Loading teachers and students: what a SPEC may be, where preprocessing comes from, weights that fit, weights that do not."""

import argparse
import importlib
import itertools
import json
import pickle
import sys

import pytest
import torch
from torch import nn

from ferkd.errors import InputError
from ferkd.preprocessing import IMAGENET_MEAN, Preprocessing
from ferkd.specs import build
from ferkd.teacher import build_model, load_model, load_run, load_teacher
from ferkd.weights import load_state, read_weights, save_weights, weights_sha256

_numbers = itertools.count()


@pytest.fixture
def python_spec(tmp_path, monkeypatch):
    """Writes a module into the current directory; returns the SPEC of its function `make`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))

    def write(body: str, name: str = "make") -> str:
        module = f"spec_module_{next(_numbers)}"
        (tmp_path / f"{module}.py").write_text("import torch\nfrom torch import nn\n" + body)
        importlib.invalidate_caches()
        return f"python:{module}:{name}"

    return write


TINY = """
class Tiny(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, stride=2)
        self.norm = nn.BatchNorm2d(4)
        self.head = nn.Linear(4, classes)

    def forward(self, x):
        return self.head(torch.relu(self.norm(self.conv(x))).mean((2, 3)))


def make(num_classes=5):
    torch.manual_seed(0)
    return Tiny(num_classes), {"input_size": 16, "mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25], "interpolation": "bicubic",
                               "classes": ["c%d" % i for i in range(num_classes)]}
"""


# ---- Preprocessing


def test_normalising_is_the_textbook_formula():
    pixels = torch.randint(0, 256, (4, 3, 7, 7), dtype=torch.uint8)
    how = Preprocessing(7)
    expected = (pixels.double() / 255 - torch.tensor(how.mean).view(1, 3, 1, 1)) / torch.tensor(how.std).view(1, 3, 1, 1)
    normalised = how.normalise(pixels)
    assert normalised.dtype == torch.float32
    assert (normalised - expected).abs().max() < 1e-6


def test_preprocessing_survives_json():
    how = Preprocessing(32, (0.1, 0.2, 0.3), (0.5, 0.5, 0.25), "bicubic", 1.0)
    assert Preprocessing.from_dict(json.loads(json.dumps(how.as_dict()))) == how


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"input_size": 0}, "input_size: 0"),
        ({"mean": (1, 2)}, "three numbers"),
        ({"mean": (0.1, float("nan"), 0)}, "three numbers"),
        ({"mean": (123.7, 116.3, 103.5), "std": (58.4, 57.1, 57.4)}, r"pixels in \[0, 1\]"),
        ({"std": (0.1, 0.0, 0.1)}, r"pixels in \[0, 1\]"),
        ({"interpolation": "cubic"}, "choose one of bilinear, bicubic"),
        ({"crop_pct": 1.5}, "crop_pct: 1.5"),
        ({"size": 3}, "unknown key"),
    ],
)
def test_preprocessing_that_makes_no_sense_is_refused(values, message):
    with pytest.raises(InputError, match=message):
        Preprocessing.from_dict(values)


# ---- python:MODULE:CALLABLE


def test_a_python_callable_brings_model_preprocessing_and_classes(python_spec):
    teacher = load_teacher(python_spec(TINY))
    assert teacher.preprocessing == Preprocessing(16, (0.5,) * 3, (0.25,) * 3, "bicubic")
    assert (teacher.outputs, teacher.class_names, teacher.assumed) == (5, ("c0", "c1", "c2", "c3", "c4"), ())
    assert not teacher.model.training
    assert not any(parameter.requires_grad for parameter in teacher.model.parameters())


def test_what_a_callable_does_not_say_is_reported_as_assumed(python_spec):
    spec = python_spec("def make():\n    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 4))\n")
    teacher = load_teacher(spec)
    assert teacher.assumed == ("input_size", "mean", "std", "interpolation")
    assert teacher.preprocessing.mean == IMAGENET_MEAN
    assert teacher.class_names is None


def test_a_student_callable_is_given_the_number_of_classes(python_spec):
    model, how = build_model(python_spec(TINY), num_classes=7, input_size=24)
    assert model.head.out_features == 7
    assert how.input_size == 24


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("def other():\n    pass\n", "has no callable 'make'"),
        ("import no_such_library_at_all\n", "importing it failed: No module named 'no_such_library_at_all'"),
        ("raise RuntimeError('broken\\nmodule')\n", "importing it raised RuntimeError: broken module"),
        ("def make():\n    raise OSError('no file x')\n", "calling it raised OSError: no file x"),
        ("def make():\n    return 3\n", "returned int; return an nn.Module"),
        ("def make():\n    return nn.Identity(), {'size': 3}\n", "unknown key.*'size'"),
        ("def make():\n    return nn.Identity(), {'std': [0, 0, 0]}\n", r"make: mean .* pixels in \[0, 1\]"),
        ("def make():\n    return nn.Identity(), {'classes': 'ab'}\n", "give a list of folder names"),
        ("def make():\n    return nn.Identity()\n", r"a tensor of shape \(2, 3, 224, 224\); a classifier answers"),
        ("def make():\n    return nn.Linear(3, 3)\n", "fails on images of 224 x 224 pixels.*--input-size PX"),
        (TINY.replace("range(num_classes)", "range(3)"), "names 3 classes but answers 5"),
        (TINY.replace("num_classes=5", "num_classes=1"), "has 1 output"),
    ],
)
def test_a_callable_that_is_no_classifier_is_refused(python_spec, body, message):
    with pytest.raises(InputError, match=message) as error:
        load_teacher(python_spec(body))
    assert "\n" not in str(error.value)


def test_a_module_that_is_not_there_names_the_folder_searched(python_spec, tmp_path):
    with pytest.raises(InputError, match=f"no module 'missing_mod', neither installed nor in {tmp_path}"):
        load_teacher("python:missing_mod:make")


def test_a_student_callable_must_take_num_classes(python_spec):
    with pytest.raises(InputError, match="takes no num_classes"):
        build_model(python_spec("def make():\n    return nn.Identity()\n"), num_classes=3)


@pytest.mark.parametrize("spec", ["resnet18", "keras:resnet18", "timm:", "python:module", ""])
def test_a_spec_that_names_nothing_is_refused(spec):
    with pytest.raises(InputError, match=r"names no model|write python:MODULE:CALLABLE"):
        load_teacher(spec)


# ---- timm and torchvision


def test_timm_models_bring_their_data_config():
    loaded = load_model("timm:resnet10t", num_classes=6, pretrained=False)
    assert loaded.outputs == 6
    assert loaded.preprocessing == Preprocessing(176, IMAGENET_MEAN, (0.229, 0.224, 0.225), "bicubic", 0.875)


def test_a_student_name_alone_means_timm():
    model, _ = build_model("vit_tiny_patch16_224", num_classes=3, input_size=64, drop_path_rate=0.1)
    assert model(torch.zeros(1, 3, 64, 64)).shape == (1, 3)
    assert model.blocks[-1].drop_path1.drop_prob == pytest.approx(0.1)


def test_torchvision_models_bring_the_transforms_of_their_weights():
    loaded = load_model("torchvision:mobilenet_v3_small", pretrained=False)
    assert loaded.preprocessing == Preprocessing(224, IMAGENET_MEAN, (0.229, 0.224, 0.225), "bilinear", 0.875)
    assert loaded.class_names[217] == "English springer"


def test_torchvision_models_are_built_for_their_weights_as_torchvision_builds_them(tmp_path, monkeypatch):
    """googlenet and inception_v3 turn ImageNet's normalisation into their own; a student that learns from nothing does not."""
    models = importlib.import_module("torchvision.models")
    torch.save(models.get_model("googlenet", weights=None, init_weights=False).state_dict(), tmp_path / "googlenet.pth")
    assert load_model("torchvision:googlenet", weights=tmp_path / "googlenet.pth").model.transform_input
    asked = []
    monkeypatch.setattr(models, "get_model", lambda name, **options: asked.append(options) or torch.nn.Identity())
    for for_weights, size in ((True, None), (True, 224), (False, None)):
        build("torchvision:vit_h_14", None, False, size, None, for_weights=for_weights)
    assert [options.get("image_size") for options in asked] == [518, 224, None]
    build("torchvision:inception_v3", None, False, None, None)
    assert "transform_input" not in asked[-1]


@pytest.mark.parametrize("spec", ["timm:resnet19", "torchvision:resnet19"])
def test_an_unknown_name_suggests_near_ones(spec):
    with pytest.raises(InputError, match=r"did you mean .*resnet18"):
        load_model(spec)


def test_without_a_network_the_error_says_how_to_pass_weights(monkeypatch):
    constants = importlib.import_module("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match=r"could not be fetched .* --teacher-weights FILE") as error:
        load_model("timm:resnet10t")
    assert "\n" not in str(error.value)

    def refuse(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: "/nonexistent/hub")
    monkeypatch.setattr("os.makedirs", lambda *_, **__: None)
    with pytest.raises(InputError, match=r"could not be fetched \(OSError: no network\).* --teacher-weights FILE"):
        load_model("torchvision:mobilenet_v3_small")


@pytest.mark.parametrize(
    ("spec", "hidden", "install"), [("timm:a", "timm", r"'ferkd\[timm\]'"), ("torchvision:a", "torchvision.models", "torchvision")]
)
def test_a_library_that_is_absent_is_named(monkeypatch, spec, hidden, install):
    monkeypatch.setitem(sys.modules, hidden, None)
    with pytest.raises(InputError, match=f"not installed; pip install {install}"):
        load_model(spec)


def test_drop_path_is_for_timm_models(python_spec):
    with pytest.raises(InputError, match="drop_path_rate"):
        build_model(python_spec(TINY), num_classes=3, drop_path_rate=0.1)


# ---- Local weights


@pytest.mark.parametrize("wrap", ["plain", "state_dict", "model", "model_ema", "ddp", "compiled", "averaged"])
def test_pth_files_are_unwrapped(python_spec, tmp_path, wrap):
    spec = python_spec(TINY)
    source = load_model(spec).model
    nn.init.normal_(source.conv.weight)
    state = source.state_dict()
    content = {
        "plain": state,
        "state_dict": {"epoch": 3, "state_dict": state},
        "model": {"model": {f"module.{name}": tensor for name, tensor in state.items()}},
        "model_ema": {"model": {"other": torch.zeros(1)}, "model_ema": state},
        "ddp": {f"module.{name}": tensor for name, tensor in state.items()},
        "compiled": {f"module._orig_mod.{name}": tensor for name, tensor in state.items()},
        "averaged": {"n_averaged": torch.tensor(3), **{f"module.{name}": tensor for name, tensor in state.items()}},
    }[wrap]
    torch.save(content, tmp_path / "weights.pth")
    loaded = load_model(spec, weights=tmp_path / "weights.pth")
    assert torch.equal(loaded.model.conv.weight, source.conv.weight)
    assert loaded.weights_sha256 == weights_sha256(source)


def test_weights_with_another_number_of_classes_set_the_number_of_classes(tmp_path):
    model, _ = build_model("timm:resnet10t", num_classes=7)
    torch.save(model.state_dict(), tmp_path / "seven.pth")
    loaded = load_model("timm:resnet10t", weights=tmp_path / "seven.pth")
    assert loaded.outputs == 7
    assert loaded.weights_sha256 == weights_sha256(model)


class Exploit:
    def __reduce__(self):
        return (open, ("owned", "w"))


def test_code_is_never_unpickled(python_spec, tmp_path):
    torch.save({"state_dict": {}, "args": Exploit()}, tmp_path / "evil.pth")
    with open(tmp_path / "plain.pt", "wb") as file:
        pickle.dump(Exploit(), file)
    for name in ("evil.pth", "plain.pt"):
        with pytest.raises(InputError, match="ferkd never unpickles code"):
            load_model(python_spec(TINY), weights=tmp_path / name)
    assert not (tmp_path / "owned").exists()


def test_weights_that_do_not_fit_say_how(python_spec, tmp_path):
    spec = python_spec(TINY)
    state = load_model(spec).model.state_dict()

    def refused(content: dict, message: str, name: str = "w.pth") -> None:
        torch.save(content, tmp_path / name)
        with pytest.raises(InputError, match=message) as error:
            load_model(spec, weights=tmp_path / name)
        assert "\n" not in str(error.value)

    refused({**state, "head.weight": torch.zeros(9, 4), "head.bias": torch.zeros(9)}, "file is for 9 classes, the model has 5")
    refused({k: v for k, v in state.items() if "conv" not in k}, r"2 missing \(conv.weight, conv.bias\)")
    refused({**state, "extra": torch.zeros(1)}, r"1 unknown \(extra\)")
    refused({**state, "conv.weight": torch.zeros(8, 3, 3, 3)}, r"conv.weight \(8, 3, 3, 3\) instead of \(4, 3, 3, 3\)")
    refused({"epoch": 3}, "holds no tensors by name")
    refused(torch.zeros(3), "holds a Tensor")
    refused(state, "unknown kind of weights file", "w.npz")
    (tmp_path / "w.pth").write_bytes(b"not a zip")
    with pytest.raises(InputError, match=r"w.pth: (not a whole PyTorch|holds more than tensors)"):
        load_model(spec, weights=tmp_path / "w.pth")
    (tmp_path / "w.safetensors").write_bytes(b"short")
    with pytest.raises(InputError, match=r"not a whole safetensors file"):
        load_model(spec, weights=tmp_path / "w.safetensors")
    with pytest.raises(InputError, match="no such weights file"):
        load_model(spec, weights=tmp_path / "nowhere.pth")


def test_old_files_without_batch_counters_load(python_spec, tmp_path):
    spec = python_spec(TINY)
    model = load_model(spec).model
    torch.save({k: v for k, v in model.state_dict().items() if "num_batches" not in k}, tmp_path / "old.pth")
    load_state(model, tmp_path / "old.pth")


def test_the_hash_sees_values_names_and_shapes():
    def digest(**tensors: torch.Tensor) -> str:
        module = nn.Module()
        for name, tensor in tensors.items():
            module.register_buffer(name, tensor)
        return weights_sha256(module)

    base = digest(a=torch.zeros(2, 3))
    assert digest(a=torch.zeros(2, 3)) == base
    changed = torch.zeros(2, 3)
    changed[0, 0] = 1e-30
    assert len({base, digest(a=changed), digest(b=torch.zeros(2, 3)), digest(a=torch.zeros(3, 2)), digest(a=torch.zeros(2, 3).int())}) == 5
    assert digest(a=torch.zeros(2, dtype=torch.bfloat16), b=torch.zeros(())) != base


# ---- Runs


def test_a_saved_run_comes_back_whole(python_spec, tmp_path):
    spec = python_spec(TINY)
    model, _ = build_model(spec, num_classes=3)
    how = Preprocessing(20, (0.1, 0.2, 0.3), (0.5, 0.5, 0.5), "bicubic", 0.9)
    save_weights(tmp_path / "run/last.safetensors", model, spec, ["é", "b", "c"], how, {"top1": "0.5"})
    loaded = load_teacher(f"run:{tmp_path / 'run'}")
    assert (loaded.class_names, loaded.preprocessing, loaded.outputs) == (("é", "b", "c"), how, 3)
    assert loaded.weights_sha256 == weights_sha256(model)
    assert read_weights(tmp_path / "run/last.safetensors")[1]["top1"] == "0.5"
    assert load_teacher(f"run:{tmp_path / 'run'}", input_size=24).preprocessing.input_size == 24
    assert [file.name for file in (tmp_path / "run").iterdir()] == ["last.safetensors"], "no temporary file may stay behind"

    nn.init.zeros_(model.head.weight)
    save_weights(tmp_path / "run/best.safetensors", model, spec, ["é", "b", "c"], how)
    assert load_run(tmp_path / "run").weights_sha256 == weights_sha256(model), "the best weights come before the last"
    assert load_run(tmp_path / "run/last.safetensors").weights_sha256 == loaded.weights_sha256


def test_the_same_weights_are_the_same_bytes_with_aligned_tensors(tmp_path):
    model, extra = nn.Linear(3, 5), {f"key {i}": "ä" * i for i in range(20)}
    for name in ("a", "b"):
        save_weights(tmp_path / name, model, "timm:x", [f"class {i}" for i in range(5)], Preprocessing(), extra)
    content = (tmp_path / "a").read_bytes()
    assert content == (tmp_path / "b").read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    assert end % 8 == 0
    assert json.loads(content[8:end])["__metadata__"]["key 19"] == "ä" * 19


def test_a_saved_student_is_a_plain_timm_checkpoint(tmp_path):
    import timm

    model, how = build_model("resnet10t", num_classes=3)
    model.to(memory_format=torch.channels_last)
    save_weights(tmp_path / "last.safetensors", nn.DataParallel(model), "resnet10t", ["a", "b", "c"], how)
    again = timm.create_model("resnet10t", num_classes=3, checkpoint_path=str(tmp_path / "last.safetensors"))
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))
    assert load_run(tmp_path).outputs == 3


def test_weights_of_a_run_also_serve_as_local_weights(tmp_path):
    model, _ = build_model("resnet10t", num_classes=3)
    how = Preprocessing(64, (0.5,) * 3, (0.5,) * 3)
    save_weights(tmp_path / "last.safetensors", model, "resnet10t", ["a", "b", "c"], how)
    loaded = load_model("timm:resnet10t", weights=tmp_path / "last.safetensors")
    assert (loaded.class_names, loaded.preprocessing) == (("a", "b", "c"), how)


def test_tied_weights_can_be_saved(tmp_path):
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    model[1].weight = model[0].weight
    save_weights(tmp_path / "tied.safetensors", model, "python:a:b", ["a"], Preprocessing())
    assert sorted(read_weights(tmp_path / "tied.safetensors")[0]) == ["0.weight", "1.weight"]


def test_runs_that_cannot_be_read_are_named(tmp_path):
    with pytest.raises(InputError, match=r"holds neither best.safetensors nor last.safetensors"):
        load_teacher(f"run:{tmp_path}")
    torch.save({"a": torch.zeros(1)}, tmp_path / "foreign.pth")
    with pytest.raises(InputError, match="not written by ferkd train"):
        load_run(tmp_path / "foreign.pth")
    with pytest.raises(InputError, match="a run brings its own weights"):
        load_teacher("run:somewhere", weights=tmp_path / "foreign.pth")


def test_a_read_only_folder_is_named(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InputError, match=r"last.safetensors: cannot be written"):
        save_weights(tmp_path / "file/last.safetensors", nn.Linear(1, 1), "python:a:b", ["a"], Preprocessing())


def test_a_training_checkpoint_of_timm_is_read_and_one_with_code_is_not(tmp_path):
    """timm's train.py saves its arguments, an argparse.Namespace, beside the weights."""
    net = build_model("timm:test_resnet", num_classes=3)[0]
    arguments = argparse.Namespace(model="test_resnet", lr=0.1, opt_betas=None, names=["a"])
    checkpoint = {
        "epoch": 3,
        "arch": "test_resnet",
        "state_dict": net.state_dict(),
        "optimizer": {"state": {}},
        "args": arguments,
        "metric": 0.5,
    }
    torch.save(checkpoint, tmp_path / "model_best.pth.tar")
    loaded = load_model("timm:test_resnet", num_classes=3, weights=tmp_path / "model_best.pth.tar")
    assert weights_sha256(loaded.model) == weights_sha256(net)

    class Code:
        def __reduce__(self):
            return exec, ("raise SystemExit('ran')",)

    checkpoint["args"] = argparse.Namespace(model=Code())
    torch.save(checkpoint, tmp_path / "hostile.pth.tar")
    with pytest.raises(InputError, match=r"hostile.pth.tar: holds more than tensors"):
        read_weights(tmp_path / "hostile.pth.tar")


def test_weights_of_other_classes_are_taken_but_for_the_last_layer(tmp_path):
    old, new = (build_model("timm:test_resnet", num_classes=classes)[0] for classes in (7, 3))
    torch.save(old.state_dict(), tmp_path / "seven.pth")
    before = {name: value.clone() for name, value in new.state_dict().items()}
    with pytest.raises(InputError, match="the file is for 7 classes, the model has 3"):
        load_state(new, tmp_path / "seven.pth")
    said = load_state(new, tmp_path / "seven.pth", new_last_layer=True)
    assert said == f"{tmp_path / 'seven.pth'}: is for 7 classes, the student has 3: fc.weight, fc.bias begin anew, the rest is taken"
    for name, value in new.state_dict().items():
        assert torch.equal(value, before[name] if name.startswith("fc.") else old.state_dict()[name]), name
    torch.save(new.state_dict(), tmp_path / "three.pth")
    assert load_state(new, tmp_path / "three.pth", new_last_layer=True) is None
    torch.save({**old.state_dict(), "conv1.weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(InputError, match="these are the weights of another architecture"):
        load_state(new, tmp_path / "other.pth", new_last_layer=True)
