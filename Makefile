# make learn   create .venv, train 4 seeds of SAC on Pendulum-v1     make test   ruff, mypy, quick tests
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: learn test test-all test-ray test-track test-export check results bench throughput clean

$(VENV)/installed: requirements.txt requirements-dev.txt constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -r requirements.txt -r requirements-dev.txt -c constraints.txt
	touch $@

learn: $(VENV)/installed
	$(BIN)/python learn_simple.py --seeds 4 --steps 5_000 --log --name first-run

check: $(VENV)/installed
	$(BIN)/python -m ruff check .
	$(BIN)/python -m mypy

test: check
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow"

test-all: check
	$(BIN)/python -m pytest -n 2 --dist loadfile

# --engine ray, --track and --format onnx: their packages in a virtual environment each, on top of
# .venv, which stays without them.
ray_extras := ray==2.60.0
track_extras := mlflow==3.17.2 wandb==0.31.0
export_extras := onnx==1.23.2 onnxscript==0.7.2 onnxruntime==1.32.0

.%-venv/installed: $(VENV)/installed
	$(PYTHON) -m venv .$*-venv
	$(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))" > \
		$$(.$*-venv/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/lab.pth
	.$*-venv/bin/python -m pip install -q $($*_extras)
	touch $@

test-ray: .ray-venv/installed
	.ray-venv/bin/python -m pytest tests/test_ray.py

test-track: .track-venv/installed
	.track-venv/bin/python -m pytest tests/test_tracking.py

test-export: .export-venv/installed
	.export-venv/bin/python -m pytest tests/test_export.py -m "not slow"

# Takes days; resumes where it stopped.
results: $(VENV)/installed
	$(BIN)/python bench/learning.py

# The libraries that we compare with have their own virtual environment; training never needs them.
.bench-venv/installed: bench/requirements.txt bench/requirements-rl8.txt bench/constraints.txt
	$(PYTHON) -m venv .bench-venv
	.bench-venv/bin/python -m pip install -q -r bench/requirements.txt -c bench/constraints.txt
	.bench-venv/bin/python -m pip install -q --no-deps -r bench/requirements-rl8.txt
	touch $@

bench: $(VENV)/installed .bench-venv/installed
	$(BIN)/python bench/speed.py --peers .bench-venv/bin/python

throughput: $(VENV)/installed .bench-venv/installed
	$(BIN)/python -m pip install -q envpool==1.2.5 -c constraints.txt
	$(BIN)/python bench/throughput.py --peers .bench-venv/bin/python

clean:
	rm -rf $(VENV) .bench-venv .ray-venv .track-venv .export-venv
