# make train   environment if missing, then Mask R-CNN on the embedded data set, on CPU or GPU
# make test    environment if missing, then all tests
# make lint    environment if missing, then ruff and mypy
# make clean   removes the environment, caches and the embedded data set; results stay
#
# PYTHON=...   an interpreter of your own environment, with detectron2, instead of .venv

VENV := .venv
PYTHON ?= $(VENV)/bin/python
BOOTSTRAP_PYTHON ?= $(firstword $(foreach v,3.11 3.12 3.10,$(shell command -v python$(v))) python3)
CONFIG ?= configs/shapes/mask_rcnn_shapes.yaml

ifeq ($(PYTHON),$(VENV)/bin/python)
ENVIRONMENT := $(VENV)/.complete
else
ENVIRONMENT := own-environment
endif

.PHONY: train test lint clean own-environment

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

own-environment:
	@$(PYTHON) -c "import cv2, faster_coco_eval, fvcore, pycocotools, safetensors, submitit, tabulate, torchvision, tqdm, yaml" || \
		{ echo "First: $(PYTHON) -m pip install -r requirements.txt" >&2; exit 1; }
	@$(PYTHON) tools/install_detectron2.py --check || \
		{ echo "To install detectron2: $(PYTHON) tools/install_detectron2.py" >&2; exit 1; }

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	rm -rf datasets/shapes_v*
