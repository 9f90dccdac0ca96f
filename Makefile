# Every target installs what it needs into .venv. Nothing has to be installed by hand before.
PYTHON ?= $(shell command -v python3.11 || command -v python3 || echo python3)
VENV := .venv
BIN := $(VENV)/bin
# exact versions for Python 3.11; `make CONSTRAINTS= test` resolves versions anew
CONSTRAINTS ?= constraints.txt
# some of the pinned versions do not exist for Python 3.10
MINIMUM := 3.$(if $(CONSTRAINTS),11,10)
# shell condition: .venv exists, and has been created with this Python
IDENTITY := import sys; print(sys.base_prefix, sys.version)
SAME_PYTHON = [ "$$($(BIN)/python -c '$(IDENTITY)' 2>/dev/null)" = "$$($(PYTHON) -c '$(IDENTITY)')" ]
# uv installs faster and is used where it is; else pip, without its warnings (-qq) and without compiling every module
# (--no-compile: Python compiles what it imports)
UV := $(shell command -v uv)
ifdef UV
INSTALL := $(UV) pip install --quiet --python $(BIN)/python $(addprefix -c ,$(CONSTRAINTS))
else
INSTALL := $(BIN)/python -m pip install -qq --no-compile --disable-pip-version-check $(addprefix -c ,$(CONSTRAINTS))
endif
CORE := $(VENV)/.core
STAMP := $(VENV)/.installed

# Where it is set, every process of the tests would compile torch and transformers again
unexport PYTHONDONTWRITEBYTECODE

.PHONY: setup setup-browser demo demo-long demo-reward one-file docs site test test-quick fuzz lint bench constraints clean

# what `make demo` needs: the core, the reader of the language model's file, and what its last lines suggest to run
$(CORE): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < tuple(map(int, "$(MINIMUM)".split("."))))' || { \
	  echo "The setup requires Python $(MINIMUM) or newer, and '$(PYTHON)' is not. Install it, or pass its path: make PYTHON=PATH"; \
	  exit 1; }
	@echo "Installing the core into $(VENV), about half a minute (minutes with the CUDA build of torch: docs/index.md)"
	@$(PYTHON) -m venv $$($(SAME_PYTHON) || echo --clear) $(VENV)
	@$(INSTALL) -e '.[report,gguf,serve]'
	@touch $@

setup: $(STAMP)

$(STAMP): $(CORE)
	@echo "Installing what the tests and the documentation need, about two minutes"
	@$(INSTALL) -e '.[all,dev,docs]'
	@touch $@

# a browser for the tests of the web page; they are skipped without one
setup-browser:
	@for name in chromium chromium-browser google-chrome; do command -v $$name >/dev/null && exit 0; done; \
	{ if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; \
	  then apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium >/dev/null; \
	  else echo "Chromium is not installed, and this user may not install it: browser tests are skipped"; fi; } \
	|| echo "Chromium could not be installed: browser tests are skipped"

demo: $(CORE)
	@$(BIN)/llava demo

# three times as many steps
demo-long: $(CORE)
	@$(BIN)/llava demo --long --output output/demo-long

# continue training the model of `make demo` with reinforcement learning, on its own captions
demo-reward: $(CORE)
	@$(BIN)/llava demo --reward

# the tutorial, the notes of the one file and the page on rewards follow a drawing through trained models: run `make demo`,
# `make demo-reward` and `make one-file` first
docs: $(STAMP)
	$(BIN)/python docs/make_tutorial.py
	$(BIN)/python docs/make_one_file.py --checkpoint output/one-file
	$(BIN)/python docs/make_picture.py
	$(BIN)/python docs/make_rewards.py
	$(MAKE) site

# train llava_in_one_file.py on the demo's drawings, which `make demo` downloads
ASSETS := $(HOME)/.cache/llava-simplified/demo-v1
one-file: $(CORE)
	$(BIN)/python llava_in_one_file.py --pool 3 --layer -1 \
	  --data $(ASSETS)/drawings/train.json --images $(ASSETS)/drawings/images \
	  --language_model $(ASSETS)/language_model --vision_tower $(ASSETS)/vision_tower

# build the pages into site/: every link and anchor is checked, a warning is an error; needs no network.
# Not with --quiet: mkdocs would drop the warnings before --strict counts them
site: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# all tests; the aim is five minutes on two idle cores. With COVERAGE=1, which takes a quarter longer, they also measure
# coverage (lines and branches), and less than 92 % is a failure
test: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist loadgroup $(if $(COVERAGE),--cov --cov-report=term)

# within a minute, for every commit: no processes, no browser, no training of seconds
test-quick: $(STAMP)
	$(BIN)/python -m pytest -n 2 -m "not medium and not slow"

# everything of which `make test` takes a sample; then ten minutes each: random bytes for every door where strangers'
# bytes come in
SAMPLED := tests/attack tests/data tests/test_handover.py tests/test_prompt.py tests/evaluation/test_ptb_tokenizer.py \
  tests/model/test_shared_prefix.py tests/prepare/test_reader_memory.py tests/prepare/test_sources.py
fuzz: $(STAMP)
	FUZZ=1 $(BIN)/python -m pytest -n 2 --dist loadgroup $(SAMPLED)
	$(INSTALL) -e '.[fuzz]'
	for target in images shards sources config prompt http; do $(BIN)/python -W ignore tests/fuzz/fuzz.py $$target -max_total_time=600 || exit 1; done

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# each benchmark against its peers, one after the other, for an hour or more: keep the machine idle meanwhile
bench: $(STAMP)
	$(INSTALL) -e '.[bench]'
	$(BIN)/python benchmarks/all.py

# pin what is installed in .venv: names and versions only
constraints: $(STAMP)
	@sed -n '/^#/p' constraints.txt > constraints.new
	@$(BIN)/python -m pip list --format=freeze --disable-pip-version-check \
	  | grep -vE '^(pip|setuptools|wheel|llava[-_]simplified)==' | sed -E 's/\+[a-z0-9.]+$$//' >> constraints.new
	@mv constraints.new constraints.txt

clean:
	rm -rf $(VENV) build dist *.egg-info
