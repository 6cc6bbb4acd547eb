"""The CUDA kernels: every layout of a row, what the compiler makes of them, and, where there is a GPU, streams, graphs, no waiting."""

import re
import shutil
import subprocess
from pathlib import Path

import cuda_on_cpu
import pytest
import torch
from loss_cases import CUDA, DEVICE, IMPLS, POLICY, assert_close, labels, logits, oracle, random, words_of

from bench.timing import launches
from ferkd import Records, Region, RegionPolicy, ferkd_loss, ops, reference

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.usefixtures("poisoned")
needs_gpu = pytest.mark.skipif(DEVICE != "cuda" or ops.why_not("cuda", "cuda") is not None, reason="needs a GPU and the CUDA part")


# ---------------------------------------------------------------------------------------------- every layout of a row

# Classes that reach every kernel, in float32 and in the half types: a warp a row with 1, 2, 4 and 8 vectors a lane; one small block with
# 4 and 8 vectors a thread; clusters of 2, 4 and 8 small blocks; 8 large ones; without clusters, one large block and the walk that reads
# twice.
LAYOUTS = [100, 200, 500, 1000, 2001, 4000, 8000, 16001, 20000, 32000, 65003, 131000, 190001]
WITHOUT_CLUSTERS = {"FERKD_SIMT_ARCHITECTURE": "80", "FERKD_SIMT_ORDER": "reversed"}


@pytest.mark.parametrize("impl", [CUDA])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("classes", LAYOUTS)
@pytest.mark.parametrize(
    "environment", [{}, {"FERKD_SIMT_ARCHITECTURE": "80", "FERKD_SIMT_ORDER": "reversed"}], ids=["clusters", "without"]
)
def test_every_layout_equals_the_oracle(environment, classes, dtype, impl, monkeypatch):
    """With clusters and without, threads in either order: 5 rows, mixed, with statistics."""
    if environment and DEVICE == "cuda":
        pytest.skip("a GPU decides this itself")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    ids, probs, target = labels(5, classes, 5, seed=classes)
    x = logits(5, classes, dtype)
    x[1, target[1]] = 40.0
    x[2, :3] = 40.0  # a tie at the largest
    mix = (torch.tensor([1, 0, 3, 4, 2]), torch.tensor([0.7, 1.0, 0.0, 0.5, 0.25]))
    rule = {"policy": POLICY, "temperature": 1.5, "mix": mix}
    leaf = x.clone().requires_grad_()
    loss, stats = ferkd_loss(leaf, (ids, probs), target, impl=impl, stats=True, **rule)
    (gradient,) = torch.autograd.grad(loss, leaf)
    expected_loss, expected_gradient, regions, _ = oracle(x, ids, probs, target, **rule)
    assert_close(loss.detach(), gradient, expected_loss, expected_gradient, dtype)
    assert torch.equal(stats.region, regions)
    first = [int((row == row.max()).nonzero()[0]) for row in x]
    assert stats.correct.tolist() == [a == b for a, b in zip(first, target.tolist(), strict=True)]
    assert stats.correct[1]
    torch.testing.assert_close(stats.logsumexp.double(), torch.logsumexp(x.double() / 1.5, dim=1), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("impl", [CUDA])
@pytest.mark.parametrize("classes", [1000, 5003, 20001])
def test_more_rows_than_blocks_and_misaligned_rows_in_every_dtype(classes, impl, monkeypatch):
    """Rows in turn on the same blocks (their shared memory is used again), each row at another alignment."""
    rows = 24 if DEVICE == "cpu" else 4200  # more than loss_cuda.h's LOSS_PARTS, which are fewer where it is emulated
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        ids, probs, target = labels(rows, classes, 3)
        wide = torch.full((rows, classes + 1), torch.nan, dtype=dtype)
        wide[:, :classes] = logits(rows, classes, dtype)
        x = wide[:, :classes].requires_grad_()
        loss = ferkd_loss(x, (ids, probs), target, policy=POLICY, impl=impl)
        (gradient,) = torch.autograd.grad(loss, x)
        assert_close(loss.detach(), gradient, *oracle(x, ids, probs, target, policy=POLICY)[:2], dtype)


@pytest.mark.parametrize("impl", [CUDA])
@pytest.mark.parametrize("rows", [4097 * 4, 16385])
def test_very_many_rows(rows, impl):
    """More rows than parts of the loss and of S: the blocks walk on."""
    ids, probs, target = labels(rows, 3, 2)
    x = logits(rows, 3).requires_grad_()
    loss = ferkd_loss(x, (ids, probs), target, policy=POLICY, impl=impl)
    (gradient,) = torch.autograd.grad(loss, x)
    expected = ferkd_loss(x, (ids, probs), target, policy=POLICY, impl="reference")
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, x)[0], rtol=1e-4, atol=1e-10)


@pytest.mark.parametrize("impl", [CUDA])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("columns", [1, 7, 1000, 1001])
def test_scaling_a_stored_gradient(columns, dtype, impl):
    scale = torch.ops.ferkd.scale_ if DEVICE == "cuda" else torch.ops.ferkd_emulated.scale_
    grad = (random(9, columns, seed=3) - 0.5).to(dtype)
    for upstream in (torch.tensor(0.37), torch.linspace(-1, 1, 9), torch.tensor(1.0), torch.tensor(3.0).expand(9)):
        found = grad.clone()
        scale(found, upstream)
        assert torch.equal(found, (grad.float() * upstream.reshape(-1, 1)).to(dtype))
    with pytest.raises(ValueError, match="upstream: it must be"):
        scale(grad, torch.ones(8))


# ---------------------------------------------------------------------------------------------- what nobody checked


@pytest.mark.parametrize("impl", [CUDA])
@pytest.mark.parametrize("classes", [10, 5000])
@pytest.mark.parametrize("what", ["id", "negative id", "target", "partner"])
def test_without_validation_wrong_data_make_their_own_row_nan_and_touch_no_other_memory(what, classes, impl):
    ids, probs, target = labels(6, classes, 3)
    mix = (torch.arange(6), torch.full((6,), 0.5)) if what == "partner" else None
    if what == "id":
        ids[2, 1] = classes
    elif what == "negative id":
        ids[2, 1] = -(2**40)
    elif what == "target":
        target[2] = -100
    else:
        mix[0][2] = 2**40
    x = logits(6, classes).requires_grad_()
    loss = ferkd_loss(x, (ids, probs), target, mix=mix, reduction="none", impl=impl)
    (gradient,) = torch.autograd.grad(loss.sum(), x)
    assert loss.isnan().tolist() == [False, False, True, False, False, False]
    assert gradient.isnan().all(dim=1).tolist() == [False, False, True, False, False, False]
    assert ferkd_loss(x, (ids, probs), target, mix=mix, impl=impl).isnan(), "a mean over wrong labels must not look right"
    with pytest.raises(ValueError, match=r"row 2"):
        ferkd_loss(x, (ids, probs), target, mix=mix, impl=impl, validate=True)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_target_that_is_no_class_is_never_right(impl, monkeypatch):
    """Not by its lower 32 bits either, nor as the class that memory is read at in its place."""
    monkeypatch.setattr(reference, "check_data", lambda *_: None)
    ids, probs, target = labels(4, 10, 3)
    x = logits(4, 10)
    x[:, 3], x[1, 0] = 50.0, 60.0
    x[2, 9] = 60.0
    target[:] = torch.tensor([2**32 + 3, -100, 2**40, 3])
    if impl == "cpu":  # which checks
        with pytest.raises(ValueError, match="row 0"):
            ferkd_loss(x, (ids, probs), target, impl=impl, stats=True)
        return
    _, stats = ferkd_loss(x, (ids, probs), target, impl=impl, stats=True)
    assert stats.correct.tolist() == [False, False, False, True]


@pytest.mark.parametrize("impl", [CUDA])
def test_damaged_words_make_their_row_nan(impl):
    ids, probs, target = labels(4, 10, 3)
    words = words_of(ids, probs, "half", 10)
    words[1, 0] |= 0xFFFF
    loss, stats = ferkd_loss(logits(4, 10), Records(words, "half", 3, 10), target, reduction="none", impl=impl, stats=True)
    assert loss.isnan().tolist() == [False, True, False, False]
    assert stats.region.tolist() == [Region.KEPT] * 4
    discarding = RegionPolicy(1.0, 0.0, 1.0)
    assert ferkd_loss(logits(4, 10), Records(words, "half", 3, 10), target, policy=discarding, impl=impl) == 0


@pytest.mark.parametrize("impl", [CUDA])
def test_the_op_itself_refuses_what_it_could_not_read_safely(impl):
    ids, probs, target = labels(4, 10, 3)
    names = [argument.name for argument in torch.ops.ferkd.loss_cuda.default._schema.arguments]
    rule = [0.0, 0.0, 1.0, 0.1, "max", 1.0, "smooth", "mean", False, True, False, False]
    call = dict(zip(names, [logits(4, 10), ids, probs, target, None, None, None, None, "pairs", 3, *rule], strict=True))
    torch.ops.ferkd.loss_cuda(**call)
    for message, changed in (
        ("logits: .* last stride of 1", {"logits": logits(10, 4).t()}),
        ("this dtype is not supported", {"logits": logits(4, 10).double()}),
        ("k: it must be", {"k": 65}),
        ("labels: wrong shape", {"labels": ids[:-1]}),
        ("target: it must be", {"target": target[:-1]}),
        ("must be 0-dim", {"normalizer": torch.ones(1)}),
        ("mix: partner and lam", {"lam": torch.ones(4)}),
    ):
        with pytest.raises(ValueError, match=message):
            torch.ops.ferkd.loss_cuda(**(call | changed))


def test_the_emulated_kernels_are_loaded_where_there_is_no_gpu():
    if DEVICE == "cpu" and shutil.which("g++"):
        assert cuda_on_cpu.load() is None


# ---------------------------------------------------------------------------------------------- what the compiler makes of them

ARCHITECTURES = ("80", "86", "89", "90", "100", "120")
_NVCC = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")


def _why_no_compiler():
    if _NVCC is None:
        return "needs nvcc"
    release = re.search(r"release (\d+)\.(\d+)", subprocess.run([_NVCC, "--version"], capture_output=True, text=True).stdout)
    if release is None or (int(release[1]), int(release[2])) < (12, 8):
        return "needs nvcc 12.8, which knows sm_100 and sm_120"
    return None


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """(what the assembler says, the machine code) of loss_cuda.cu for every architecture, compiled as setup.py does."""
    if (reason := _why_no_compiler()) is not None:
        pytest.skip(reason)
    home = Path(torch.__file__).parent / "include"
    out = tmp_path_factory.mktemp("sass") / "all.fatbin"
    command = [_NVCC, "-std=c++20", "-O3", "--expt-relaxed-constexpr", "-DTORCH_TARGET_VERSION=0x020b000000000000", "-DTORCH_STABLE_ONLY"]
    command += [
        "-DUSE_CUDA",
        f"-I{home}",
        "--threads",
        "2",
        "-fatbin",
        "-Xptxas",
        "-v",
        str(ROOT / "csrc" / "loss_cuda.cu"),
        "-o",
        str(out),
    ]
    command += [part for arch in ARCHITECTURES for part in ("-gencode", f"arch=compute_{arch},code=sm_{arch}")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stderr, out


@pytest.mark.slow
def test_no_kernel_spills_a_register_on_any_architecture(compiled):
    said = compiled[0]
    entries = re.findall(r"Compiling entry function '(\S+)' for '(\S+)'", said)
    assert {arch for _, arch in entries} == {f"sm_{arch}" for arch in ARCHITECTURES}
    assert (
        len({name for name, arch in entries if "rows_by" in name}) == 29
    )  # 4 + 4 layouts of the loss and the scaling, 3 dtypes; one of half types
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", said)
    assert len(frames) >= len(entries)
    assert set(frames) == {("0", "0", "0")}
    # What __launch_bounds__ promises: so many registers that the blocks a multiprocessor should hold fit its 65,536.
    registers = [int(used) for used in re.findall(r"Used (\d+) registers", said)]
    assert len(registers) == len(entries)
    for (name, _), used in zip(entries, registers, strict=True):
        if "rows_by_warp" in name:
            assert used <= 128
        elif "rows_by_block" in name:
            assert used <= (96 if "ELi288E" in name else 128)


INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,5}\*/\s+(.*?);\s+/\* 0x[0-9a-f]{16} \*/\s*\n\s+/\* 0x([0-9a-f]{16}) \*/")


def waits_between_loads(body, vectors):
    """The instructions among a row's vector loads that wait for an earlier one of them: the row would take the memory's latency twice.

    From bit 41 of an instruction's second word on stand its control bits: at 5 the barrier (of 6; 7 for none) that its result sets, at 11
    the six barriers that it waits for.
    """
    code = [(text, int(word, 16) >> 41) for text, word in INSTRUCTION.findall(body)]
    loads = [at for at, (text, _) in enumerate(code) if re.search(r"LDG\.E\S*\.128", text)]
    waits = []
    for first in range(0, len(loads), vectors):
        row, set_by_loads = loads[first : first + vectors], set()
        for text, control in code[row[0] : row[-1] + 1]:
            waits += [text for barrier in set_by_loads if control >> 11 >> barrier & 1]
            if re.search(r"LDG\.E\S*\.128", text):
                set_by_loads.add(control >> 5 & 7)
    return waits


@pytest.mark.slow
def test_logits_and_gradient_move_in_16_byte_vectors(compiled):
    triton = pytest.importorskip("triton")
    disassembler = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not disassembler.exists():
        pytest.skip("needs the cuobjdump that Triton brings")
    text = subprocess.run([disassembler, "-sass", str(compiled[1])], capture_output=True, text=True, check=True).stdout
    seen = 0
    for body in text.split("Function : ")[1:]:
        name = body.split("\n", 1)[0]
        layout = re.search(r"rows_by_(warp|block)INS\w*?(Float32|BFloat16|Float16)ELi(\d+)E", name)
        if layout is None or "scale_rows" in name:
            continue
        seen += 1
        vectors, reads = int(layout[3]), 2 if "Lb1E" in name else 1
        loads, stores = (len(re.findall(rf"{kind}\.E\S*\.128", body)) for kind in ("LDG", "STG"))
        assert loads == vectors * reads, name
        assert stores >= vectors, name  # some are there twice, on both sides of a branch
        assert not waits_between_loads(body, vectors), name
        assert not re.findall(r"\b(LDL|STL)\b", body), f"{name} uses local memory"
    assert seen == 26 * len(ARCHITECTURES)


# ---------------------------------------------------------------------------------------------- on a GPU


@pytest.fixture
def on_gpu():
    torch.set_default_device("cuda")
    yield
    torch.set_default_device(None)


@needs_gpu
@pytest.mark.parametrize(("reduction", "kernels"), [("mean", 2), ("sum", 2), ("none", 1)])
def test_so_few_kernels_are_launched(reduction, kernels, on_gpu):
    ids, probs, target = labels(64, 1000, 5)
    x = logits(64, 1000)
    torch.use_deterministic_algorithms(False)  # poisoning new tensors is a kernel each
    with torch.no_grad():
        for _ in range(2):  # the first may load modules
            found = launches(lambda: ferkd_loss(x, (ids, probs), target, policy=POLICY, reduction=reduction, impl="cuda"))
    assert found == kernels


@needs_gpu
@pytest.mark.parametrize("impl", ["cuda", "triton"])
@pytest.mark.parametrize("classes", [1000, 21841])
def test_inside_a_cuda_graph_on_a_stream_of_its_own_without_asking_the_host(classes, impl, on_gpu):
    ids, probs, target = labels(32, classes, 5)
    x = logits(32, classes).requires_grad_()
    words = Records(words_of(ids, probs, "half", classes), "half", 5, classes)
    upstream = torch.tensor(2.0)

    def step():
        loss, stats = ferkd_loss(x, words, target, policy=POLICY, impl=impl, stats=True, upstream=upstream)
        return loss, torch.autograd.grad(loss * upstream, x)[0], stats.correct

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
        torch.cuda.set_sync_debug_mode("error")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss, gradient, _ = step()
    for seed in (5, 6):
        with torch.no_grad():
            x.copy_(logits(32, classes, seed=seed))
        graph.replay()
        expected = ferkd_loss(x, words, target, policy=POLICY, impl="reference") * upstream
        torch.testing.assert_close(loss * upstream, expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(gradient, torch.autograd.grad(expected, x)[0], rtol=1e-4, atol=1e-7)


@needs_gpu
@pytest.mark.parametrize("impl", ["cuda", "triton"])
def test_the_answer_is_the_same_every_time(impl, on_gpu):
    ids, probs, target = labels(300, 5000, 5)
    x = logits(300, 5000).requires_grad_()
    found = [ferkd_loss(x, (ids, probs), target, policy=POLICY, impl=impl) for _ in range(5)]
    assert len({loss.item() for loss in found}) == 1
    gradients = [torch.autograd.grad(loss, x)[0] for loss in found]
    assert all(torch.equal(gradients[0], other) for other in gradients)


@needs_gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("impl", ["cuda", "triton"])
def test_on_another_device_than_the_current_one(impl):
    torch.set_default_device("cuda:1")
    try:
        ids, probs, target = labels(8, 1000, 5)
        x = logits(8, 1000).requires_grad_()
        loss = ferkd_loss(x, (ids, probs), target, impl=impl)
        (gradient,) = torch.autograd.grad(loss * 2, x)
        assert gradient.device.index == 1
        torch.testing.assert_close(loss, ferkd_loss(x, (ids, probs), target, impl="reference"))
    finally:
        torch.set_default_device(None)
