# make demo    install the core, train a small GPT on the Python standard library's source and sample from it
# make test    install everything, then run the tests
# make lint    check style
# make doctor  check GPU, driver, PyTorch, compiler, collectives, disk; print what mends a part
# make lock    write requirements.lock again; a version that still fits stays (needs uv)
# make clean   delete the environment and what the demo wrote
#
# TORCH=cpu    install PyTorch's CPU build, as in `make demo TORCH=cpu`. TORCH_INDEX=URL names a package index that has
#              this build, unless pip's settings do. The demo then goes without Triton, whose kernels need a GPU.
# LOCKED=1     install all of requirements.lock and check its hashes. Without LOCKED, pip takes the versions of the lock
#              but accepts any build of them.

PYTHON ?= python3
BIN := .venv/bin
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check
TORCH_PIN = $(shell sed -n 's/^\(torch==[^ ]*\).*/\1/p' requirements.lock)
STARTED := $(shell date +%s)

# Stamps. Every installation writes those without a suffix: plain `make` accepts what is installed.
CORE := .venv/core$(TORCH:%=-%)$(LOCKED:%=-locked)
ALL := .venv/all$(TORCH:%=-%)$(LOCKED:%=-locked)

ifneq ($(filter-out cpu,$(TORCH)),)
$(error TORCH=$(TORCH) is unknown: use TORCH=cpu, or leave it out for the build that pip finds)
endif
ifneq ($(and $(TORCH),$(LOCKED)),)
$(error TORCH=$(TORCH) is another build than that of requirements.lock: leave out TORCH or LOCKED)
endif

.PHONY: demo test test-processes test-scripts test-unit test-kernels lint doctor lock clean .venv

demo: $(CORE)
	$(BIN)/python data/python_source/prepare.py
	@date +%s > .venv/training
	$(BIN)/python train.py config/train_python_char.py
	@echo $$(($$(date +%s) - $$(cat .venv/training))) > .venv/training
	@echo
	$(BIN)/python sample.py --out_dir=out-python-char --start="def " --num_samples=3 --max_new_tokens=400
	@echo
	@read started installed < .venv/core; test $$started = $(STARTED) || earlier=" earlier"; \
		echo "Installed$$earlier: $$installed. Trained in $$(cat .venv/training) s."
	@echo "That was a GPT of 0.8M parameters after some minutes. What to try next:"
	@echo "  $(BIN)/python sample.py --out_dir=out-python-char --start='class Test' --temperature=0.6"
	@echo "  $(BIN)/python train.py config/train_python_char.py --n_embd=256 --out_dir=out-wider"
	@echo "  $(BIN)/python train.py --help"

.venv: $(ALL)

# Start from an empty environment when the core or the lock has changed. The stamp comes last: a failed installation is
# not taken for a complete one.
$(CORE): requirements.txt requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 15))' || \
		{ echo "error: $(PYTHON) is missing, too old or too new; name a Python from 3.10 to 3.14: make PYTHON=python3.12 ..." >&2; exit 2; }
	@$(PYTHON) -c 'import venv, ensurepip' || \
		{ echo "error: $(PYTHON) has no venv module; on Debian and Ubuntu: apt install python3-venv" >&2; exit 2; }
	$(PYTHON) -m venv --clear .venv
	@sed -e '/^ *--hash=/d' -e 's/ *\\$$//' requirements.lock > .venv/constraints.txt
ifdef TORCH
	$(PIP_INSTALL) --no-deps $(TORCH_INDEX:%=--extra-index-url %) $(TORCH_PIN)+$(TORCH) || { echo "error: pip found no CPU" \
		"build of PyTorch; name a package index that has it: make TORCH=cpu TORCH_INDEX=URL ..." >&2; exit 2; }
endif
ifdef LOCKED
	$(PIP_INSTALL) --require-hashes -r requirements.lock
else
	@grep -v '^$(if $(TORCH),triton,#)' requirements.txt > .venv/requirements.txt
	$(PIP_INSTALL) -r .venv/requirements.txt -c .venv/constraints.txt
endif
	@echo "$(STARTED) $$(ls -d .venv/lib/python*/site-packages/*.dist-info | wc -l | tr -d ' ') packages," \
		"$$(du -sm .venv | cut -f1) MB, in $$(($$(date +%s) - $(STARTED))) s" > .venv/core
	@touch $@

$(ALL): $(CORE) requirements-extras.txt
ifndef LOCKED
	$(PIP_INSTALL) -r requirements.txt -r requirements-extras.txt -c .venv/constraints.txt
endif
	@touch .venv/all $@

# Three at a time on two cores, as tests of runs and of processes also wait; the longest first.
test: $(ALL)
	@$(MAKE) --no-print-directory -j3 test-scripts test-processes test-unit test-kernels

# both fork processes, from one server that imports for seconds
test-processes:
	$(BIN)/python -m pytest -q --durations=10 tests/processes tests/compile

test-scripts:
	$(BIN)/python -m pytest -q --durations=10 tests/scripts

# tests/kernels without kernels: the PyTorch code beside them
test-unit:
	$(BIN)/python -m pytest -q --durations=10 tests/unit tests/kernels

test-kernels:
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -q tests/kernels

lint: $(ALL)
	$(BIN)/ruff check .

# also where nothing is installed yet
doctor:
	@$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) -m nanosync.doctor

lock:
	uv pip compile pyproject.toml --all-extras --universal --python-version=3.10 --no-python-downloads --generate-hashes \
		--annotation-style=line --custom-compile-command="make lock" --quiet --output-file=requirements.lock

clean:
	rm -rf .venv out-python-char data/python_source/*.bin data/python_source/meta.json .pytest_cache .ruff_cache
