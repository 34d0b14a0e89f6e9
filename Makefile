# Everything runs in .venv, made on first use. `make test PYTHON=/path/to/python` uses an environment
# that has torch and the development tools already, and changes nothing in it. Where no GPU is used, an
# index of CPU builds in PIP_EXTRA_INDEX_URL saves gigabytes of torch.
#
# `make demo SENTENCE="..."` classifies that sentence; DEMO_OPTIONS="..." goes to the script as it is.

# As it was typed, and through the environment: neither make nor a shell reads what is in it.
override export SENTENCE := $(value SENTENCE)

ifeq ($(origin PYTHON),command line)
READY := given-environment
export PYTHONPATH := $(CURDIR)/src
else
PYTHON := .venv/bin/python
READY := .venv/.ready
endif

.PHONY: demo test check docs format sanitize dist venv given-environment

demo: $(READY)
	$(PYTHON) examples/text_classification.py $(if $(SENTENCE),--sentence "$$SENTENCE") $(DEMO_OPTIONS)

test: $(READY)
	$(PYTHON) -m pytest -n auto

check: $(READY)
	$(PYTHON) -m ruff check
	$(PYTHON) -m ruff format --check
	$(PYTHON) -m mypy
	$(PYTHON) -c "from importlinter.cli import lint_imports_command; lint_imports_command()"
	$(if $(wildcard tests/test_docs.py),$(PYTHON) -m pytest tests/test_docs.py)
	$(if $(wildcard docs/conf.py),$(MAKE) docs)

# The site, in build/site; a link or a reference that leads nowhere is an error.
docs: $(READY)
	$(PYTHON) -m sphinx -q -W --keep-going -c docs . build/site

format: $(READY)
	$(PYTHON) -m ruff check --fix
	$(PYTHON) -m ruff format

# The native code's tests under the address and undefined-behaviour sanitizers (gcc). Leaks are not looked for:
# Python and torch leave much behind on purpose.
sanitize: $(READY)
	SANITIZE=address,undefined $(PYTHON) setup.py -q build_ext --inplace --force
	LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libubsan.so)" \
	  ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 \
	  $(PYTHON) -m pytest tests/test_kernels.py tests/test_onnxruntime_operator.py; status=$$?; \
	  $(PYTHON) setup.py -q build_ext --inplace --force; exit $$status

# What goes to the package index: a source archive, and a wheel with the oldest platform tag that fits. Built of what is
# committed, where the tests ran; torch's libraries are the user's own. Links of the README lead to the repository there.
REPOSITORY ?= $(shell git config --get remote.origin.url)
dist: $(READY)
	$(PYTHON) -m pip install -q -c constraints.txt --group release
	rm -rf build/wheel build/release
	mkdir -p build/release
	git archive HEAD | tar -x -C build/release
	$(PYTHON) docs/release.py build/release "$(REPOSITORY)"
	rm -rf dist
	$(PYTHON) -m build --no-isolation --sdist --outdir dist build/release
	$(PYTHON) -m build --no-isolation --wheel --outdir build/wheel build/release
	PATH="$(dir $(abspath $(PYTHON))):$$PATH" $(PYTHON) -m auditwheel repair --exclude 'libtorch*.so' --exclude libc10.so \
	  --wheel-dir dist build/wheel/*.whl
	$(PYTHON) -m twine check --strict dist/*

venv: $(READY)

# torch comes before the package, which is built without isolation: a build must not pull a second torch.
.venv/.ready: pyproject.toml setup.cfg setup.py constraints.txt $(wildcard src/hf_mlprune/kernels/native/*)
	python3 -c "import sys; sys.exit(sys.version_info < (3, 11) and 'expected python3 to be 3.11 or newer, got ' + sys.version)"
	python3 -m venv .venv
	.venv/bin/python -m pip install -c constraints.txt pip setuptools wheel
	.venv/bin/python -m pip install -c constraints.txt torch
	.venv/bin/python -m pip install -c constraints.txt --no-build-isolation --group dev -e ".[train]"
	touch $@

# The native code is built into the source tree, not into the environment.
given-environment: src/hf_mlprune/kernels/native.so
	@$(PYTHON) -c "import torch" || { echo "expected torch in $(PYTHON); install it there, or leave PYTHON out to use .venv"; exit 1; }
	@$(PYTHON) -c "import furo, hypothesis, importlinter, ipykernel, matplotlib, mypy, myst_parser, nbclient, nncf, onnxruntime, onnxscript, openvino, optimum.quanto, optuna, peft, playwright, pytest, pytest_timeout, ruff, schedulefree, sentence_transformers, sphinx_copybutton, torchao, xdist" \
	  || { echo "expected the development tools in $(PYTHON); run there: pip install --group dev '.[train]' (pip 25.1 or newer), or leave PYTHON out to use .venv"; exit 1; }

src/hf_mlprune/kernels/native.so: setup.py $(wildcard src/hf_mlprune/kernels/native/*)
	-$(PYTHON) setup.py -q build_ext --inplace --force
