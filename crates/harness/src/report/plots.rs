//! The plots of a report.

mod draw;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use rand::SeedableRng;
use rand::rngs::StdRng;

use plotters::prelude::SeriesLabelPosition;

use self::draw::{Bar, Group, Interval, Line};
use super::costs;
use crate::experiment::scaling::{DIMENSIONS, Dimension};
use crate::samples::{Sample, values, values_by};
use crate::stats::{Estimate, bootstrap, median};

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
    let plots = [
        latencies(samples),
        phases(samples),
        sizes(samples),
        overhead_micro(samples),
        overhead(samples),
        distribution(samples),
        downtime(samples),
        timeline(samples),
        migration(samples),
    ];
    let scaling = DIMENSIONS.iter().map(|dimension| scaling(samples, dimension));
    let more = [density(samples), frequency(samples)];
    plots.into_iter().chain(scaling).chain(more).filter_map(Result::transpose).collect()
}

/// The workloads whose checkpoints were measured, in the order in which that was.
fn workloads(samples: &[Sample]) -> Vec<&str> {
    let mut found: Vec<&str> = Vec::new();
    for sample in samples.iter().filter(|sample| sample.experiment == "checkpoint-restart") {
        if !found.contains(&&*sample.workload) {
            found.push(&sample.workload);
        }
    }
    found
}

fn median_ms(samples: &[Sample], workload: &str, arm: &str, metric: &str) -> Option<Estimate> {
    let values: Vec<f64> =
        values(samples, "checkpoint-restart", workload, arm, metric).iter().map(|us| us / 1e3).collect();
    bootstrap(&values, &mut StdRng::seed_from_u64(1), median)
}

fn latencies(samples: &[Sample]) -> Result<Option<Plot>> {
    let measures =
        [("downtime", "leave-running", "downtime"), ("checkpoint", "stop", "whole"), ("restart", "restart", "whole")];
    let mut rows = Vec::new();
    for workload in workloads(samples) {
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
    for workload in workloads(samples) {
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

/// Of system calls and processes, in every place.
fn overhead_micro(samples: &[Sample]) -> Result<Option<Plot>> {
    let costs = costs::all(samples).into_iter().filter(|cost| cost.experiment == "overhead-micro");
    let groups: Vec<Group> = costs.map(|cost| Group { label: cost.label, points: cost.slower }).collect();
    let series = ["pod", "namespaces", "bubblewrap"];
    let svg = draw::grouped("What single operations cost", "percent slower than native", &series, &groups, 0.0)?;
    Ok(svg.map(|svg| Plot {
        name: "overhead-micro".into(),
        caption: "Batches in turns within one run: median of the ratio to native with its 95 % interval. Right of zero is \
                  slower. The pod has the default seccomp profile; bare namespaces and bubblewrap have none.",
        svg,
    }))
}

/// Of whole programs.
fn overhead(samples: &[Sample]) -> Result<Option<Plot>> {
    let costs = costs::all(samples).into_iter().filter(|cost| cost.experiment != "overhead-micro");
    let row = |cost: costs::Cost| {
        let (_, estimate) = *cost.slower.iter().find(|(arm, _)| *arm == "pod")?;
        Some(Interval { label: cost.label, estimate })
    };
    let rows: Vec<Interval> = costs.filter_map(row).collect();
    let svg = draw::intervals("What a pod costs programs", "percent slower than native", &rows, &[0.0])?;
    Ok(svg.map(|svg| Plot {
        name: "overhead".into(),
        caption: "Pairs measured one right after the other: median of the ratio with its 95 % interval. Right of zero is \
                  slower in the pod.",
        svg,
    }))
}

/// Of Apache's answers.
fn distribution(samples: &[Sample]) -> Result<Option<Plot>> {
    let line = |arm: &str| {
        let of_file = |s: &&Sample| s.workload == "apache-event" && s.parameters.contains("file=1k.bin");
        let some: Vec<Sample> = samples.iter().filter(of_file).cloned().collect();
        let by_percent = values_by(&some, ["overhead-apache", "apache-event", arm, "latency"], "percent");
        let points = by_percent.into_iter().filter_map(|(percent, us)| Some((median(&us)? / 1e3, percent))).collect();
        Line { name: arm.into(), points, limit: false }
    };
    let axes = ("milliseconds", "percent of the answers within");
    let lines = [line("native"), line("pod")];
    let svg = draw::lines("Latency of Apache (event), 1 kB", axes, &lines, true, SeriesLabelPosition::LowerRight)?;
    Ok(svg.map(|svg| Plot {
        name: "latency-distribution".into(),
        caption: "50 connections with a request on their way all the time; medians over the runs of each percentile.",
        svg,
    }))
}

/// What a client sees around a checkpoint.
fn timeline(samples: &[Sample]) -> Result<Option<Plot>> {
    let line = |run: u32| {
        let own: Vec<Sample> = samples.iter().filter(|s| s.run == run).cloned().collect();
        let gaps = values_by(&own, ["downtime-client", "apache-event", "leave-running", "gap"], "at_ms");
        let points = gaps.into_iter().filter_map(|(ms, us)| Some((ms, median(&us)? / 1e3))).collect();
        Line { name: format!("checkpoint {}", run + 1), points, limit: false }
    };
    // One answer alone, the latest, is no line.
    let lines: Vec<Line> = (0..5).map(line).filter(|line| line.points.len() > 2).collect();
    let axes = ("milliseconds before and after the answer that came latest", "milliseconds since the answer before");
    let svg =
        draw::lines("A client while its server is checkpointed", axes, &lines, false, SeriesLabelPosition::UpperLeft)?;
    Ok(svg.map(|svg| Plot {
        name: "client-gaps".into(),
        caption: "Apache (event), left running; one client that asks for 1 kB again and again. The longest wait that ended \
                  in every two milliseconds.",
        svg,
    }))
}

fn migration(samples: &[Sample]) -> Result<Option<Plot>> {
    let series = ["stop-and-copy", "pre-copy", "copy-on-reference", "flush"];
    let mut parameters: Vec<(&str, &str)> = Vec::new();
    for sample in samples.iter().filter(|s| s.experiment == "migration" && s.metric == "downtime") {
        if !parameters.contains(&(&sample.workload, &sample.parameters)) {
            parameters.push((&sample.workload, &sample.parameters));
        }
    }
    let group = |(workload, case): (&str, &str)| {
        let point = |strategy: &'static str| {
            let is_it = |s: &&Sample| {
                [&*s.experiment, &*s.workload, &*s.parameters, &*s.arm, &*s.metric]
                    == ["migration", workload, case, strategy, "downtime"]
            };
            let ms: Vec<f64> = samples.iter().filter(is_it).map(|s| s.value / 1e3).collect();
            Some((strategy, bootstrap(&ms, &mut StdRng::seed_from_u64(1), median)?))
        };
        let label = if workload == "memory" { described(case) } else { workload.into() };
        Group { label, points: series.iter().filter_map(|strategy| point(strategy)).collect() }
    };
    let groups: Vec<Group> = parameters.into_iter().map(group).collect();
    let svg = draw::grouped("Downtime of a move", "milliseconds", &series, &groups, 0.0)?;
    Ok(svg.map(|svg| Plot {
        name: "migration".into(),
        caption: "Medians with 95 % intervals, by strategy: a program with so much memory that writes so much of it a \
                  second, over a link of so many megabits a second (as fast as it goes where none is named); Apache and a \
                  desktop.",
        svg,
    }))
}

/// `memory=64;dirty=5;link=100` for people.
fn described(case: &str) -> String {
    let of = |key: &str| case.split(';').find_map(|pair| pair.strip_prefix(key)?.strip_prefix('=')).unwrap_or("0");
    let mut words = format!("{} MiB", of("memory"));
    if of("dirty") != "0" {
        words += &format!(", {} MiB/s", of("dirty"));
    }
    if of("link") != "0" {
        words += &format!(", {} Mbit/s", of("link"));
    }
    words
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
    for workload in workloads(samples) {
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
