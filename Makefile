# make demo        train both stages on the built-in shapes, draw pictures, write a page of the model: ten minutes on two cores
# make test        lint, type checks and the fast tests
# make test-slow   the tests that train or run whole commands
PYTHON ?= python3
VENV := .venv/bin

.PHONY: install demo test test-slow lint lock lowest clean
.DEFAULT_GOAL := help

help:
	@sed -n 's/^# //p' Makefile

# Updated whenever the lock file changes.
.venv/installed: requirements.lock
	$(PYTHON) -m venv .venv
	$(VENV)/pip install --quiet --disable-pip-version-check -r requirements.lock
	@touch $@

install: .venv/installed

demo: install
	$(VENV)/python -m benchmarks.demo

lint: install
	$(VENV)/ruff check .
	$(VENV)/ruff format --check .
	$(VENV)/mypy

test: lint
	$(VENV)/python -m pytest -n 3 --dist worksteal -m "not slow"

test-slow: install
	$(VENV)/python -m pytest -n 3 --dist worksteal -m slow

# Needs uv (pip install uv).
lock:
	uv pip compile pyproject.toml --group dev --universal --python-version 3.11 --upgrade \
		--no-header --no-emit-index-url --no-emit-find-links --quiet --output-file requirements.lock

# The lowest versions that pyproject.toml admits: pip install -r constraints-lowest.txt in an environment of its own, then the tests.
lowest:
	uv pip compile pyproject.toml --group dev --universal --python-version 3.11 --resolution lowest-direct \
		--no-header --no-emit-index-url --no-emit-find-links --quiet --output-file constraints-lowest.txt

clean:
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache
