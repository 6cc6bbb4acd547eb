"""docs/api.md is what the code says, and a strict type-checker understands what a user writes against it."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

import ferkd

ROOT = Path(__file__).parents[1]


def test_the_page_is_made_from_the_code() -> None:
    spec = importlib.util.spec_from_file_location("make_api", ROOT / "docs/make_api.py")
    assert spec is not None
    assert spec.loader is not None
    make_api = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make_api)
    page = make_api.page()
    assert page == (ROOT / "docs/api.md").read_text(), "run python docs/make_api.py"
    for name in ferkd.__all__:
        assert name == "__version__" or f"### `ferkd.{name}`" in page


USER = """
from __future__ import annotations

import torch

from ferkd import CropLoader, FerKDLoss, LabelStore, LossStats, Records, Region, RegionPolicy, ferkd_loss

policy = RegionPolicy(discard_below=0.1, calibrate_below=0.3, confidence="target")
criterion: FerKDLoss = FerKDLoss(policy, temperature=2.0, tail="renorm")


def step(store: LabelStore, student: torch.nn.Module, loader: CropLoader) -> list[float]:
    losses: list[float] = []
    for batch in loader:
        records: Records = loader.records(batch)
        found = ferkd_loss(student(batch.pixels), records, batch.target, policy=policy, stats=True)
        assert isinstance(found, tuple)
        loss, stats = found
        reveal: LossStats = stats
        kept: torch.Tensor = reveal.region.eq(Region.KEPT)
        losses.append(float(loss) + int(kept.sum()))
    return losses
"""
WRONG = 'from ferkd import RegionPolicy\nRegionPolicy(confidence="median")\nRegionPolicy(discard="0.1")\n'


@pytest.mark.slow
def test_a_strict_users_file_type_checks(tmp_path: Path) -> None:
    """Types are shipped (py.typed): right use passes mypy's strict mode, wrong use does not."""
    pytest.importorskip("mypy")
    (tmp_path / "user.py").write_text(USER)
    (tmp_path / "wrong.py").write_text(WRONG)
    # one process for both: following ferkd's imports is most of the time
    command = [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent", "--cache-dir", "cache", "user.py", "wrong.py"]
    ended = subprocess.run(command, cwd=tmp_path, env=os.environ | {"MYPYPATH": str(ROOT)}, capture_output=True, text=True, timeout=300)
    assert "user.py" not in ended.stdout, ended.stdout
    assert "wrong.py:2" in ended.stdout
    assert "wrong.py:3" in ended.stdout
