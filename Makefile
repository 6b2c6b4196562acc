# `make demo` and `make test` work from a fresh clone: each installs what it needs into $(VENV) first.
VENV ?= .venv
PYTHON ?= python3
TORCH ?= 2.13.0
INSTALLED := $(VENV)/.installed

.PHONY: demo eval test test-webui check format clean

demo: $(INSTALLED)  ## sample the embedded model plain and merged; pictures and figures in out/demo
	$(VENV)/bin/tome-sampler demo --out out/demo

eval: $(INSTALLED)  ## how much of the picture each method keeps, a small set; table, plot, sheet and rows in out/eval
	@mkdir -p out/eval
	$(VENV)/bin/tome-sampler eval --prompts 4 --json out/eval/rows.jsonl --markdown out/eval/table.md \
	  --plot out/eval/plot.png --sheet out/eval/sheet.png

test: $(INSTALLED)  ## the whole test suite, in two processes
	$(VENV)/bin/python -m pytest -n 2

test-webui: $(INSTALLED)  ## drive a running WebUI that has the extension: make test-webui URL=http://127.0.0.1:7860
	@test -n "$(URL)" || { echo "make test-webui needs URL=http://..., a running WebUI with --api"; exit 2; }
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -e '.[webui-test]'
	WEBUI_URL=$(URL) $(VENV)/bin/python -m pytest tests/e2e

check: $(INSTALLED)  ## lint, format and types
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

format: $(INSTALLED)  ## rewrite the code in the project's format
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

clean:  ## remove the virtual environment and what was made
	rm -rf $(VENV) out build dist

# torch first, so that nothing installed later brings another one. k-diffusion and the three peers without their
# dependencies: the first's would replace torch, ca-tome asks for an old one, DeepCache for transformers.
$(INSTALLED): pyproject.toml
	@echo "== making $(VENV)"
	$(PYTHON) -m venv $(VENV)
	@echo "== installing torch"
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check torch==$(TORCH)
	@echo "== installing tome-sampler and its development tools"
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -e '.[dev]' diffusers==0.42.1
	@echo "== installing k-diffusion and the peers that the tests compare with"
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps k-diffusion==0.1.1.post1 tomesd==0.1.3 ca-tome==0.1.3 \
	  DeepCache==0.1.1
	@touch $@
