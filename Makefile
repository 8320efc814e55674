# Every target does its own set-up; the first one on a machine takes some minutes to install.
.PHONY: gpu help setup demo test clients aarch64 interpreted check format fuzz clean
.DEFAULT_GOAL := help

help:    ## list the targets
	@sed -n 's/^\([a-z0-9]*\):.*## /  make \1	/p' Makefile

setup:   ## make .venv with the pinned packages
	@scripts/setup

demo: setup  ## ask real questions on device, edge and core
	@.venv/bin/longshore demo

test: setup  ## the whole test suite
	@scripts/test

clients: setup  ## node packages, Chromium and Kotlin, then the tests of other runtimes
	@scripts/clients
	@scripts/test tests/clients

aarch64: setup  ## an emulated aarch64 Python, then the tests on it
	@scripts/aarch64
	@scripts/test -m aarch64 tests/clients

check: setup  ## format, lint, import rules, types
	@scripts/check

format: setup  ## format the tree, make safe fixes
	@scripts/format

fuzz: setup  ## property tests of the wire with many more examples
	@scripts/fuzz

interpreted: setup  ## the GPU's kernels on a CPU, in Triton's interpreter
	@scripts/interpreted

gpu:     ## tests of the GPU path, with the system's python3 and torch
	@scripts/gpu

clean:   ## remove .venv and caches
	@rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis dist build
