//! Every experiment in its fast form: its samples are complete and sane. How fast anything is, is not looked at.

#![allow(clippy::unwrap_used)]

use std::collections::BTreeSet;

use harness::experiment::{self, Settings};
use harness::host::HostFacts;
use harness::report;
use harness::samples::{self, Sample};

/// What may be none at all.
const MAY_BE_ZERO: [&str; 7] = [
    "connections_closed",
    "residual",
    "residual_bytes",
    "checkpoints",
    "image_bytes",
    "phase:let-go",
    "answers_meanwhile",
];

/// Runs an experiment, or some of its cases, and gives its samples. A report can be made of them.
fn samples_of(name: &str, cases: &[&str]) -> Vec<Sample> {
    let out = tempfile::tempdir().unwrap();
    let workloads = cases.iter().map(|case| (*case).to_owned()).collect();
    let settings = Settings { workloads, ..Settings::fast(out.path().into()) };
    experiment::find(name).unwrap().run(&settings).unwrap();
    report::make(out.path()).unwrap();
    let samples = samples::read_all(out.path()).unwrap();
    let hosts = HostFacts::read_all(out.path()).unwrap();
    for sample in &samples {
        assert!(sample.experiment == name && !sample.unit.is_empty() && !sample.arm.is_empty(), "{sample:?}");
        assert!(sample.seed == settings.seed && hosts.contains_key(&sample.host), "{sample:?}");
        assert!(sample.parameters.split(';').all(|pair| pair.is_empty() || pair.contains('=')), "{sample:?}");
        let is_sane = sample.value.is_finite() && sample.value >= 0.0;
        assert!(is_sane && (sample.value > 0.0 || MAY_BE_ZERO.contains(&&*sample.metric)), "{sample:?}");
    }
    samples
}

/// Every (arm, metric) that there are samples of.
fn measured(samples: &[Sample]) -> BTreeSet<(&str, &str)> {
    samples.iter().map(|sample| (&*sample.arm, &*sample.metric)).collect()
}

fn assert_measured(samples: &[Sample], arms: &[&str], metrics: &[&str]) {
    let found = measured(samples);
    for arm in arms {
        for metric in metrics {
            assert!(found.contains(&(*arm, *metric)), "{metric} of {arm} is not in {found:?}");
        }
    }
}

#[test]
fn overhead_micro() {
    let samples = samples_of("overhead-micro", &[]);
    let operations: Vec<&str> = harness::micro::OPERATIONS.iter().map(|(name, _)| *name).collect();
    assert_measured(&samples, &["native", "pod", "pod-unconfined", "namespaces", "bubblewrap"], &operations);
}

#[test]
fn overhead_apache() {
    let samples = samples_of("overhead-apache", &[]);
    assert_measured(&samples, &["native", "pod"], &["requests_per_second", "latency_p50", "latency_p99", "latency"]);
    let asked = |file: &str| samples.iter().any(|sample| sample.parameters.contains(file));
    assert!(asked("file=1k.bin") && asked("file=1m.bin") && asked("file=cgi/"));
}

#[test]
fn overhead_programs() {
    let samples = samples_of("overhead-programs", &[]);
    for (program, metric) in
        [("make", "whole"), ("sqlite", "whole"), ("redis", "get_per_second"), ("fio", "random_per_second")]
    {
        let own: Vec<Sample> = samples.iter().filter(|sample| sample.workload == program).cloned().collect();
        assert_measured(&own, &["native", "pod"], &[metric]);
    }
}

#[test]
fn overhead_desktop() {
    let samples = samples_of("overhead-desktop", &["desktop-classic"]);
    assert_measured(&samples, &["native", "pod"], &["x11perf", "key_to_screen"]);
}

#[test]
fn checkpoint_restart() {
    let samples = samples_of("checkpoint-restart", &["sleep", "apache-event"]);
    let checkpoints = ["leave-running", "repeat", "lz4", "zstd", "disk", "stop"];
    assert_measured(&samples, &checkpoints, &["downtime", "whole", "bytes", "phase:hold"]);
    assert_measured(&samples, &["restart-disk"], &["whole"]);
    assert_measured(&samples, &["restart"], &["whole", "first_answer", "phase:tree"]);
    assert_measured(&samples, &["size-none", "size-lz4", "size-zstd"], &["image_bytes"]);
}

#[test]
fn downtime_client() {
    let samples = samples_of("downtime-client", &[]);
    for client in ["client=requests", "client=bytes", "client=frames"] {
        let own: Vec<Sample> = samples.iter().filter(|sample| sample.parameters.contains(client)).cloned().collect();
        assert_measured(&own, &["leave-running", "stop-restart"], &["client_gap", "pod_downtime", "gap"]);
    }
}

#[test]
fn migration() {
    let samples = samples_of("migration", &[]);
    for workload in ["memory", "apache-event", "desktop-classic"] {
        let own: Vec<Sample> = samples.iter().filter(|sample| sample.workload == workload).cloned().collect();
        let strategies = ["stop-and-copy", "pre-copy", "copy-on-reference", "flush"];
        assert_measured(&own, &strategies, &["downtime", "total", "bytes", "rounds"]);
        assert_measured(&own, &strategies, &["client_gap", "answers_before", "answers_meanwhile"]);
    }
    assert_measured(&samples, &["bytes-alone"], &["total"]);
}

#[test]
fn scaling() {
    let samples = samples_of("scaling", &[]);
    for dimension in &experiment::scaling::DIMENSIONS {
        let own: Vec<Sample> = samples.iter().filter(|sample| sample.workload == dimension.name).cloned().collect();
        assert_measured(&own, &["leave-running", "stop"], &["downtime", "whole"]);
        assert_measured(&own, &["restart", "memcpy", "write"], &["whole"]);
    }
}

#[test]
fn density() {
    assert_measured(&samples_of("density", &[]), &["copies"], &["whole", "memory", "anonymous", "removal"]);
}

#[test]
fn frequency() {
    let samples = samples_of("frequency", &[]);
    assert_measured(&samples, &["leave-running"], &["requests_per_second", "latency_p99", "checkpoints"]);
    assert!(samples.iter().any(|sample| sample.metric == "checkpoints" && sample.value > 0.0));
}

#[test]
fn every_experiment_is_tried_here() {
    let tests = include_str!("experiments.rs");
    for experiment in experiment::ALL {
        assert!(tests.contains(&format!("samples_of(\"{}\"", experiment.name)), "{}", experiment.name);
    }
}
