//! The plots of a report.

mod draw;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use rand::SeedableRng;
use rand::rngs::StdRng;

use self::draw::{Bar, Interval, Line};
use crate::experiment::scaling::DIMENSIONS;
use crate::samples::{Sample, values};
use crate::stats::{Estimate, bootstrap, median, paired_ratio};

/// A plot: its file name without an extension, what it shows, and the SVG.
#[derive(Clone, Debug)]
pub struct Plot {
    /// Name of the file.
    pub name: &'static str,
    /// What it shows, in a sentence.
    pub caption: &'static str,
    /// The picture.
    pub svg: String,
}

impl Plot {
    /// Writes it into `directory` as SVG, and as PNG where `rsvg-convert` is installed; gives the path of the SVG.
    pub(super) fn write(&self, directory: &Path) -> Result<PathBuf> {
        let path = directory.join(self.name).with_extension("svg");
        std::fs::write(&path, &self.svg).with_context(|| format!("writing {}", path.display()))?;
        let png = path.with_extension("png");
        let converted = Command::new("rsvg-convert").args(["--zoom", "2", "-o"]).arg(&png).arg(&path).output();
        if let Ok(output) = converted {
            anyhow::ensure!(
                output.status.success(),
                "rsvg-convert {}: {}",
                path.display(),
                String::from_utf8_lossy(&output.stderr).trim()
            );
        }
        Ok(path)
    }
}

/// Every plot that there are samples for.
pub(super) fn all(samples: &[Sample]) -> Result<Vec<Plot>> {
    let plots = [latencies(samples), phases(samples), overhead(samples), downtime(samples), sizes(samples)];
    let scaling = SCALING.iter().map(|(dimension, name)| scaling(samples, dimension, name));
    let more = [density(samples), frequency(samples)];
    plots.into_iter().chain(scaling).chain(more).filter_map(Result::transpose).collect()
}

const WORKLOADS: [&str; 6] =
    ["sleep", "apache-event", "apache-worker", "apache-prefork", "desktop-classic", "desktop-full"];

fn median_ms(samples: &[Sample], workload: &str, arm: &str, metric: &str) -> Option<Estimate> {
    let values: Vec<f64> =
        values(samples, "checkpoint-restart", workload, arm, metric).iter().map(|us| us / 1e3).collect();
    bootstrap(&values, &mut StdRng::seed_from_u64(1), median)
}

fn latencies(samples: &[Sample]) -> Result<Option<Plot>> {
    let measures =
        [("downtime", "leave-running", "downtime"), ("checkpoint", "stop", "whole"), ("restart", "restart", "whole")];
    let mut rows = Vec::new();
    for workload in WORKLOADS {
        for (label, arm, metric) in measures {
            let estimate = median_ms(samples, workload, arm, metric);
            rows.extend(estimate.map(|estimate| Interval { label: format!("{workload}: {label}"), estimate }));
        }
    }
    let svg = draw::intervals("Checkpoint and restart, whole command", "milliseconds", &rows, &[])?;
    Ok(svg.map(|svg| Plot {
        name: "latencies",
        caption: "Medians with 95 % intervals: downtime of a pod that is left running, and the whole commands that stop \
                  it and start it again, image on a tmpfs.",
        svg,
    }))
}

fn phases(samples: &[Sample]) -> Result<Option<Plot>> {
    let mut bars = Vec::new();
    for workload in WORKLOADS {
        for (arm, label) in [("leave-running", "left running"), ("stop", "stopped"), ("restart", "restart")] {
            let parts = medians_of_phases(samples, workload, arm);
            if !parts.is_empty() {
                bars.push(Bar { label: format!("{workload}: {label}"), parts });
            }
        }
    }
    let svg = draw::stacked("Where the time goes", "milliseconds", &bars)?;
    Ok(svg.map(|svg| Plot { name: "phases", caption: "Median time of each stage, as zap reports it.", svg }))
}

/// The stages of an arm in the order in which they were recorded, with their medians in milliseconds.
fn medians_of_phases(samples: &[Sample], workload: &str, arm: &str) -> Vec<(String, f64)> {
    let mut order: Vec<&str> = Vec::new();
    let mut found: BTreeMap<&str, Vec<f64>> = BTreeMap::new();
    let of_arm =
        samples.iter().filter(|s| s.experiment == "checkpoint-restart" && s.workload == workload && s.arm == arm);
    for sample in of_arm {
        let Some(phase) = sample.metric.strip_prefix("phase:") else { continue };
        if !order.contains(&phase) {
            order.push(phase);
        }
        found.entry(phase).or_default().push(sample.value / 1e3);
    }
    order.into_iter().filter_map(|phase| Some((phase.to_string(), median(found.get(phase)?)?))).collect()
}

fn overhead(samples: &[Sample]) -> Result<Option<Plot>> {
    let mut rows = Vec::new();
    let mut add = |label: &str, experiment: &str, workload: &str, arm: &str, metric: &str, sign: f64| {
        let of = |arm| values(samples, experiment, workload, arm, metric);
        let pairs: Vec<_> = of("native").into_iter().zip(of(arm)).collect();
        if let Some(e) = paired_ratio(&pairs, &mut StdRng::seed_from_u64(1)) {
            let [value, a, b] = [e.value, e.low, e.high].map(|ratio| sign * (ratio - 1.0) * 100.0);
            rows.push(Interval { label: label.into(), estimate: Estimate { value, low: a.min(b), high: a.max(b) } });
        }
    };
    for (metric, label) in
        [("getpid", "getpid"), ("read", "read"), ("fork_exit", "fork+exit"), ("fork_exec", "fork+exec")]
    {
        add(&format!("{label}, no seccomp"), "overhead-micro", "micro", "pod-unconfined", metric, 1.0);
        add(&format!("{label}, empty profile"), "overhead-micro", "micro", "pod-allow-all", metric, 1.0);
        add(&format!("{label}, default"), "overhead-micro", "micro", "pod", metric, 1.0);
    }
    add("Apache, requests/s", "overhead-apache", "apache-event", "pod", "requests_per_second", -1.0);
    add("Apache, median latency", "overhead-apache", "apache-event", "pod", "latency_p50", 1.0);
    add("Apache, p99 latency", "overhead-apache", "apache-event", "pod", "latency_p99", 1.0);
    add("desktop, x11perf", "overhead-desktop", "desktop-classic", "pod", "x11perf", -1.0);
    add("desktop, key to screen", "overhead-desktop", "desktop-classic", "pod", "key_to_screen", 1.0);
    let svg = draw::intervals("What a pod costs", "percent slower than native", &rows, &[0.0])?;
    Ok(svg.map(|svg| Plot {
        name: "overhead",
        caption: "Pairs measured one right after the other: median of the ratio with its 95 % interval. Right of zero is \
                  slower in the pod. An empty seccomp profile allows everything: it shows what the kernel takes for having \
                  one.",
        svg,
    }))
}

/// The cases of the experiment `scaling`, and the names of their plots.
const SCALING: [(&str, &str); 8] = [
    ("memory", "scaling-memory"),
    ("dirty", "scaling-dirty"),
    ("processes", "scaling-processes"),
    ("threads", "scaling-threads"),
    ("mappings", "scaling-mappings"),
    ("files", "scaling-files"),
    ("sockets", "scaling-sockets"),
    ("connections", "scaling-connections"),
];

fn scaling(samples: &[Sample], dimension: &str, name: &'static str) -> Result<Option<Plot>> {
    let unit = DIMENSIONS.iter().find(|d| d.name == dimension).map_or(dimension, |d| d.unit);
    let line = |name: &str, arm: &str, metric: &str| {
        let points = by_number(samples, ["scaling", dimension, arm, metric], "n");
        let points = points.into_iter().map(|(n, us)| (n, us / 1e3)).collect();
        Line { name: name.into(), points, limit: arm == "write" }
    };
    let lines = [
        line("downtime", "leave-running", "downtime"),
        line("checkpoint, left running", "leave-running", "whole"),
        line("checkpoint, stopped", "stop", "whole"),
        line("restart", "restart", "whole"),
        line("write of the image's bytes", "write", "whole"),
    ];
    let svg =
        draw::logarithmic(&format!("Scaling: {dimension}"), (&format!("{unit} (count)"), "milliseconds"), &lines)?;
    Ok(svg.map(|svg| Plot {
        name,
        caption: "Medians, both axes logarithmic: what is linear has the slope of a diagonal. Grey: writing as many bytes \
                  as the image has, in the same run.",
        svg,
    }))
}

/// Medians by a number that the parameters name, in its order; what is not positive is left out.
fn by_number(samples: &[Sample], [experiment, workload, arm, metric]: [&str; 4], parameter: &str) -> Vec<(f64, f64)> {
    let mut found: BTreeMap<u64, (f64, Vec<f64>)> = BTreeMap::new();
    let wanted =
        |s: &&Sample| s.experiment == experiment && s.workload == workload && s.arm == arm && s.metric == metric;
    for sample in samples.iter().filter(wanted) {
        let number = sample.parameters.split(';').find_map(|pair| pair.strip_prefix(parameter)?.strip_prefix('='));
        if let Some(number) = number.and_then(|number| number.parse::<f64>().ok()).filter(|number| *number > 0.0) {
            found.entry(number.to_bits()).or_insert((number, Vec::new())).1.push(sample.value);
        }
    }
    let medians = found.into_values().filter_map(|(number, values)| Some((number, median(&values)?)));
    medians.filter(|(_, median)| *median > 0.0).collect()
}

fn density(samples: &[Sample]) -> Result<Option<Plot>> {
    let line = |workload: &str, metric: &str| Line {
        name: format!("{workload}: {metric}"),
        points: by_number(samples, ["density", workload, "copies", metric], "n"),
        limit: false,
    };
    let mut lines = Vec::new();
    for workload in ["sleep", "apache-event"] {
        for (metric, scale) in [("whole", 1e3), ("removal", 1e3)] {
            let mut line = line(workload, metric);
            line.points.iter_mut().for_each(|(_, us)| *us /= scale);
            lines.push(line);
        }
    }
    let svg = draw::logarithmic("Copies of one image beside each other", ("copies", "milliseconds"), &lines)?;
    Ok(svg.map(|svg| Plot {
        name: "density",
        caption: "Time of the restart that makes the Nth copy, and of the removal that leaves N − 1.",
        svg,
    }))
}

fn frequency(samples: &[Sample]) -> Result<Option<Plot>> {
    let mut rows = Vec::new();
    let of = |sample: &&Sample| sample.experiment == "frequency" && sample.metric == "requests_per_second";
    let rate = |sample: &Sample| {
        let text = sample.parameters.split(';').find_map(|pair| pair.strip_prefix("rate="));
        text.and_then(|text| text.parse::<f64>().ok()).unwrap_or(0.0)
    };
    let mut by_rate: BTreeMap<u64, (f64, Vec<f64>)> = BTreeMap::new();
    for sample in samples.iter().filter(of) {
        by_rate.entry(rate(sample).to_bits()).or_insert((rate(sample), Vec::new())).1.push(sample.value);
    }
    for (rate, values) in by_rate.into_values() {
        let estimate = bootstrap(&values, &mut StdRng::seed_from_u64(1), median);
        rows.extend(estimate.map(|estimate| Interval { label: format!("{rate} checkpoints/s"), estimate }));
    }
    let svg = draw::intervals("A server that is checkpointed again and again", "requests a second", &rows, &[])?;
    Ok(svg.map(|svg| Plot {
        name: "frequency",
        caption: "Apache (event) under load over 50 connections, left running; each image is written as what changed since \
                  the one before. Labels: checkpoints a second that were asked for.",
        svg,
    }))
}

fn downtime(samples: &[Sample]) -> Result<Option<Plot>> {
    let of = |metric| values(samples, "downtime-client", "apache-event", "leave-running", metric);
    let points: Vec<(f64, f64)> =
        of("pod_downtime").into_iter().zip(of("client_gap")).map(|(x, y)| (x / 1e3, y / 1e3)).collect();
    let svg = draw::scatter(
        "Downtime: the pod's own figure and a client's",
        ("reported by the pod, ms", "longest pause of the client, ms"),
        &points,
    )?;
    Ok(svg.map(|svg| Plot {
        name: "downtime",
        caption: "One point a checkpoint of a pod that is left running. On the line both agree; above it the client \
                  waited longer.",
        svg,
    }))
}

fn sizes(samples: &[Sample]) -> Result<Option<Plot>> {
    let mut bars = Vec::new();
    for workload in WORKLOADS {
        for compression in ["none", "lz4", "zstd"] {
            let arm = format!("size-{compression}");
            if let Some(bytes) = median(&values(samples, "checkpoint-restart", workload, &arm, "image_bytes")) {
                let parts = vec![("image".to_string(), bytes / f64::from(1 << 20))];
                bars.push(Bar { label: format!("{workload}: {compression}"), parts });
            }
        }
    }
    let svg = draw::stacked("Size of an image", "MiB", &bars)?;
    Ok(svg.map(|svg| Plot { name: "sizes", caption: "Bytes that the image takes on disk, by compression.", svg }))
}
