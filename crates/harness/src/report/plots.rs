//! The plots of a report.

mod draw;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use rand::SeedableRng;
use rand::rngs::StdRng;

use self::draw::{Bar, Interval, Line};
use crate::experiment::scaling::{DIMENSIONS, Dimension};
use crate::samples::{Sample, values, values_by};
use crate::stats::{Estimate, bootstrap, median, paired_ratio};

/// A plot: its file name without an extension, what it shows, and the SVG.
#[derive(Clone, Debug)]
pub struct Plot {
    /// Name of the file.
    pub name: String,
    /// What it shows, in a sentence.
    pub caption: &'static str,
    /// The picture.
    pub svg: String,
}

impl Plot {
    /// Writes it into `directory` as SVG, and as PNG where `rsvg-convert` is installed; gives the path of the SVG.
    pub(super) fn write(&self, directory: &Path) -> Result<PathBuf> {
        let path = directory.join(&self.name).with_extension("svg");
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
    let scaling = DIMENSIONS.iter().map(|dimension| scaling(samples, dimension));
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
        name: "latencies".into(),
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
    Ok(svg.map(|svg| Plot { name: "phases".into(), caption: "Median time of each stage, as zap reports it.", svg }))
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
        name: "overhead".into(),
        caption: "Pairs measured one right after the other: median of the ratio with its 95 % interval. Right of zero is \
                  slower in the pod. An empty seccomp profile allows everything: it shows what the kernel takes for having \
                  one.",
        svg,
    }))
}

fn scaling(samples: &[Sample], dimension: &Dimension) -> Result<Option<Plot>> {
    let line = |name: &str, arm: &str, metric: &str| {
        medians_in_ms(name.into(), samples, ["scaling", dimension.name, arm, metric], arm == "write")
    };
    let lines = [
        line("downtime", "leave-running", "downtime"),
        line("checkpoint, left running", "leave-running", "whole"),
        line("checkpoint, stopped", "stop", "whole"),
        line("restart", "restart", "whole"),
        line("write of the image's bytes", "write", "whole"),
    ];
    let axes = (&*format!("{} (count)", dimension.unit), "milliseconds");
    let svg = draw::logarithmic(&format!("Scaling: {}", dimension.name), axes, &lines)?;
    Ok(svg.map(|svg| Plot {
        name: format!("scaling-{}", dimension.name),
        caption: "Medians, both axes logarithmic: what is linear has the slope of a diagonal. Grey: writing as many bytes \
                  as the image has, in the same run.",
        svg,
    }))
}

/// Medians of times by the number `n` of the parameters; what has no logarithm is left out.
fn medians_in_ms(name: String, samples: &[Sample], wanted: [&str; 4], limit: bool) -> Line {
    let medians = values_by(samples, wanted, "n").into_iter().filter_map(|(n, us)| Some((n, median(&us)? / 1e3)));
    Line { name, points: medians.filter(|(n, ms)| *n > 0.0 && *ms > 0.0).collect(), limit }
}

fn density(samples: &[Sample]) -> Result<Option<Plot>> {
    let mut lines = Vec::new();
    for workload in ["sleep", "apache-event"] {
        for metric in ["whole", "removal"] {
            let name = format!("{workload}: {metric}");
            lines.push(medians_in_ms(name, samples, ["density", workload, "copies", metric], false));
        }
    }
    let svg = draw::logarithmic("Copies of one image beside each other", ("copies", "milliseconds"), &lines)?;
    Ok(svg.map(|svg| Plot {
        name: "density".into(),
        caption: "Time of the restart that makes the Nth copy, and of the removal that leaves N − 1.",
        svg,
    }))
}

fn frequency(samples: &[Sample]) -> Result<Option<Plot>> {
    let wanted = ["frequency", "apache-event", "leave-running", "requests_per_second"];
    let row = |(rate, values): (f64, Vec<f64>)| {
        let estimate = bootstrap(&values, &mut StdRng::seed_from_u64(1), median)?;
        Some(Interval { label: format!("{rate} checkpoints/s"), estimate })
    };
    let rows: Vec<Interval> = values_by(samples, wanted, "rate").into_iter().filter_map(row).collect();
    let svg = draw::intervals("A server that is checkpointed again and again", "requests a second", &rows, &[])?;
    Ok(svg.map(|svg| Plot {
        name: "frequency".into(),
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
        name: "downtime".into(),
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
    Ok(svg.map(|svg| Plot {
        name: "sizes".into(),
        caption: "Bytes that the image takes on disk, by compression.",
        svg,
    }))
}
