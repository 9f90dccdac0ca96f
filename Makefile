# Everything sets itself up in .venv; nothing has to be installed by hand before.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# torch's CPU build on machines without a GPU: constraints.txt names the version that the figures were taken with
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: setup setup-browser demo docs site test fuzz lint bench clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) -e '.[dev,docs,deepspeed,ray,serve]'
	@touch $@

# what the page's tests drive; they are skipped where it is missing
setup-browser:
	@command -v chromium chromium-browser google-chrome >/dev/null || { \
	  if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; \
	  then apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium >/dev/null; \
	  else echo "no Chromium, and no right to install one: the page's tests in a browser are skipped"; fi; } \
	|| echo "Chromium could not be installed: the page's tests in a browser are skipped"

demo: $(STAMP)
	$(BIN)/llava demo

# the tutorial follows a drawing through the demo's model: `make demo` first
docs: $(STAMP)
	$(BIN)/python docs/make_tutorial.py
	$(BIN)/python docs/make_picture.py
	$(MAKE) site

# the pages alone, into site/: every link and anchor is checked, a warning is an error; no network
site: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

# what of the package the quick tests run, branches too: under 90 % it fails. The slow ones are slow enough without counting
test: $(STAMP)
	$(BIN)/python -m pytest -n 2 -m "not slow" --cov --cov-report=term
	$(BIN)/python -m pytest -n 2 -m slow

# ten minutes each: bytes that nobody meant, at the decoder, the tar reader and the caption sources
fuzz: $(STAMP)
	$(PIP) -e '.[fuzz]'
	for target in images shards sources; do $(BIN)/python -W ignore tests/fuzz/fuzz.py $$target -max_total_time=600 || exit 1; done

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# each against its peers, one after the other, for an hour or more: nothing else should compute meanwhile
bench: $(STAMP)
	$(PIP) -e '.[bench]'
	$(BIN)/python benchmarks/all.py

clean:
	rm -rf $(VENV) build *.egg-info
