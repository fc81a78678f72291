# The verbs. A recipe that outgrows a few lines belongs in tests/.
CARGO ?= cargo
export CARGO_TERM_COLOR ?= auto

.PHONY: help demo test check build bench golden images audit

help: ## what there is
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/'

demo: ## the main job: a cluster, an install, a model, a lost device, a repair
	$(CARGO) build --release --locked -p berth -p berth-double-nvml -p berth-double-dcmi -p berth-tests --bins --lib
	target/release/berth-demo

test: check ## everything; ends with the test runner's summary
	tests/images/build.sh --check
	$(CARGO) build --locked -p berth -p berth-double-nvml -p berth-double-dcmi
	BERTH_CHAOS_SEED=$${BERTH_CHAOS_SEED:-1} $(CARGO) test --workspace --locked --no-fail-fast --lib --bins --tests

check: ## format and lints
	$(CARGO) fmt --all --check
	$(CARGO) clippy --workspace --all-targets --locked -- -D warnings

build: ## the binary, as shipped
	$(CARGO) build --release --locked

bench: build ## figures beside the peers'
	target/release/berth kernels bench --backend cpu --model v4-flash --tokens 1,4,16
	target/release/berth bench health --json target/health.json
	target/release/berth bench placement --manifest tests/data/placement/manifest.json \
		--data tests/data/placement/data --repeat 5 --table --json target/placement.json
	target/release/berth bench placement --manifest tests/data/placement/manifest.json \
		--data tests/data/placement/data --case p01-v3-288-32 --effort fast --repeat 20 --table
	target/release/berth bench placement --manifest tests/data/placement/manifest.json \
		--data tests/data/placement/data --case p06-v4pro-640-320 --effort best --table
	target/release/berth bench placement-sizes --json target/placement-sizes.json --svg target/placement-sizes.svg

golden: ## write generated files and golden texts anew; read the diff
	$(CARGO) run --locked -p berth-crds --bin crdgen -- charts/berth/files/crds crds/presets
	INSTA_UPDATE=always $(CARGO) test --workspace --locked

images: ## what a cluster runs, for amd64 and arm64, without a container daemon
	tests/images/build.sh

audit: ## licences and sources of all dependencies (installs cargo-deny)
	command -v cargo-deny >/dev/null || $(CARGO) install --locked cargo-deny
	cargo deny check bans licenses sources
