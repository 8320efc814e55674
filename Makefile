# Every target does its own set-up; the first one on a machine takes some minutes to install.
.PHONY: help setup demo test clients check format fuzz clean
.DEFAULT_GOAL := help

help:    ## list the targets
	@sed -n 's/^\([a-z]*\):.*## /  make \1	/p' Makefile

setup:   ## make .venv with the pinned packages
	@scripts/setup

demo: setup  ## ask real questions on device, edge and core
	@.venv/bin/longshore demo

test: setup  ## the whole test suite
	@scripts/test

clients: setup  ## node packages, Chromium and Kotlin, then the tests of other runtimes
	@scripts/clients
	@scripts/test tests/clients

check: setup  ## format, lint, import rules, types
	@scripts/check

format: setup  ## format the tree, make safe fixes
	@scripts/format

fuzz: setup  ## property tests of the wire with many more examples
	@scripts/fuzz

clean:   ## remove .venv and caches
	@rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis dist build
