# `make demo` and `make test` need nothing but Python 3.11 or 3.12; everything goes into $(VENV).
PYTHON ?= python3
VENV ?= .venv

BIN := $(VENV)/bin
SOURCES := $(shell find onerec streaming trainer exporter simulator serving_config -type f -not -path '*/__pycache__/*')

.PHONY: demo test clean help

help:
	@echo "make demo    simulated world -> replay -> items -> train -> publish -> Triton -> recommendations -> freshness"
	@echo "             on your own log: make demo EVENTS=FILE [ITEMS=FILE] [FORMAT=auto|jsonl|csv|parquet|kuairand] [SET='a.b=c ...']"
	@echo "make test    ruff, mypy and all tests"
	@echo "make clean   removes $(VENV), .demo and what builds leave"

# The dependencies (6.8 GB) are installed again only when pyproject.toml changes, the package when a source file does.
$(VENV)/.dependencies: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' || \
	  { echo "onerec needs Python 3.11 or 3.12; name one: make PYTHON=python3.11 $(MAKECMDGOALS)" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	rm -rf build
	$(BIN)/python -m pip install --disable-pip-version-check --progress-bar off --quiet .
	touch $@

$(VENV)/.package: $(VENV)/.dependencies $(SOURCES)
	rm -rf build
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --no-deps --force-reinstall .
	touch $@

$(VENV)/.test: $(VENV)/.dependencies
	rm -rf build
	$(BIN)/python -m pip install --disable-pip-version-check --progress-bar off --quiet '.[test]'
	touch $@

demo: $(VENV)/.package
	$(BIN)/python scripts/demo.py --onerec $(BIN)/onerec $(if $(EVENTS),--events '$(EVENTS)') $(if $(ITEMS),--items '$(ITEMS)') \
	  $(if $(FORMAT),--format '$(FORMAT)') $(foreach setting,$(SET),--set '$(setting)') $(DEMO_ARGS)

test: $(VENV)/.test $(VENV)/.package
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/pytest -q -rs --ignore=tests/kafka
	@echo "Kafka: a real broker for each of two processes, as most of the time goes in waiting for timeouts"
	@echo "(once more where the machine did not get there in time, TooSlow of tests/kafka/patience.py; never where data are wrong)"
	$(BIN)/pytest -q -rsR -n 2 --dist loadfile --reruns 1 --only-rerun '^TooSlow: ' tests/kafka

clean:
	rm -rf $(VENV) .demo build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
