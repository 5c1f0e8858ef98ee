# Every habit as a recipe. `just` alone lists them; all are plain commands that work without it.

_default:
    @just --list --unsorted

# Set up this machine and measure everything the paper shows
repro *ARGS:
    ./setup.sh repro {{ARGS}}

# Set up this machine, then formatting, lints, build and the whole test suite
ci:
    ./setup.sh test

# Development build
build:
    cargo build --workspace

# Optimised build, the one that is measured
release:
    cargo build --workspace --release

# Format everything
fmt:
    cargo fmt --all

# What CI refuses: formatting and lints
lint:
    cargo fmt --all --check
    cargo clippy --workspace --all-targets -- -D warnings

# The test suite, or the tests whose name contains NAME
test NAME='': build
    cargo test --workspace {{NAME}} -- --test-threads={{num_cpus()}}

# Pods on Debian's other kernels (6.1, 6.12, 7) and moves between them and this one, in emulated machines: takes minutes
test-kernels NAME='': build
    ZAP_KERNELS=all cargo test -p harness --test kernels {{NAME}} -- --nocapture --test-threads=1

# Only the tests that need no pod: parsers, formats, statistics
test-quick:
    cargo test --workspace --lib

# Generated programs through checkpoints, for hours: `just soak 1000000`; ZAP_SEED=… tries a set of them again
soak CASES='100000': build
    PROPTEST_CASES={{CASES}} cargo test -p harness --test properties cannot_be_told -- --nocapture

# Lines of crates/zap that its tests run (cargo-llvm-cov; `cargo install cargo-llvm-cov` where it is missing)
coverage *ARGS:
    cargo llvm-cov --package zap --package harness --ignore-filename-regex 'harness|/sys/probe' {{ARGS}}

# Fuzz what reads others' bytes: `just fuzz state 600` for ten minutes; needs a nightly compiler and cargo-fuzz.
# Targets are the names in crates/zap/src/fuzzing.rs; what is found goes to fuzz/artifacts, and then to fuzz/corpus
fuzz TARGET='state' SECONDS='60':
    ZAP_TARGET={{TARGET}} cargo +nightly fuzz run target fuzz/corpus/{{TARGET}} -- -max_total_time={{SECONDS}} -rss_limit_mb=1024

# Make the tables of docs/coverage.md from the tests; CI fails when they are stale
coverage-table:
    ZAP_COVERAGE_TABLE=write cargo test -p harness --test coverage

# What this host offers, feature by feature
check: build
    target/debug/zap check

# Experiments and workloads
list: release
    target/release/harness list

# Run experiments: `just run checkpoint-restart --runs 20`
run +ARGS: release
    target/release/harness run {{ARGS}}

# Plots and the report page from the raw samples in results/
report *ARGS: release
    target/release/harness report {{ARGS}}

# Is this build slower than the baseline?
gate BASELINE='results/baseline': release
    target/release/harness gate --baseline {{BASELINE}}

# A desktop moves between two hosts while a viewer looks on: narrated, with a timeline
demo-migrate *ARGS: release
    target/release/harness demo-migrate {{ARGS}}

# Micro-benchmarks (criterion)
bench *ARGS:
    cargo bench -p harness {{ARGS}}

# API documentation
doc:
    cargo doc --workspace --no-deps --document-private-items
