# make demo    install the core, train a small GPT on the Python standard library's source and sample from it
# make test    install everything, then run the tests
# make lint    check style
# make lock    write requirements.lock anew; keeps each version that still fits (needs uv)
# make clean   delete the environment and what the demo wrote
#
# TORCH=cpu    take PyTorch's CPU build, for `make TORCH=cpu demo`; TORCH_INDEX=URL names the package index that has it
# LOCKED=1     install all of requirements.lock and check its hashes; otherwise only its versions count, so that any
#              build of a version will do

PYTHON ?= python3
BIN := .venv/bin
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check
STARTED := $(shell date +%s)

# The stamps of an installation; one without TORCH and LOCKED is there after any installation.
CORE := .venv/core$(TORCH:%=-%)$(LOCKED:%=-locked)
ALL := .venv/all$(TORCH:%=-%)$(LOCKED:%=-locked)

ifneq ($(filter-out cpu,$(TORCH)),)
$(error TORCH=$(TORCH) is unknown: use TORCH=cpu, or leave it out for the build that pip finds)
endif
ifneq ($(and $(TORCH),$(LOCKED)),)
$(error LOCKED=1 has the hash of the build on PyPI: leave out TORCH=$(TORCH) or LOCKED=$(LOCKED))
endif

.PHONY: demo test test-processes test-rest test-kernels lint lock clean .venv

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

# Made again from nothing when the core or the lock has changed; the stamp comes last, so a broken install is not taken
# for a whole one.
$(CORE): requirements.txt requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 15))' || \
		{ echo "error: $(PYTHON) is missing, too old or too new; name a Python from 3.10 to 3.14: make PYTHON=python3.12 ..." >&2; exit 2; }
	@$(PYTHON) -c 'import venv, ensurepip' || \
		{ echo "error: $(PYTHON) has no venv module; on Debian and Ubuntu: apt install python3-venv" >&2; exit 2; }
	$(PYTHON) -m venv --clear .venv
	@sed -e '/^ *--hash=/d' -e 's/ *\\$$//' requirements.lock > .venv/constraints.txt
ifdef TORCH
	$(PIP_INSTALL) "$$(sed -n 's/^\(torch==[^ ]*\).*/\1/p' .venv/constraints.txt)+$(TORCH)" -c .venv/constraints.txt \
		$(TORCH_INDEX:%=--extra-index-url %) || { echo "error: no CPU build of PyTorch was installed; if pip knows no" \
		"package index that has it, name one: make TORCH=cpu TORCH_INDEX=URL ..." >&2; exit 2; }
endif
ifdef LOCKED
	$(PIP_INSTALL) --require-hashes -r requirements.lock
else
	$(PIP_INSTALL) -r requirements.txt -c .venv/constraints.txt
endif
	@echo "$(STARTED) $$(ls -d .venv/lib/python*/site-packages/*.dist-info | wc -l | tr -d ' ') packages," \
		"$$(du -sm .venv | cut -f1) MB, in $$(($$(date +%s) - $(STARTED))) s" > .venv/core
	@touch $@

$(ALL): $(CORE) requirements-extras.txt
ifndef LOCKED
	$(PIP_INSTALL) -r requirements.txt -r requirements-extras.txt -c .venv/constraints.txt
endif
	@touch .venv/all $@

# Side by side, as most tests keep one core busy: those of several processes, and all others; last, whichever is done
# first, the kernels in Triton's interpreter.
test: $(ALL)
	@$(MAKE) --no-print-directory -j2 test-processes test-rest test-kernels

test-processes:
	$(BIN)/python -m pytest -q --durations=10 -m slow tests

test-rest:
	$(BIN)/python -m pytest -q --durations=10 -m "not slow" tests

test-kernels:
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -q tests/test_kernels.py tests/test_layer_norm.py tests/test_qk_rotary.py \
		tests/test_relu_squared.py

lint: $(ALL)
	$(BIN)/ruff check .

lock:
	uv pip compile pyproject.toml --all-extras --universal --python-version=3.10 --no-python-downloads --generate-hashes \
		--annotation-style=line --custom-compile-command="make lock" --quiet --output-file=requirements.lock

clean:
	rm -rf .venv out-python-char data/python_source/*.bin data/python_source/meta.json .pytest_cache .ruff_cache
