# Every target installs what it needs into .venv. Nothing has to be installed by hand before.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
# exact versions for Python 3.11 (torch: a CPU build); `make CONSTRAINTS= test` resolves versions anew
CONSTRAINTS ?= constraints.txt
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check $(addprefix -c ,$(CONSTRAINTS))
CORE := $(VENV)/.core
STAMP := $(VENV)/.installed

.PHONY: setup setup-browser demo docs site test test-quick fuzz lint bench constraints clean

# what `make demo` needs: the core, and the plots of its report
$(CORE): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) -e '.[report,gguf]'
	@touch $@

setup: $(STAMP)

$(STAMP): $(CORE)
	$(PIP) -e '.[all,dev,docs]'
	@touch $@

# a browser for the tests of the web page; they are skipped without one
setup-browser:
	@command -v chromium chromium-browser google-chrome >/dev/null || { \
	  if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; \
	  then apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium >/dev/null; \
	  else echo "Chromium is not installed, and this user may not install it: browser tests are skipped"; fi; } \
	|| echo "Chromium could not be installed: browser tests are skipped"

demo: $(CORE)
	$(BIN)/llava demo

# the tutorial follows a drawing through the demo's model: run `make demo` first
docs: $(STAMP)
	$(BIN)/python docs/make_tutorial.py
	$(BIN)/python docs/make_picture.py
	$(MAKE) site

# build the pages into site/: every link and anchor is checked, a warning is an error; needs no network.
# Not with --quiet: mkdocs would drop the warnings before --strict counts them
site: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# coverage (lines and branches) is measured on the quick tests: under 90 % is a failure
test: $(STAMP)
	$(BIN)/python -m pytest -n 2 -m "not slow" --cov --cov-report=term
	$(BIN)/python -m pytest -n 2 -m slow

# the long part of the attacks, then ten minutes each: random bytes for every door where strangers' bytes come in
fuzz: $(STAMP)
	$(BIN)/python -m pytest -n 2 -m slow tests/attack
	$(PIP) -e '.[fuzz]'
	for target in images shards sources config prompt http; do $(BIN)/python -W ignore tests/fuzz/fuzz.py $$target -max_total_time=600 || exit 1; done

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# each benchmark against its peers, one after the other, for an hour or more: keep the machine idle meanwhile
bench: $(STAMP)
	$(PIP) -e '.[bench]'
	$(BIN)/python benchmarks/all.py

# pin what is installed in .venv: names and versions only
constraints: $(STAMP)
	@sed -n '/^#/p' constraints.txt > constraints.new
	@$(BIN)/python -m pip list --format=freeze --disable-pip-version-check \
	  | grep -vE '^(pip|setuptools|wheel|llava[-_]simplified)==' | sed -E 's/\+[a-z0-9.]+$$//' >> constraints.new
	@mv constraints.new constraints.txt

clean:
	rm -rf $(VENV) build dist *.egg-info
