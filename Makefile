# GNU make 3.81 or newer. PYTHON=python3.12 chooses the interpreter of a new .venv; otherwise the first from 3.10 to 3.13 is taken.
SHELL := /bin/sh
.SUFFIXES:
.DEFAULT_GOAL := help
.PHONY: help demo test test-peft lint assets tensorboard clean

HOST ?= 127.0.0.1
PORT ?= 7860
LOGDIR ?= logs
PYTEST_ARGS ?=
PEFT ?=
VENV := .venv
export PYTHON
export PIP_DISABLE_PIP_VERSION_CHECK := 1

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-11s %s\n", $$1, $$2 }' Makefile

demo: $(VENV)/.installed ## serve the demo on 127.0.0.1:7860 (HOST= and PORT= change that)
	@exec $(VENV)/bin/python app.py --host "$(HOST)" --port "$(PORT)"

test: $(VENV)/.installed-dev ## run all tests, in a real browser too where one is found or can be installed (PYTEST_ARGS=)
	@if browser=$$(sh .ci/tools $(VENV)); then \
		CHROMIUM="$$browser" sh .ci/tests $(VENV) $(PYTEST_ARGS); \
	elif [ -n "$$FLORA_REQUIRE_BROWSER" ]; then \
		echo "error: the browser tests are mandatory here, and there is no Chromium or Chrome to run them in" >&2; exit 1; \
	else \
		notice="THE BROWSER TESTS ARE SKIPPED: no Chromium or Chrome was found or could be installed. Install one, and run this again."; \
		echo "$$notice" >&2; CHROMIUM= sh .ci/tests $(VENV) $(PYTEST_ARGS); status=$$?; echo "$$notice" >&2; exit $$status; \
	fi

test-peft: $(VENV)/.installed-dev ## test FloraConfig with each minor version of PEFT that requirements.txt allows (PEFT="0.18.0 0.20.0" chooses)
	@PYTEST_ARGS="$(PYTEST_ARGS)" sh .ci/peft $(VENV) $(PEFT)

lint: $(VENV)/.installed-dev ## check the code with ruff
	@$(VENV)/bin/ruff check .

assets: $(VENV)/.installed ## make the models, adapters and clips in assets/ again (hours; resumes where it was interrupted)
	@sh .ci/tools $(VENV) >/dev/null || true
	$(VENV)/bin/python -m flora.corpus.speech --clips assets/clips
	$(VENV)/bin/python -m flora.pretrain code
	$(VENV)/bin/python -m flora.pretrain speech
	for method in flora lora ia3; do \
		for tag in d pl rb rs rkt swift jl lua r; do \
			$(VENV)/bin/python -m flora.finetune code $$tag --method $$method --bfloat16 --overwrite || exit 1; \
		done; \
		for tag in ar cs lt mr mn hi; do \
			$(VENV)/bin/python -m flora.finetune speech $$tag --method $$method --bfloat16 --overwrite || exit 1; \
		done; \
	done
	$(VENV)/bin/python -m flora.evaluate code --report
	$(VENV)/bin/python -m flora.evaluate speech --report

tensorboard: $(VENV)/.installed ## show runs of `python -m profiling kernels --tensorboard logs` in TensorBoard (LOGDIR= says where they are)
	@exec $(VENV)/bin/python -m tensorboard.main --logdir "$(LOGDIR)"

clean: ## remove .venv and what tools left behind
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .hypothesis .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/bin/python:
	@sh .ci/venv create $(VENV)

$(VENV)/.installed: requirements.txt $(VENV)/bin/python
	@sh .ci/venv torch $(VENV)
	@$(VENV)/bin/python -m pip install -r requirements.txt
	@touch $@

$(VENV)/.installed-dev: requirements-dev.txt $(VENV)/.installed
	@$(VENV)/bin/python -m pip install -r requirements-dev.txt
	@touch $@
