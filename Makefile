# make demo    set up, then train a small GPT on the Python standard library's source and sample from it
# make test    set up, then run the tests
# make lint    check style
# make clean   delete the environment and what the demo wrote

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/installed

.PHONY: demo test test-processes test-rest test-kernels lint clean .venv

.venv: $(INSTALLED)

# Made again when what is required has changed; the stamp comes last, so a broken install is not taken for a whole one.
$(INSTALLED): requirements.txt constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 15))' || \
		{ echo "error: $(PYTHON) is missing, too old or too new; name a Python from 3.10 to 3.14: make PYTHON=python3.12 ..." >&2; exit 2; }
	@$(PYTHON) -c 'import venv, ensurepip' || \
		{ echo "error: $(PYTHON) has no venv module; on Debian and Ubuntu: apt install python3-venv" >&2; exit 2; }
	$(PYTHON) -m venv --clear .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt -c constraints.txt
	@touch $@

demo: .venv
	$(BIN)/python data/python_source/prepare.py
	$(BIN)/python train.py config/train_python_char.py
	@echo
	$(BIN)/python sample.py --out_dir=out-python-char --start="def " --num_samples=3 --max_new_tokens=400
	@echo
	@echo "That was a GPT of 0.8M parameters after some minutes. What to try next:"
	@echo "  $(BIN)/python sample.py --out_dir=out-python-char --start='class Test' --temperature=0.6"
	@echo "  $(BIN)/python train.py config/train_python_char.py --n_embd=256 --out_dir=out-wider"
	@echo "  $(BIN)/python train.py --help"

# Side by side, as most tests keep one core busy: those of several processes, and all others; last, whichever is done
# first, the kernels in Triton's interpreter.
test: .venv
	@$(MAKE) --no-print-directory -j2 test-processes test-rest test-kernels

test-processes:
	$(BIN)/python -m pytest -q --durations=10 tests/processes

test-rest:
	$(BIN)/python -m pytest -q --durations=10 --ignore=tests/processes tests

test-kernels:
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -q tests/kernels

lint: .venv
	$(BIN)/ruff check .

clean:
	rm -rf .venv out-python-char data/python_source/*.bin data/python_source/meta.json .pytest_cache .ruff_cache
