# make chat    set up, build the knowledge base from knowledge/, open the chat page
# make test    set up, run the tests
# make lint    ruff and mypy
# make clean   remove the virtual environment and the knowledge base

# The first of these that is new enough.
PYTHON ?= $(shell for name in python3 python3.14 python3.13 python3.12 python3.11 python; do \
  $$name -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$name && exit; \
  done; echo python3)
VENV   ?= .venv
KB     ?= .kb

.PHONY: chat kb test lint clean
.DEFAULT_GOAL := chat

# A stamp for each set of packages, so that a second call goes straight on.
$(VENV)/.python: Makefile
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "This needs Python 3.11 or newer, but $(PYTHON) is $$($(PYTHON) --version 2>/dev/null || echo not there)."; \
	  echo "Name another one: make PYTHON=/path/to/python3.12 $(MAKECMDGOALS)"; exit 1; }
	@test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV) || { \
	  echo "The virtual environment was not made. On Debian and Ubuntu: apt install python3-venv"; \
	  rm -rf $(VENV); exit 1; }
	@touch $@

$(VENV)/.installed: $(VENV)/.python pyproject.toml constraints.txt
	@echo "Installing into $(VENV) (a few minutes, once)"
	@$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	@echo "Installing the test tools into $(VENV)"
	@$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $@

# Ingest is a sync: where nothing has changed, it takes a second. Exit code 3 says that single files
# failed; the others are there, and the page lists both.
kb: $(VENV)/.installed
	@$(VENV)/bin/python -m ingest knowledge --kb $(KB) || test $$? -eq 3

chat: kb
	@RAG_KB=$(KB) $(VENV)/bin/python -m streamlit run app/chat.py

test: $(VENV)/.installed-dev
	@$(VENV)/bin/python -m pytest

lint: $(VENV)/.installed-dev
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/mypy

clean:
	rm -rf $(VENV) $(KB)
