# make train   environment if missing, then Mask R-CNN on the embedded data set, on CPU or GPU
# make test    environment if missing, then all tests
# make lint    environment if missing, then ruff and mypy
# make clean   removes environment, data set and results
#
# PYTHON=...   an interpreter of your own environment (with detectron2's dependencies) instead of .venv

VENV := .venv
PYTHON ?= $(VENV)/bin/python
BOOTSTRAP_PYTHON ?= $(firstword $(foreach v,3.11 3.12 3.10,$(shell command -v python$(v))) python3)
CONFIG ?= configs/shapes/mask_rcnn_shapes.yaml

ifeq ($(PYTHON),$(VENV)/bin/python)
ENVIRONMENT := $(VENV)/.complete
endif

.PHONY: train test lint clean

train: $(ENVIRONMENT)
	$(PYTHON) train_net.py --config-file $(CONFIG)

test: $(ENVIRONMENT)
	$(PYTHON) -m pytest

lint: $(ENVIRONMENT)
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m ruff check .
	$(PYTHON) -m mypy

# The stamp comes last, so an interrupted installation is taken up again.
$(VENV)/.complete: requirements.txt setup.cfg tools/install_detectron2.py
	@echo "Setting up $(VENV): about 6 GB (PyTorch with its CUDA libraries), some minutes"
	$(BOOTSTRAP_PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --progress-bar on -r requirements.txt
	$(VENV)/bin/python tools/install_detectron2.py
	$(VENV)/bin/python -m pip install --no-deps --no-build-isolation -e .
	@touch $@

clean:
	rm -rf $(VENV) datasets output build *.egg-info
