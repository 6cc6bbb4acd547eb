# Every target does its own set-up in .venv: `make demo` and `make test` work on a fresh clone.
#
#   TORCH_INDEX   a PyTorch package index, to choose a CPU or CUDA build
#   PYTHON        the interpreter to build the environment from; a torch it can import is used as it is
#   DATA, TEACHER your photographs and a model for them, instead of the demo's digits

PYTHON ?= python3
TORCH ?= "torch>=2.11,<2.15" torchvision
VENV := .venv
BIN := $(VENV)/bin
DEMO_OUT ?= demo-run
SOURCES := setup.py pyproject.toml $(wildcard csrc/*)

.PHONY: build lint type test bench demo sanitize clean

build: $(VENV)/.dev

# A torch that $(PYTHON) can import is used as it is, also when $(PYTHON) is itself of a virtual environment: its folder joins the new one's path.
$(BIN)/python:
	@$(PYTHON) -m venv $(VENV)
	@site=$$($(PYTHON) -c "import pathlib, torch; print(pathlib.Path(torch.__file__).parents[1])" 2>/dev/null) && { \
		echo "using the torch in $$site"; echo "$$site" > $$($(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/torch-of-python.pth; \
	} || true

$(VENV)/.torch: $(BIN)/python
	@$(BIN)/python -c "import torch" 2>/dev/null || { echo "installing PyTorch (some minutes)"; $(BIN)/python -m pip install -q $(TORCH) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)); }
	@$(BIN)/python -m pip install -q "setuptools>=80" wheel ninja
	@touch $@

# What is built once serves both; the stamps remember which dependencies are in.
$(VENV)/.dev: $(VENV)/.torch $(SOURCES)
	$(BIN)/python -m pip install -q --no-build-isolation -e ".[dev]"
	@touch $@ $(VENV)/.demo

$(VENV)/.demo: $(VENV)/.torch $(SOURCES)
	$(BIN)/python -m pip install -q --no-build-isolation -e ".[demo]"
	@touch $@

# As many processes as cores, each with one thread and whole files of tests: PyTorch's threads would fight over the cores otherwise. Training
# and labelling are tested on the CPU, whose bits can be compared, also where there is a GPU; the loss's backends then once more on it.
GPU_TESTS := tests/test_cuda_*.py tests/test_loss.py tests/test_loss_any.py tests/test_loss_input.py tests/test_ops.py tests/test_triton_loss.py
test: $(VENV)/.dev
	CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile $(PYTEST)
	@if $(BIN)/python -c "import torch; raise SystemExit(not torch.cuda.is_available())"; then \
		echo "the loss on the GPU:"; OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow" $(GPU_TESTS); fi

lint: $(VENV)/.dev
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .

type: $(VENV)/.dev
	$(BIN)/python -m mypy

bench: $(VENV)/.dev
	$(BIN)/python bench/bench_loss.py
	$(BIN)/python bench/plot_loss.py
	$(BIN)/python bench/bench_store.py
	$(if $(FERKD_TEST_DATA),$(BIN)/python bench/bench_loader.py)

demo: $(VENV)/.demo
	$(BIN)/ferkd demo --out $(DEMO_OUT) $(if $(DATA),--data $(DATA)) $(if $(TEACHER),--teacher $(TEACHER))

# The C++ of the CPU kernel under gcc's address and undefined-behaviour sanitizers, in a folder of its own. Instrumented loops are not
# vectorised and add in one long row: the tests of the last digits of a sum are left out.
sanitize: $(VENV)/.dev
	FERKD_CUDA=0 FERKD_SANITIZE=address,undefined $(BIN)/python setup.py -q build_ext --build-lib build/sanitize --build-temp build/sanitize-objects
	cp ferkd/*.py build/sanitize/ferkd/ && cp -r kernels build/sanitize/ferkd/
	cd build/sanitize && ASAN_OPTIONS=detect_leaks=0 LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libubsan.so)" \
		../../$(BIN)/python -m pytest -p no:cacheprovider ../../tests/test_sanitized.py ../../tests/test_loss.py ../../tests/test_loss_any.py ../../tests/test_loss_input.py \
		-k "(cpu or instruction_set or half_types or beside_it or sanitized) and not rows_digits"

clean:
	rm -rf $(VENV) build *.egg-info ferkd/*.so $(DEMO_OUT)
