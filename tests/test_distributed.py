"""Joining a group of processes and leaving it; BatchNorm over all of them."""

from __future__ import annotations

import contextlib

import pytest
import torch
import torch.distributed as dist

from ferkd.distributed import joined, with_synchronised_batchnorm
from ferkd.errors import InputError, Stopped


@pytest.mark.parametrize(("error", "leaves"), [(None, True), (Stopped("saved"), True), (InputError("a full disk"), False)], ids=str)
def test_a_process_that_alone_meets_an_error_does_not_wait_for_the_others(
    monkeypatch: pytest.MonkeyPatch, error: Exception | None, leaves: bool
) -> None:
    """Leaving NCCL's group is a meeting of all processes. Pretended: there are no two GPUs here."""
    for name, value in {"RANK": 1, "WORLD_SIZE": 2, "LOCAL_RANK": 1, "LOCAL_WORLD_SIZE": 2}.items():
        monkeypatch.setenv(name, str(value))
    left = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(dist, "init_process_group", lambda *arguments, **named: None)
    monkeypatch.setattr(dist, "new_group", lambda *arguments, **named: None)
    monkeypatch.setattr(dist, "destroy_process_group", lambda: left.append(True))
    with pytest.raises(type(error)) if error else contextlib.nullcontext(), joined() as ranks:
        assert (ranks.rank, ranks.device) == (1, torch.device("cuda", 1))
        if error:
            raise error
    assert bool(left) == leaves


@pytest.mark.parametrize("name", ["efficientnet_b0", "resnet10t"])
def test_synchronised_batchnorm_changes_no_answer(name: str) -> None:
    """timm's BatchNormAct2d holds the activation too, which PyTorch's own conversion loses."""
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=7).eval()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        before = model(images)
        converted = with_synchronised_batchnorm(model).eval()
        torch.testing.assert_close(converted(images), before)
    assert any(isinstance(module, torch.nn.SyncBatchNorm) for module in converted.modules())
