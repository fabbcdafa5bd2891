# What people type. On a new machine with Rust and make, `make demo` and `make test` are enough:
# a C compiler, PostgreSQL and RabbitMQ are found, or installed where that is possible.

.DEFAULT_GOAL := help
.PHONY: help build demo test matrix bench bench-guard micro faults soak cluster outage fuzz model console-size signatures-size mutants fmt lint doc docs deb deb-test sbom ci services services-down clean

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1	\2/p' $(firstword $(MAKEFILE_LIST)) | expand -t 24

build: ## the release binary, target/release/settled
	@dev/prerequisites compiler
	cargo build --release --locked

# With CONSOLE=1 a worker and a console stay on what was played, until Ctrl-C.
demo: ## the whole story in under a minute, on a fresh database and vhost (CHAOS=1: with faults; CONSOLE=1: then open a console on it)
	@dev/prerequisites compiler
	cargo build --profile demo --locked
	@set -e; dev/services up >/dev/null; urls=$$(dev/services fresh demo); \
	set -a; eval "$$urls"; set +a; \
	program="$${CARGO_TARGET_DIR:-target}/demo/settled"; \
	"$$program" demo $(if $(filter-out 0,$(CHAOS)),--chaos --services dev/services) $(ARGS); \
	$(if $(filter-out 0,$(CONSOLE)),dev/demo-console "$$program",:)

test: ## every test, against real services (ARGS go to the test runner)
	@dev/test $(ARGS)

matrix: ## suite, demo and a short fault run on several versions of the servers (PAIRS="3.10/15 4.3/18" QUICK=1 RUNS=20)
	@QUICK=$(QUICK) $(if $(RUNS),RUNS=$(RUNS)) dev/matrix $(PAIRS)

# The benchmark's profile inherits the release's, so the worker it measures is the one that `make build` makes.
bench_run = dev/prerequisites compiler && cargo build --release --locked && urls=$$(dev/services up) && \
	set -a && eval "$$urls" && set +a && exec cargo bench --locked --bench bench --

bench: ## the worker beside what else one would write, under 45 minutes (BENCH_QUICK=1: under 4; ONLY=drain,latency ROUNDS=5 PEERS=python,node BASELINE=program)
	@$(bench_run) $(if $(filter-out 0,$(BENCH_QUICK)),--quick) $(if $(ONLY),--only $(ONLY)) \
	$(if $(ROUNDS),--rounds $(ROUNDS)) $(if $(PEERS),--peers $(PEERS)) $(if $(BASELINE),--baseline $(BASELINE)) $(ARGS)

bench-guard: ## a short drain, which fails unless the worker is 4 times as fast as the per-message worker
	@$(bench_run) --guard 4 $(ARGS)

micro: ## what each room costs by itself (ARGS go to the benchmark: a name, --sample-count)
	@dev/prerequisites compiler
	cargo bench --locked --bench micro -- $(ARGS)

faults: ## the crash matrix: every fault, with one seed after another (RUNS=2000 SEED=1 ONLY=after_load:kill JOBS=4)
	@dev/prerequisites compiler
	@set -e; urls=$$(dev/services up); set -a; eval "$$urls"; \
	SETTLED_FAULTS_RUNS=$(RUNS) SETTLED_FAULTS_SEED=$(SEED) SETTLED_FAULTS_ONLY=$(ONLY) SETTLED_FAULTS_JOBS=$(JOBS) RUST_BACKTRACE=0; \
	set +a; \
	cargo test --locked --features faults --test it -- --ignored --exact cases::faults::matrix --nocapture $(ARGS) || exit 1

# Each starts servers of its own; what `dev/services up` runs is not touched.
own_servers = cargo test --locked --features faults --test it -- --ignored --nocapture --exact

soak: ## faults by the hour on servers of its own, seeded, and the books after each round (MINUTES=10 SEED=1 NODES=3 WORKERS=2 RATE=100 ONLY= ROUND=)
	@dev/prerequisites compiler
	@SETTLED_SOAK_MINUTES=$(MINUTES) SETTLED_SOAK_SEED=$(SEED) SETTLED_SOAK_NODES=$(NODES) SETTLED_SOAK_WORKERS=$(WORKERS) \
	SETTLED_SOAK_RATE=$(RATE) SETTLED_SOAK_ONLY="$(ONLY)" SETTLED_SOAK_ROUND=$(ROUND) $(own_servers) cases::soak::soak $(ARGS)

cluster: ## three nodes, a primary and its standby: each lost in turn, again and again (KILLS=20)
	@dev/prerequisites compiler
	@SETTLED_CLUSTER_KILLS=$(KILLS) $(own_servers) cases::cluster::whoever_is_lost \
	cases::cluster::a_lost_majority_is_told --test-threads 1 $(ARGS)

outage: ## a hundred thousand messages wait ten minutes for the database (MESSAGES=100000 SECONDS=600)
	@dev/prerequisites compiler
	@SETTLED_OUTAGE_MESSAGES=$(MESSAGES) SETTLED_OUTAGE_SECONDS=$(SECONDS) $(own_servers) \
	cases::outage::away_while_a_hundred_thousand_wait $(ARGS)

# What is measured is the program that is used.
program = $${CARGO_TARGET_DIR:-$(CURDIR)/target}/release/settled

console-size: ## every screen of the console with a million dead letters, and two hundred people who watch (minutes)
	@dev/prerequisites compiler
	cargo build --release --locked
	@set -e; urls=$$(dev/services up); set -a; eval "$$urls"; SETTLED_TEST_PROGRAM="$(program)"; set +a; \
	cargo test --locked --features faults --test it -- --ignored --test-threads 1 --nocapture cases::console_size $(ARGS)

# The tests' own profile and so their dependencies, but our own code optimised: many more inputs.
fuzz: ## inputs by chance for everything that reads bytes of others (MINUTES=10, or INPUTS=100000000 however long; SEED=1 ONLY=json)
	@dev/prerequisites compiler
	FUZZ_SECONDS=$$(( $(or $(MINUTES),1) * 60 )) FUZZ_INPUTS="$(INPUTS)" FUZZ_SEED="$(SEED)" FUZZ_ONLY="$(ONLY)" CARGO_PROFILE_DEV_OPT_LEVEL=2 CARGO_INCREMENTAL=0 \
	cargo test --locked --features faults --test fuzz -- --nocapture --test-threads 1

signatures-size: ## verify ten million signatures that are made for it (COUNT=10000000; most of an hour, 20 GB)
	@dev/prerequisites compiler
	cargo build --release --locked
	@set -e; urls=$$(dev/services up); set -a; eval "$$urls"; \
	SETTLED_SIGNATURES=$(COUNT) SETTLED_TEST_PROGRAM="$(program)"; set +a; \
	cargo test --locked --features faults --test it -- --ignored --nocapture --exact cases::signatures_size::ten_million_signatures $(ARGS)

mutants: ## seed one bug after another, and see that the tests notice each (ARGS: names of tests/mutants)
	@dev/mutants $(ARGS)

# The tests' own profile and so their dependencies, but our own code optimised: ten times as fast.
model: ## the rules against a reference of their own, a million schedules (SCHEDULES=, SEED=)
	@dev/prerequisites compiler
	SCHEDULES="$(or $(SCHEDULES),1000000)" SEED="$(SEED)" CARGO_PROFILE_DEV_OPT_LEVEL=2 CARGO_INCREMENTAL=0 \
	cargo test --locked --features faults --test model -- --nocapture --test-threads 1 decide_is_what_the_protocol_says

deb: ## the Debian package, target/debian/settled_VERSION_ARCH.deb (NO_BUILD=1: of the release that is built)
	@dev/deb build

deb-test: ## install the package in a new Debian, run a worker there under its unit, remove it (root; a minute or two)
	@dev/deb test "$$(ls -t target/debian/settled_*.deb | head -n 1)"

sbom: ## what the program is built of, as CycloneDX: target/sbom/sbom.cdx.json
	@dev/sbom

fmt: ## format the source
	cargo fmt

lint: ## formatting and clippy, warnings denied
	@dev/prerequisites compiler
	cargo fmt --check
	cargo clippy --all-targets --all-features --locked -- -D warnings

docs: ## the AsyncAPI document as HTML, target/docs/index.html
	@dev/asyncapi render target/docs

doc: ## the map of the code, target/doc/settled/index.html
	@dev/prerequisites compiler
	RUSTDOCFLAGS=-Dwarnings cargo doc --no-deps --locked

ci: ## what CI runs
	@.ci/run

services: ## PostgreSQL and RabbitMQ, and where they are
	@dev/services up

services-down: ## stop them; the data stays
	@dev/services down

clean: ## stop the services and delete everything built, the services' data too
	@dev/services forget
	cargo clean
