# make demo   trains the bundled task and leaves a page to open
# make test   runs the tests
VENV ?= .venv
PYTHON ?= python3
EXTRAS = language,diffusion,tracking,evidence,docs,test
BIN = $(VENV)/bin

.PHONY: demo test check docs clean

# torch by itself first, and exactly: a range may bring a build with gigabytes of GPU libraries
$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch==2.13.0
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[$(EXTRAS)]'
	touch $@

demo: $(VENV)/ready
	$(BIN)/guerdon train sort

test: $(VENV)/ready
	$(BIN)/python -m pytest -n auto --dist loadfile

check: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

docs: $(VENV)/ready
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

clean:
	rm -rf $(VENV) site
