# make site     executes every notebook and renders the site into _docs/
# make test     lint, exported code, every notebook, the tests
# make nightly  the same, with the slowest tests and with all examples of every property
# make lab      the notebooks in JupyterLab
# make bench    the benchmarks

PYTHON ?= python3
export OMP_NUM_THREADS ?= 1
ready = .venv/.ready
run = .venv/bin/python -m

.PHONY: site test nightly lab bench write
.DELETE_ON_ERROR:

site: $(ready)
	@$(run) superpos.book execute
	@$(run) superpos.book render
	@$(run) superpos.book check

test: $(ready)
	@$(run) ruff check
	@$(run) pytest

nightly: $(ready)
	@$(run) ruff check
	@SUPERPOS_NIGHTLY=1 $(run) pytest -m "nightly or not nightly"

write: $(ready)
	@$(run) superpos.book execute
	@$(run) superpos.book write

lab: $(ready)
	@.venv/bin/jupyter lab nbs

bench: $(ready)
	@$(run) pytest tests/benchmarks --benchmark-enable --benchmark-only -s

$(ready): constraints.txt pyproject.toml settings.ini
	test -x .venv/bin/python || $(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@
