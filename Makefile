# make train   trains Mask R-CNN on the embedded data set, on a GPU or CPU
# make test    runs all tests
# make lint    runs ruff and mypy, and checks the links and anchors of the site
# make docs    builds the site of docs/ in output/site
# make gpu     measures on one GPU for 25 minutes (8 with GPU_FLAGS=--quick)
# make test-oldest   runs all tests with the lowest versions that setup.cfg allows, on Python 3.10
# make clean   removes the environments, caches and the embedded data set, but no results
#
# All but clean first set up the environment if it is missing or its requirements have changed.
# PYTHON=...   uses this interpreter, of an environment with detectron2, instead of .venv

VENV := .venv
OLDEST := .venv-oldest
OLDEST_PYTHON ?= python3.10
PYTHON ?= $(VENV)/bin/python
BOOTSTRAP_PYTHON ?= $(firstword $(foreach v,3.11 3.12 3.10,$(shell command -v python$(v))) python3)
CONFIG ?= configs/shapes/mask_rcnn_shapes.yaml
# Two processes with one thread each; when one is idle, it takes over tests of the other.
IN_PROCESSES := -n 2 --dist worksteal
# With --strict, warnings such as broken links are errors (but not with --quiet).
# NO_MKDOCS_2_WARNING hides an advertisement.
SITE = NO_MKDOCS_2_WARNING=1 $(PYTHON) -m mkdocs build --strict

ifeq ($(PYTHON),$(VENV)/bin/python)
ENVIRONMENT := $(VENV)/.complete
else
ENVIRONMENT := own-environment
endif

.PHONY: train test test-oldest lint docs gpu clean own-environment always

train: $(ENVIRONMENT)
	$(PYTHON) train_net.py --config-file $(CONFIG)

test: $(ENVIRONMENT)
	@$(PYTHON) -c "import hypothesis, pytest, xdist" || \
		{ echo "First: $(PYTHON) -m pip install -r requirements.txt" >&2; exit 1; }
	$(PYTHON) -m pytest $(IN_PROCESSES)

test-oldest: $(OLDEST)/.complete
	$(OLDEST)/bin/python -m pytest $(IN_PROCESSES)

lint: $(ENVIRONMENT)
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m ruff check .
	$(PYTHON) -m mypy
	$(SITE)

docs: $(ENVIRONMENT)
	$(SITE)
	@echo "The site is in output/site: open output/site/index.html"

gpu: $(ENVIRONMENT)
	$(PYTHON) benchmarks/gpu_campaign.py $(GPU_FLAGS)

$(VENV)/.complete: always
	$(call set_up,$(VENV),$(BOOTSTRAP_PYTHON),requirements.txt)

$(OLDEST)/.complete: always
	$(call set_up,$(OLDEST),$(OLDEST_PYTHON),requirements-oldest.txt)

# Sets up the environment $(1) with the interpreter $(2) and the requirements $(3). Its file
# .complete is a copy of all that determines what is installed: times of files change with every
# checkout. It is written last, so after an interruption, make runs the installation again.
INSTALLER := setup.cfg tools/install_detectron2.py tools/pinned_wheel.py
define set_up
@if cat $(3) $(INSTALLER) | cmp -s - $(1)/.complete; then \
	echo "The environment $(1) is up to date"; \
else \
	echo "Installing $(3) and detectron2 into $(1): about 6 GB (PyTorch with its CUDA libraries)," \
		"some minutes" && \
	$(2) -m venv $(1) && \
	$(1)/bin/python -m pip install --progress-bar on -r $(3) && \
	$(1)/bin/python tools/install_detectron2.py && \
	$(1)/bin/python -m pip install --no-deps --no-build-isolation -e . && \
	cat $(3) $(INSTALLER) > $(1)/.complete; \
fi
endef

own-environment:
	@$(PYTHON) -c "import cv2, faster_coco_eval, fvcore, mpmath, pycocotools, safetensors, submitit, tabulate, torchvision, tqdm, yaml" || \
		{ echo "First: $(PYTHON) -m pip install -r requirements.txt" >&2; exit 1; }
	@$(PYTHON) tools/install_detectron2.py --check || \
		{ echo "To install detectron2: $(PYTHON) tools/install_detectron2.py" >&2; exit 1; }

clean:
	rm -rf $(VENV) $(OLDEST) build *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	rm -rf datasets/shapes_v*
