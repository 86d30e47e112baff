# `make run` does everything, from a bare machine to the report. `make test` proves it. The rest is for people who change things.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:
.DEFAULT_GOAL := help
.PHONY: help run repro serve stop test setup system check format lock clean

PYTHON ?= $(shell command -v python3.11 || command -v python3)
PIP_ARGS ?=   # for example an extra index that has CPU builds of torch
ARGS ?=       # handed to the command: make run ARGS="--set optimize.steps=120", make test ARGS="-k flow"
BIN := .venv/bin
READY := .venv/.ready

PACKAGES := git libegl1 libegl-mesa0 libgl1 libgl1-mesa-dri libglib2.0-0 strace
LIBRARIES := libEGL.so.1 libEGL_mesa.so.0 libglib-2.0.so.0

export DO_NOT_TRACK := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

help:
	@echo "make run      set up, then the main job: sample, label, optimise and evaluate, every iteration; ends with a table and a report"
	echo "make serve    the Prefect server and the deployment opd/train; then, in another terminal: prefect deployment run opd/train --watch"
	echo "make repro    the same stages by 'dvc repro' alone, without Prefect"
	echo "make stop     stop the Prefect server that 'make run' started"
	echo "make test     set up, then the whole test suite"
	echo "make setup    system packages, .venv, the locked versions; does nothing when it is done"
	echo "make check    formatting, lint, types, import contracts"
	echo "make format   rewrite the sources in the house style"
	echo "make lock     write requirements.lock from .venv"
	echo "make clean    remove caches; artifacts stay"

run: $(READY)
	@$(BIN)/python -m flows run $(ARGS)

serve: $(READY)
	@$(BIN)/python -m flows.serve

# The same stages without Prefect. --allow-missing: the demonstrations behind the reference checkpoints need not be here.
# First, the plan: it refuses what is no valid params.yaml, which DVC would hand to a shell, and drops locks that the dead have left.
repro: $(READY)
	@$(BIN)/opd plan >/dev/null
	PATH="$(CURDIR)/$(BIN):$$PATH" dvc repro --allow-missing $(ARGS)

stop:
	@pid="$$(cat .prefect/server.pid 2>/dev/null || true)"
	# After a restart of the machine the number may be another process's.
	if [ -n "$$pid" ] && grep -aqs prefect "/proc/$$pid/cmdline" && kill "$$pid"; then
	  echo "the Prefect server is stopped"
	else
	  echo "no Prefect server of ours is running"
	fi
	rm -f .prefect/server.pid

# File by file on two cores, a thread of torch on each, the long ones (of flows) first; with ARGS="-n 0" one test after the other, and what they print
# at once.
test: $(READY)
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

check: $(READY)
	@$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/basedpyright
	$(BIN)/lint-imports

format: $(READY)
	@$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

setup: $(READY)

$(READY): pyproject.toml requirements.lock
	@$(MAKE) --no-print-directory system
	"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || { echo "vla-opd needs Python 3.11; make setup PYTHON=/where/it/is"; exit 1; }
	[ -x $(BIN)/python ] || "$(PYTHON)" -m venv .venv
	echo "installing the locked versions into .venv (once)"
	$(BIN)/pip install --quiet $(PIP_ARGS) "$$(grep '^torch==' requirements.lock)"
	$(BIN)/pip install --quiet $(PIP_ARGS) -c requirements.lock -e ".[test]"
	# The database of this folder's Prefect server, which otherwise takes its first start 5 s longer. One that is named elsewhere is left alone.
	env -u PREFECT_HOME -u PREFECT_API_DATABASE_CONNECTION_URL -u PREFECT_SERVER_DATABASE_CONNECTION_URL \
	  $(BIN)/prefect server database upgrade --yes >/dev/null || echo "it will be made when the server starts"
	touch $(READY)

# What rendering without a screen needs, and strace, with which tests let writes fail. Only what is missing is installed, and only by someone who may; the others are told.
system:
	@known="$$( (ldconfig -p || /sbin/ldconfig -p) 2>/dev/null || true)"
	missing=""
	for library in $(LIBRARIES); do [[ "$$known" == *"$$library"* ]] || missing="$$missing $$library"; done
	for command in git strace; do command -v "$$command" >/dev/null || missing="$$missing $$command"; done
	[ -n "$$missing" ] || exit 0
	if [ "$$(id -u)" = 0 ]; then become=""; elif sudo -n true 2>/dev/null; then become="sudo -n"; else become="no"; fi
	if [ "$$become" = no ] || ! command -v apt-get >/dev/null; then
	  echo "missing:$$missing. Please install (Debian, Ubuntu): apt-get install $(PACKAGES)"
	  exit 0
	fi
	echo "installing system packages:$$missing"
	export DEBIAN_FRONTEND=noninteractive
	{ $$become apt-get update -qq && $$become apt-get install -qq -y --no-install-recommends $(PACKAGES); } >/dev/null \
	  || echo "apt-get failed; going on without:$$missing"

lock:
	@$(BIN)/python -m pip freeze --exclude-editable --exclude pip --exclude setuptools --exclude wheel | sed -E 's/ @ .*//; s/\+[a-z0-9.]+$$//' | LC_ALL=C sort -f > requirements.lock.new
	{ echo "# The versions this repository was tested with; 'make lock' writes them. Constraints, not requirements."; cat requirements.lock.new; } > requirements.lock
	rm requirements.lock.new

clean:
	@rm -rf .pytest_cache .ruff_cache .import_linter_cache .hypothesis build *.egg-info
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
