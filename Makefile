# make site    executes every notebook and renders the site into _docs/
# make test    lint, exported code, every notebook, the tests
# make lab     the notebooks in JupyterLab
# make bench   the benchmarks

PYTHON ?= python3
export OMP_NUM_THREADS ?= 1
ready = .venv/.ready
run = .venv/bin/python -m

.PHONY: site test lab bench write
.DELETE_ON_ERROR:

site: $(ready)
	@$(run) superpos.book execute
	@$(run) superpos.book render
	@$(run) superpos.book check

test: $(ready)
	@$(run) ruff check
	@$(run) pytest

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
