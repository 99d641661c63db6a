# Everything a newcomer types. Each target does its own set-up, and is quick when there is nothing to do.
SHELL := /usr/bin/env bash
.SHELLFLAGS := -euo pipefail -c
.NOTPARALLEL:
.DEFAULT_GOAL := help
BIN := .venv/bin
VARIANT ?= both

.PHONY: help venv setup native demo test test-rdma check bench doctor clean

help: ## show this list
	@grep -E '^[a-z-]+:.*## ' $(firstword $(MAKEFILE_LIST)) | sed -E 's/^([a-z]+):.*## /  make \1\t/' | expand -t 18

venv: ## make .venv from requirements.txt
	@.ci/setup venv

setup: ## venv, and the native core built into it
	@.ci/setup

native: setup ## same as setup: rebuilds the native core when its sources changed

demo: setup ## partition, serve and compare a DLRM end to end (DATA=rows.tsv VARIANT=single|multi|both)
	@$(BIN)/sidepool demo --variant $(VARIANT) $(if $(DATA),--data '$(DATA)')

check: setup ## lint and types
	$(BIN)/ruff check .
	$(BIN)/mypy

test: setup ## lint, types, native tests under sanitizers, all Python tests
	.ci/tests

test-rdma: setup ## the verbs tests alone, in a SoftRoCE guest
	$(BIN)/pytest --numprocesses 2 --dist worksteal tests/test_rdma_guest.py

bench: setup ## latency and throughput beside a monolithic model
	@$(BIN)/sidepool bench serve --json build/bench/serve.json

doctor: setup ## what this machine offers, and what to do about the rest
	@$(BIN)/sidepool doctor

clean: ## remove build/ and the caches (.venv stays)
	rm -rf build .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
