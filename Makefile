# Everything runs in .venv, made from pyproject.toml; downloads are kept in .cache.
PYTHON ?= python3
BIN := .venv/bin
SMOLLM2 := .cache/SmolLM2-135M-Instruct.Q4_1.gguf
MINILM := .cache/all-MiniLM-L6-v2

# Sizes of the demo: smaller is faster.
NSAMPLES ?= 32
SEQLEN ?= 512
LIMIT ?= 32

# One process a core. A process that crashes ends the run: xdist would start another and then wait for ever.
PARALLEL := -n auto --dist loadgroup --max-worker-restart 0

# A script of your own in the clone is not checked. Without git, this is empty, and ruff checks the whole folder.
TRACKED := $(wildcard $(shell git ls-files '*.py' '*.ipynb' '*.md' 2>/dev/null))

.PHONY: install test types units test-all test-oldest test-onnx demo demo-embedding demo-vision benchmark results package notebooks docs linkcheck clean

install: .venv/test

# The demos need less than the tests, and no libraries that print warnings when they are imported.
.venv/demo .venv/docs .venv/embedding .venv/test: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable '.[$(@F)]'
	touch $@

test: .venv/test
	$(BIN)/ruff format --check $(TRACKED)
	$(BIN)/ruff check $(TRACKED)
	$(MAKE) --jobs 2 types units

types: .venv/test
	$(BIN)/mypy

units: .venv/test
	OMP_NUM_THREADS=1 $(BIN)/pytest -rs $(PARALLEL)  # more threads only wait for each other

# Also every family of models, and every combination of choices where `make test` takes pairs.
test-all: .venv/test
	OMP_NUM_THREADS=1 $(BIN)/pytest -rs $(PARALLEL) -m ""

# With the oldest release of every library that pyproject.toml allows, whose warnings are not ours to mend.
test-oldest: .venv-oldest/bin/pytest
	OMP_NUM_THREADS=1 .venv-oldest/bin/pytest $(PARALLEL) -W default

.venv-oldest/bin/pytest: pyproject.toml
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install --quiet uv
	.venv-oldest/bin/uv pip install --quiet --python .venv-oldest --resolution lowest-direct --editable '.[test]'

# A smaller embedding model in ONNX Runtime, with libraries that do not fit beside ours: needs a package registry.
test-onnx: .venv/embedding .venv-onnx/installed $(MINILM)
	$(BIN)/python .ci/onnx_backend.py .venv-onnx/bin/python $(MINILM)

.venv-onnx/installed:
	$(PYTHON) -m venv .venv-onnx
	.venv-onnx/bin/python -m pip install --quiet 'sentence-transformers[onnx]'
	touch $@

# A real Llama-architecture model, pruned to 50 % with magnitude, Wanda and `best`, on text that needs no network: a table,
# and a page about `best`, out/demo.html.
demo: .venv/demo $(SMOLLM2)
	$(BIN)/python recipes/llm/demo.py --model $(SMOLLM2) --num_samples $(NSAMPLES) --seqlen $(SEQLEN) --limit $(LIMIT)

# A small ViT and a small ConvNeXt, trained on digits and pruned to 50 % and 2:4.
demo-vision: .venv/demo
	$(BIN)/python recipes/vision/demo.py

# all-MiniLM-L6-v2 without half and three quarters of its hidden units: a table, the smaller folder out/embedding, and a
# page about it.
demo-embedding: .venv/demo .venv/embedding $(MINILM)
	$(BIN)/python recipes/embedding/demo.py --model $(MINILM)

benchmark: .venv/demo $(SMOLLM2)
	$(BIN)/python benchmarks/pruning.py --model $(SMOLLM2)

# The tables, figures and numbers of the documentation and of README.md, from the runs in benchmarks/results.
results: .venv/demo
	$(BIN)/python benchmarks/pages.py
	$(BIN)/python benchmarks/figures.py

# The wheel and the sdist, checked, and used for one pruning in an environment that has only what they require.
package: .venv/test
	$(BIN)/python -m pip install --quiet build twine
	$(BIN)/python .ci/package.py

$(SMOLLM2): | .venv/demo
	$(BIN)/python recipes/llm/get_smollm2.py .cache

$(MINILM): | .venv/demo
	$(BIN)/python recipes/embedding/get_minilm.py .cache

# The notebooks, run from the top, with their outputs in the files.
notebooks: .venv/docs $(MINILM)
	OMP_NUM_THREADS=1 $(BIN)/python .ci/notebooks.py

# The documentation, in docs/_build/html. Warnings are errors. Needs no network; DOCS_ONLINE=1 also links other projects.
docs: .venv/docs
	OMP_NUM_THREADS=1 $(BIN)/sphinx-build --fail-on-warning --keep-going docs docs/_build/html

# Links to other sites, which needs a network.
linkcheck: .venv/docs
	OMP_NUM_THREADS=1 $(BIN)/sphinx-build -b linkcheck docs docs/_build/linkcheck

clean:
	rm -rf .venv .venv-oldest .venv-onnx docs/_build
