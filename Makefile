# `make` alone lists the commands. Everything they need is installed into .venv, once.

VENV := .venv
BIN := $(CURDIR)/$(VENV)/bin
STAMP := $(VENV)/.installed
RUN := runs/quickstart
FOLDER ?= s2moe/objectives
WORKERS ?= 2
# A file's tests stay in one process: they share what is slow to set up.
PYTEST = "$(BIN)/python" -m pytest --numprocesses $(WORKERS) --dist loadfile

# The Python that .venv is made with: the first of these that is 3.11 or newer and can make one.
PYTHON ?= $(shell for python in python3 python3.13 python3.12 python3.11; do \
	$$python -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
	&& { echo $$python; break; }; done)

.DEFAULT_GOAL := help
.PHONY: help setup pretrain test test-slow test-all mutants lint format bench clean

help: ## list these commands
	@echo "S2MoE: sparse mixture-of-experts language models whose experts do not collapse"
	@echo
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{ printf "  make %-10s %s\n", $$1, $$2 }'
	@echo
	@echo "Options:"
	@echo "  make pretrain FRESH=1                    start anew; the previous run is kept beside the new one"
	@echo "  make pretrain OVERRIDES='training.steps=200 seed=2'    change settings of configs/quickstart.yaml"
	@echo "  make test PYTEST_ARGS='-k router -x'     what pytest is given besides"
	@echo "  make test WORKERS=8                      in so many processes (2), each of which may start two to four ranks;"
	@echo "                                           0: in pytest's own, which --pdb wants"
	@echo "  make mutants FOLDER=s2moe/moe MUTANTS_ARGS='--count 50 --tests tests/moe tests/methods'"
	@echo "  make setup PYTHON=/path/to/python3.12    make .venv with this Python (3.11 or newer)"

setup: $(STAMP) ## install the locked dependencies and this project into .venv

$(STAMP): requirements.lock pyproject.toml
	@"$(or $(PYTHON),false)" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		echo "S2MoE needs Python 3.11 or newer with its venv module, and found: $(or $(PYTHON),python3), $$("$(or $(PYTHON),python3)" --version 2>&1 || true)."; \
		echo "Install one (Debian, Ubuntu: apt install python3 python3-venv) or name it: make setup PYTHON=/path/to/python3.12"; \
		exit 1; } >&2
	@echo "Installing into $(VENV) with $$("$(PYTHON)" --version); once, a few minutes."
	"$(PYTHON)" -m venv $(VENV)
	"$(BIN)/python" -m pip install --disable-pip-version-check --requirement requirements.lock
	"$(BIN)/python" -m pip install --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@

pretrain: setup ## train the small model on English text; goes on where an interrupted run stopped
	@"$(BIN)/python" -m data_prep embedded --docstrings --tokenizer sentencepiece --vocab-size 4096 --out data/embedded
	@if [ -n "$(FRESH)" ] && [ -e $(RUN) ]; then \
		kept=$(RUN)-until-$$(date +%Y%m%d-%H%M%S); mv $(RUN) $$kept; echo "The previous run is now $$kept."; \
	fi
	@if [ -e $(RUN)/hf/config.json ] && [ -z "$(OVERRIDES)" ]; then \
		echo "$(RUN) is finished. To train anew, keeping it: make pretrain FRESH=1"; \
		echo "To evaluate it: $(VENV)/bin/python launcher/evaluate.py --checkpoint $(RUN) --data data/embedded --split test"; \
	else $(LAUNCH); fi

# On the CPU two processes with one thread each (set OMP_NUM_THREADS for more); otherwise all GPUs that
# are visible, or as many as are a power of two, so that they divide the batch. The port is a free one, so
# that another run on this machine is no obstacle.
FREE_PORT = import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])
GPUS = import os, torch; n = torch.cuda.device_count(); n = n and 2 ** (n.bit_length() - 1); \
	names = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(n))); \
	print(",".join(names.split(",")[:n]))
define LAUNCH
	export PATH="$(BIN):$$PATH" OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1}; \
	port=$$(python -c '$(FREE_PORT)') && gpus=$$(python -c '$(GPUS)') || exit 1; \
	case "$$gpus" in \
		"")  export DS_ACCELERATOR=cpu; set -- --num_accelerators 2; settings= ;; \
		*,*) export CUDA_VISIBLE_DEVICES=$$gpus; settings="training.micro_batch=null" ;; \
		*)   export CUDA_VISIBLE_DEVICES=$$gpus; settings="training.micro_batch=null training.expert_parallel=1" ;; \
	esac; \
	deepspeed --master_port $$port "$$@" launcher/pretrain.py --config configs/quickstart.yaml $$settings $(OVERRIDES)
endef

test test-slow test-all mutants: export OMP_NUM_THREADS ?= 1

test: setup ## run the fast tests
	$(PYTEST) $(PYTEST_ARGS)

test-slow: setup ## run the tests that the fast ones leave out
	$(PYTEST) -m slow $(PYTEST_ARGS)

test-all: setup ## run all tests
	$(PYTEST) -m "slow or not slow" $(PYTEST_ARGS)

mutants: setup ## change lines of FOLDER at random, and list the changes that its tests do not notice
	"$(BIN)/python" tests/mutants.py $(FOLDER) $(MUTANTS_ARGS)

lint: setup ## check style, format and types
	"$(BIN)/ruff" check .
	"$(BIN)/ruff" format --check .
	"$(BIN)/mypy"

format: setup ## put the code into the common format
	"$(BIN)/ruff" check --fix .
	"$(BIN)/ruff" format .

bench: setup ## time our layer against its peers (BENCH_ARGS='--json table.json')
	"$(BIN)/python" benchmarks/moe_layer.py $(BENCH_ARGS)

clean: ## delete caches and build leftovers; .venv, data and runs stay
	find . -path ./$(VENV) -prune -o -type d -name __pycache__ -exec rm -rf {} +
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
