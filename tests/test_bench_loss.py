"""The loss benchmark's own machinery: what it measures runs, counts what it says and leaves nothing out in silence. No time decides."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ferkd import ops

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from bench import bench_loss, loss_variants, machine, timing

ROOT = Path(__file__).resolve().parents[1]

needs_cpu_kernel = pytest.mark.skipif(ops.why_not("cpu", "cpu") is not None, reason=str(ops.why_not("cpu", "cpu")))
CPU = torch.device("cpu")


def test_every_variant_of_a_cell_gives_the_gradient_of_its_loss():
    p = loss_variants.problem(32, 50, torch.float32, CPU)
    found, missing = bench_loss.variants(bench_loss.Cell(32, 50, torch.float32, settings=True), CPU, compiled=False)
    assert "liger" in missing  # on a CPU: absent, or in need of a GPU
    gradients = {
        bench_loss.key_of(variant): variant.run(p)[0] for variant in found if variant.backend != "torch" and variant.name == "ferkd"
    }
    for key, gradient in gradients.items():
        assert gradient.shape == p.logits.shape, key
        assert gradient.abs().sum() > 0, key


@needs_cpu_kernel
def test_the_raw_op_gets_the_arguments_of_ferkd_loss():
    """`kernel` fills in the op's schema by name: a change of the schema must not leave it measuring something else."""
    p = loss_variants.problem(32, 50, torch.float32, CPU)
    (through_autograd,) = loss_variants.through_ferkd_loss("cpu")(p)
    _, gradient, *_ = loss_variants.kernel("cpu")(p)
    torch.testing.assert_close(gradient, through_autograd, rtol=0, atol=0)


def test_turned_inputs_are_the_same_step_with_its_rows_rotated():
    p = loss_variants.problem(8, 50, torch.float32, CPU)
    q = p.turned(3)
    assert q.logits.data_ptr() != p.logits.data_ptr()
    for name in ("logits", "ids", "half", "packed", "target", "lam"):
        torch.testing.assert_close(getattr(q, name)[3], getattr(p, name)[0])


def test_a_variant_that_fails_is_named_with_its_error_and_the_others_stay():
    p = loss_variants.problem(8, 50, torch.float32, CPU)
    found = [
        loss_variants.Variant("good", lambda p: p.logits.detach().clone()),
        loss_variants.Variant("bad", lambda p: p.logits @ p.logits),
    ]
    missing = {}
    assert list(bench_loss.warmed(found, [p], missing)) == [("good", "torch", "half")]
    assert "RuntimeError" in missing["bad torch half"]


def test_peak_memory_on_a_cpu_counts_what_is_held_at_the_worst_moment():
    def call():
        a = torch.empty(1000, dtype=torch.int8)
        b = torch.empty(3000, dtype=torch.int8)
        del a
        return torch.cat([b, torch.empty(500, dtype=torch.int8)])

    assert timing.peak_bytes(call, CPU) == 3000 + 500 + 3500  # 1000 were given back before


def test_calls_take_turns_with_their_inputs():
    seen = []
    call = timing.turns(seen.append, ["a", "b"])
    for _ in range(3):
        call()
    assert seen == ["a", "b", "a"]


def test_the_table_of_tiny_shapes_is_written(tmp_path):
    run = subprocess.run(
        [sys.executable, str(ROOT / "bench/bench_loss.py"), "--tiny", "--no-compile", "--seconds", "4"],
        env=os.environ | {"OUT": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "left out: liger:" in run.stdout
    path = tmp_path / f"loss-{machine.file_name(CPU)}.csv"
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["dtype"] for row in rows} == {"float32", "bfloat16"} or "64x101 bfloat16 and what follows it" in run.stdout
    assert {"copy", "fkd", "eager_dense", "eager_sparse", "hard_labels"} <= {row["variant"] for row in rows}
    for row in rows:
        assert float(row["p20_ms"]) <= float(row["median_ms"]) <= float(row["p80_ms"])
        assert row["device"] == machine.processor()
        assert row["torch"] == torch.__version__
    assert all("another loss" in row["note"] for row in rows if row["variant"] == "hard_labels")
