# make demo   two iterations on real images, embedded, minutes on a CPU; STORE=FOLDER or STORE=s3://BUCKET/PREFIX keeps
#             the artifacts there, STORE=s3 starts a real S3 server on this machine and keeps every byte in it
# make test   linters, types and tests
# Each sets itself up: the environment is .venv, its packages are pinned in constraints.txt.

PYTHON ?= python3
STORE ?= demo-store
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
BROWSER := $(VENV)/.browser
# What processes load most, once with byte code kept: where the environment says PYTHONDONTWRITEBYTECODE each of the many
# processes would compile it from source, 18 s of CPU time for torch and timm instead of 7.
HEAVY := models.training, models.inference, flows.iteration, flows.stages, tasks.report, torch.distributed.run, \
  torch._inductor.compile_fx, prefect.server.api.server, duckdb, matplotlib.pyplot, sklearn.datasets, mlxtend.data, webdataset

.PHONY: demo test soak lint clean

ifeq ($(STORE),s3)
demo: $(STAMP)
	$(BIN)/python -m deployments.seaweedfs demo-s3 sh -c '\
	  $(BIN)/nst demo --store s3://nst/demo && \
	  $(BIN)/nst verify --all --store s3://nst/demo && \
	  $(BIN)/nst report digits demo-s3/report.html --force --store s3://nst/demo'
else
demo: $(STAMP)
	$(BIN)/nst demo --store $(STORE)
endif

test: lint $(BROWSER)
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

soak: $(STAMP) $(BROWSER)
	$(BIN)/python -m pytest -m soak -q
	$(BIN)/python benchmarks/gain.py --seeds 5
	$(BIN)/python -m benchmarks.soak_kill --store file
	$(BIN)/python -m benchmarks.soak_kill --store s3

# An environment of another Python than 3.11 or 3.12 is refused here, before anything is downloaded.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if (3, 11) <= v[:2] <= (3, 12) else f"Python 3.11 or 3.12 is needed, found {v[0]}.{v[1]}; set PYTHON=python3.12")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python -c constraints.txt -e ".[test]"
	env -u PYTHONDONTWRITEBYTECODE $(BIN)/python -c 'import $(HEAVY)'
	@touch $(STAMP)

# A browser for tests/flows/test_browser.py: the machine's Chromium or Chrome; else Debian's where we are root, else
# Playwright's own. Where none can be had the tests that need one are skipped, and say so.
$(BROWSER): $(STAMP)
	@if command -v chromium || command -v google-chrome || \
	  { test "$$(id -u)" = 0 && command -v apt-get && apt-get update -qq && \
	    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium >$(BROWSER).log; } || \
	  $(BIN)/playwright install chromium; \
	then touch $(BROWSER); else echo "no browser could be installed: the tests that need one will be skipped"; fi

clean:
	rm -rf $(VENV)
