"""What `impl="triton"` launches compiles for GPUs that are not here, and the machine code is what it should be.

The kernels are compiled in a process of their own, without Triton's interpreter and without a GPU, by the very launches that
ferkd.kernels.loss makes, up to where the driver would start them. The compilers' own reports say the rest.
"""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

# GPU, threads of a warp. The oldest, the commonest and the newest of NVIDIA's, and AMD's MI300.
TARGETS = {"sm_80": ("cuda", 80, 32), "sm_90": ("cuda", 90, 32), "sm_100": ("cuda", 100, 32), "gfx942": ("hip", "gfx942", 64)}

# What could be different on each target.
ROWS = {
    # The commonest shapes: ImageNet-1k, where rows are aligned, and ImageNet-21k, whose odd C shifts them.
    "float32 1000": {"classes": 1000},
    "bfloat16 1000": {"classes": 1000, "dtype": torch.bfloat16},
    "float32 21841": {"classes": 21841},
    "bfloat16 21841": {"classes": 21841, "dtype": torch.bfloat16},
    # The fullest registers: the longest row of one block, mixed, the most pairs, statistics; and many pairs on few warps.
    "float32 32767 everything": {"classes": 32767, "k": 64, "mixed": True, "stats": True},
    "float32 1000 mixed, k 64": {"classes": 1000, "k": 64, "mixed": True},
    # Rows read twice.
    "float32 262144": {"classes": 262144},
    "bfloat16 70001 everything": {"classes": 70001, "dtype": torch.bfloat16, "k": 64, "mixed": True, "stats": True},
}
LABELS = {
    "pairs": {"classes": 1000},
    "packed mixed by target": {"classes": 1000, "codec": "packed", "mixed": True, "confidence": "target"},
}
# What one target is enough for: the other values of each constant.
MORE_TARGET = "sm_90"
MORE_ROWS = {
    "float16 1000": {"classes": 1000, "dtype": torch.float16},
    "float16 21841": {"classes": 21841, "dtype": torch.float16},
    "float16 32768 everything": {"classes": 32768, "dtype": torch.float16, "k": 64, "mixed": True, "stats": True},
    "float16 70000 without gradient": {"classes": 70000, "dtype": torch.float16, "grad": False},
    "bfloat16 10 none": {"classes": 10, "dtype": torch.bfloat16, "k": 1, "reduction": "none"},
    "bfloat16 1001 of 1003": {"classes": 1001, "dtype": torch.bfloat16, "stride": 1003},
    "float32 8192 normalizer, upstream": {"classes": 8192, "scalars": True},
    "float32 4099 without gradient": {"classes": 4099, "grad": False, "stats": True, "reduction": "sum"},
}
MORE_LABELS = {
    "pairs in float64 mixed by target": {"classes": 1000, "probs": torch.float64, "mixed": True, "confidence": "target"},
    "half renorm": {"classes": 1000, "codec": "half", "tail": "renorm"},
    "wide half mixed": {"classes": 70001, "codec": "half", "mixed": True, "stats": True},
    "packed renorm": {"classes": 1000, "codec": "packed", "tail": "renorm"},
}
SCALINGS = {"scaled": torch.ones(()), "scaled by row": torch.ones(4)}
ELEMENT_BY_ELEMENT = (
    "bfloat16 10 none",
    "bfloat16 1001 of 1003",
)  # too short for edges; rows of a wider tensor, shifted unlike the gradient's

# Bytes of stack a thread may use, which is where registers that do not suffice go: read and written once a row, they cost nothing that
# could be measured. 1024 threads may have 64 registers each, and of a block of 32,768 elements 32 hold the row.
FULL_BLOCK_STACK, STACK = 64, 16


def rows_of(target):
    return ROWS | (MORE_ROWS if target == MORE_TARGET else {})


def labels_of(target):
    return LABELS | (MORE_LABELS if target == MORE_TARGET else {})


# ------------------------------------------------------------------------------------------------ the process that compiles


def launches(
    warp, classes, dtype=torch.float32, k=5, codec="pairs", probs=torch.float32, mixed=False, confidence="max", tail="smooth",
    reduction="mean", scalars=False, grad=True, stats=False, stride=None, batch=4, shift=0,
):  # fmt: skip
    """The two launches of one call of the op. The labels begin `shift` elements from a 16-byte boundary."""
    from ferkd.kernels import loss

    from ferkd import reference
    from ferkd.records import label_words

    def shifted(shape, dtype):
        return torch.zeros(shift + math.prod(shape), dtype=dtype)[shift:].view(shape)

    logits = torch.zeros(batch, stride or classes, dtype=dtype)[:, :classes]
    width = k if codec == "pairs" else label_words(codec, k, classes)
    labels = shifted((batch, width), torch.int64 if codec == "pairs" else torch.int32)
    target, number = shifted((batch,), torch.int64), torch.zeros(())
    counted = batch if stats else 0
    answer = reference.Answer(
        loss=torch.zeros(batch if reduction == "none" else ()),
        grad=logits.new_zeros((batch, classes) if grad else 0),
        region=torch.zeros(counted, dtype=torch.int8),
        correct=torch.zeros(counted, dtype=torch.bool),
        logsumexp=torch.zeros(counted),
    )
    return loss.launches(
        logits, labels, shifted((batch, k), probs) if codec == "pairs" else None, target,
        target if mixed else None, torch.zeros(batch) if mixed else None, number if scalars else None, number if scalars else None,
        answer, codec, k, (0.0, 0.0, 1.0, 0.1), confidence, 1.0, tail, reduction, False, warp,
    )  # fmt: skip


class Elsewhere:
    """The driver of a GPU that is not here: it knows what the GPU is, and that is all that compiling for it takes."""

    def __init__(self, target):
        self.target = target

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget(*TARGETS[self.target])

    def get_current_device(self):
        return list(TARGETS).index(self.target)

    def get_current_stream(self, device):
        return 0


def compiled(launch):
    return launch.kernel.warmup(grid=(launch.grid,), **launch.arguments, **launch.options)


def cuda_report(binary, folder):
    """Registers, bytes of stack and instructions of a compiled kernel, as NVIDIA's own tool tells them."""
    from triton import knobs

    path = Path(folder, "kernel.cubin")
    path.write_bytes(binary.asm["cubin"])
    said = subprocess.run([knobs.nvidia.cuobjdump.path, "-res-usage", "-sass", path], capture_output=True, text=True, check=True).stdout
    instructions = re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+ )?([A-Z0-9_.]+)", said, re.MULTILINE)
    return {
        "registers": int(re.search(r"REG:(\d+)", said)[1]),
        "stack": int(re.search(r"STACK:(\d+)", said)[1]),
        "wide_loads": sum(i.startswith("LDG.") and ".128" in i for i in instructions),
        "wide_stores": sum(i.startswith("STG.") and ".128" in i for i in instructions),
        "narrow_stores": sum(i.startswith("STG.") and ".128" not in i for i in instructions),
        "doubles": sum(i.split(".")[0] in ("DADD", "DMUL", "DFMA") for i in instructions),
        "atomics": [i for i in instructions if i.startswith(("ATOM", "RED."))],
    }


def hip_report(binary):
    """The same of AMD's assembly."""
    text = binary.asm["amdgcn"]

    def number(name):
        return int(re.search(rf"\.{name}:\s+(\d+)", text)[1])

    instructions = re.findall(r"^\s+([a-z]\w+)", text, re.MULTILINE)
    return {
        "registers": number("vgpr_count"),
        "stack": number("private_segment_fixed_size") + number("vgpr_spill_count"),
        "wide_loads": sum(i in ("global_load_dwordx4", "buffer_load_dwordx4") for i in instructions),
        "wide_stores": sum(i in ("global_store_dwordx4", "buffer_store_dwordx4") for i in instructions),
        "narrow_stores": sum(i.startswith(("global_store", "buffer_store")) and not i.endswith("x4") for i in instructions),
        "doubles": sum(i.startswith(("v_add_f64", "v_mul_f64", "v_fma_f64")) for i in instructions),
        "atomics": [i for i in instructions if "atomic" in i],
    }


def compile_everything(folder):
    from ferkd.kernels import scale
    from triton.runtime import driver

    for target, (kind, _, warp) in TARGETS.items():
        driver.set_active(Elsewhere(target))
        for which, cases in enumerate((labels_of(target), rows_of(target))):
            for case, settings in cases.items():
                launch = launches(warp, **settings)[which]
                binary = compiled(launch)
                report = hip_report(binary) if kind == "hip" else cuda_report(binary, folder)
                constants = {name: launch.arguments[name] for name in ("BLOCK", "ONE_BLOCK", "PLACES", "LANES") if name in launch.arguments}
                yield {"target": target, "case": case, "threads": launch.options["num_warps"] * warp, **constants, **report}
        for case, upstream in SCALINGS.items():
            launch = scale.launch(torch.zeros(4, 1001, dtype=torch.bfloat16), upstream, warp)
            binary = compiled(launch)
            report = hip_report(binary) if kind == "hip" else cuda_report(binary, folder)
            yield {"target": target, "case": case, "threads": launch.options["num_warps"] * warp, **report}

    driver.set_active(Elsewhere(MORE_TARGET))
    device = driver.active.get_current_device()
    for which in range(2):
        kernel = launches(32, 1000)[which].kernel
        for changed in ({}, {"batch": 1}, {"batch": 7}, {"batch": 64}, {"stride": 1004}, {"stride": 1024}, {"shift": 1}):
            compiled(launches(32, 1000, **changed)[which])
            yield {"again": changed, "kernel": kernel.fn.__name__, "binaries": len(kernel.device_caches[device][0])}


if __name__ == "__main__":
    for found in compile_everything(sys.argv[1]):
        print(json.dumps(found), flush=True)


# ------------------------------------------------------------------------------------------------ what it found


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compiled")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | {
        "TRITON_CACHE_DIR": str(folder / "cache")
    }
    done = subprocess.run([sys.executable, __file__, folder], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def reports(found, cases, target):
    chosen = {line["case"]: line for line in found if line.get("target") == target and line["case"] in cases}
    assert list(chosen) == list(cases)
    return chosen


@pytest.mark.parametrize("target", TARGETS)
def test_registers_suffice(found, target):
    a_multiprocessor_has = 131072 if target == "gfx942" else 65536
    for case, report in (reports(found, labels_of(target), target) | reports(found, rows_of(target), target)).items():
        assert report["registers"] * max(report["threads"], 256) <= a_multiprocessor_has, case
        assert report["stack"] <= (FULL_BLOCK_STACK if report.get("BLOCK") == 32768 else STACK), case


@pytest.mark.parametrize("target", TARGETS)
def test_bodies_of_rows_are_read_and_written_16_bytes_at_once(found, target):
    for case, report in reports(found, rows_of(target), target).items():
        if case in ELEMENT_BY_ELEMENT:
            assert report["wide_stores"] == 0
            continue
        has_gradient = "without gradient" not in case
        vectors = -(-report["BLOCK"] // (report["threads"] * report["LANES"]))
        reads = 1 if report["ONE_BLOCK"] else 2 + has_gradient  # the first step of the loop stands before it
        assert report["wide_loads"] >= vectors * reads, case
        assert report["wide_stores"] >= vectors * has_gradient, case
        assert report["narrow_stores"] <= 6, case  # edges, pairs and the row's own numbers


@pytest.mark.parametrize("target", TARGETS)
def test_gradients_are_scaled_16_bytes_at_once(found, target):
    for case, report in reports(found, SCALINGS, target).items():
        assert report["wide_loads"] == report["wide_stores"] == 1, case
        assert report["narrow_stores"] == 1, case  # the tail
        assert report["stack"] == report["doubles"] == 0, case


@pytest.mark.parametrize("target", TARGETS)
def test_double_precision_is_for_the_few_numbers_of_a_label(found, target):
    rows = reports(found, rows_of(target), target)
    # 8 and 32 elements a thread: what is computed for every class is not computed in float64.
    assert rows["float32 21841"]["doubles"] <= rows["float32 1000"]["doubles"] + 8


@pytest.mark.parametrize("target", TARGETS)
def test_no_atomic_adds_floats(found, target):
    for case, report in (reports(found, labels_of(target), target) | reports(found, rows_of(target), target)).items():
        # The ticket, of launches that return a scalar, and nothing else.
        assert len(report["atomics"]) == (case in rows_of(target) and case != "bfloat16 10 none"), case
        assert not any(kind in name.upper() for name in report["atomics"] for kind in ("F16", "F32", "F64")), case


def test_no_kernel_compiles_again_for_another_batch_stride_or_address(found):
    counts = {}
    for line in found:
        if "again" in line:
            counts.setdefault(line["kernel"], []).append(line["binaries"])
    assert list(counts) == ["adapt_labels", "loss_rows"]
    for kernel, binaries in counts.items():
        assert len(set(binaries)) == 1, (kernel, binaries)
