//! The plots of a report.

mod draw;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use rand::SeedableRng;
use rand::rngs::StdRng;

use self::draw::{Bar, Group, Interval, Line};
use super::{claims, costs};
use crate::experiment::scaling::{DIMENSIONS, Dimension};
use crate::samples::{Sample, number, values, values_by};
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
        phases(samples, "checkpoint", &[("leave-running", "left running"), ("stop", "stopped")]),
        phases(samples, "restart", &[("restart", "restart")]),
        sizes(samples),
        overhead_micro(samples),
        overhead(samples),
        distribution(samples),
        downtime(samples),
    ];
    let timelines = CLIENTS.iter().map(|client| timeline(samples, client));
    let moves = [migration(samples), meanwhile(samples)];
    let scaling = DIMENSIONS.iter().map(|dimension| scaling(samples, dimension));
    let more = [
        density(samples),
        density_memory(samples),
        frequency(samples),
        frequency_latency(samples),
        frequency_storage(samples),
    ];
    plots.into_iter().chain(timelines).chain(moves).chain(scaling).chain(more).filter_map(Result::transpose).collect()
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
    let group = |workload: &str| {
        let point = |(label, arm, metric)| Some((label, median_ms(samples, workload, arm, metric)?));
        Group { label: workload.into(), points: measures.into_iter().filter_map(point).collect() }
    };
    let groups: Vec<Group> = workloads(samples).into_iter().map(group).collect();
    let series = measures.map(|(label, ..)| label);
    let svg = draw::grouped("Checkpoint and restart, whole command", "milliseconds", &series, &groups)?;
    Ok(svg.map(|svg| Plot {
        name: "latencies".into(),
        caption: "Medians with 95 % intervals: downtime of a pod that is left running, and the whole commands that stop \
                  it and start it again, image on a tmpfs.",
        svg,
    }))
}

fn phases(samples: &[Sample], what: &str, arms: &[(&str, &str)]) -> Result<Option<Plot>> {
    let mut bars = Vec::new();
    for workload in workloads(samples) {
        for (arm, label) in arms {
            let parts = medians_of_phases(samples, workload, arm);
            if !parts.is_empty() {
                bars.push(Bar { label: format!("{workload}: {label}"), parts });
            }
        }
    }
    let svg = draw::stacked(&format!("Where the time of a {what} goes"), "milliseconds", &bars)?;
    Ok(svg.map(|svg| Plot {
        name: format!("phases-{what}"),
        caption: "Median time of each stage, in their order, as zap reports it; beside the bars their sums.",
        svg,
    }))
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
    let svg = draw::grouped("What single operations cost", "percent slower than native", &series, &groups)?;
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
    let svg = draw::lines("Latency of Apache (event), 1 kB", axes, &lines, true)?;
    Ok(svg.map(|svg| Plot {
        name: "latency-distribution".into(),
        caption: "50 connections with a request on their way all the time; medians over the runs of each percentile.",
        svg,
    }))
}

/// Who looks on at a checkpoint: the name of the picture, what is among the parameters, what the wait is for, and the caption.
const CLIENTS: [(&str, &str, &str, &str); 3] = [
    (
        "client-gaps-requests",
        "client=requests",
        "an answer",
        "Apache (event), left running; one client that asks for 1 kB again and again. The longest wait that ended in every \
         two milliseconds.",
    ),
    (
        "client-gaps-bytes",
        "client=bytes",
        "bytes of a stream",
        "Apache (event), left running; one client that reads a stream of bytes as fast as they come. The longest wait that \
         ended in every two milliseconds.",
    ),
    (
        "client-gaps-frames",
        "client=frames",
        "a frame of VNC",
        "A desktop on which something moves, left running, and a viewer of its screen. The longest wait that ended in every \
         two milliseconds.",
    ),
];

/// The samples of one client across checkpoints of a pod that is left running.
fn of_client(samples: &[Sample], client: &str) -> Vec<Sample> {
    let is_one =
        |s: &&Sample| s.experiment == "downtime-client" && s.arm == "leave-running" && s.parameters.contains(client);
    samples.iter().filter(is_one).cloned().collect()
}

/// What a client sees around a checkpoint.
fn timeline(
    samples: &[Sample],
    (name, client, what, caption): &(&str, &str, &str, &'static str),
) -> Result<Option<Plot>> {
    let some = of_client(samples, client);
    let line = |run: u32| {
        let gaps = some.iter().filter(|s| s.run == run && s.metric == "gap");
        let mut points: Vec<(f64, f64)> = gaps.filter_map(|s| Some((number(s, "at_ms")?, s.value / 1e3))).collect();
        points.sort_by(|a, b| a.0.total_cmp(&b.0));
        Line { name: format!("checkpoint {}", run + 1), points, limit: false }
    };
    // One answer alone, the latest, is no line.
    let lines: Vec<Line> = (0..5).map(line).filter(|line| line.points.len() > 2).collect();
    let axes = ("milliseconds before and after the one that came latest", "milliseconds since the one before");
    let svg = draw::lines(&format!("Waiting for {what} across a checkpoint"), axes, &lines, false)?;
    Ok(svg.map(|svg| Plot { name: (*name).into(), caption, svg }))
}

const STRATEGIES: [&str; 4] = ["stop-and-copy", "pre-copy", "copy-on-reference", "flush"];

/// What moved, a group each, with a point for each strategy: the median of what `of_run` makes of the samples of a run.
fn moves(samples: &[Sample], of_run: impl Fn(&[&Sample]) -> Option<f64>) -> Vec<Group> {
    let all: Vec<&Sample> = samples.iter().filter(|s| s.experiment == "migration").collect();
    let mut moved: Vec<(&str, &str)> = Vec::new();
    for sample in all.iter().filter(|s| s.metric == "downtime") {
        if !moved.contains(&(&sample.workload, &sample.parameters)) {
            moved.push((&sample.workload, &sample.parameters));
        }
    }
    let group = |(workload, case): (&str, &str)| {
        let point = |strategy: &'static str| {
            let mut runs: BTreeMap<(u64, u32), Vec<&Sample>> = BTreeMap::new();
            for s in all.iter().filter(|s| [&*s.workload, &*s.parameters, &*s.arm] == [workload, case, strategy]) {
                runs.entry((s.seed, s.run)).or_default().push(s);
            }
            let values: Vec<f64> = runs.values().filter_map(|run| of_run(run)).collect();
            Some((strategy, bootstrap(&values, &mut StdRng::seed_from_u64(1), median)?))
        };
        let label = if workload == "memory" { described(case) } else { workload.into() };
        Group { label, points: STRATEGIES.iter().filter_map(|strategy| point(strategy)).collect() }
    };
    moved.into_iter().map(group).collect()
}

fn value_of(run: &[&Sample], metric: &str) -> Option<f64> {
    run.iter().find(|sample| sample.metric == metric).map(|sample| sample.value)
}

fn migration(samples: &[Sample]) -> Result<Option<Plot>> {
    let groups = moves(samples, |run| Some(value_of(run, "downtime")? / 1e3));
    let svg = draw::grouped("Downtime of a move", "milliseconds", &STRATEGIES, &groups)?;
    Ok(svg.map(|svg| Plot {
        name: "migration".into(),
        caption: "Medians with 95 % intervals, by strategy: a program with so much memory that writes so much of it a \
                  second, over a link of so many megabits a second (as fast as it goes where none is named); Apache and a \
                  desktop.",
        svg,
    }))
}

fn meanwhile(samples: &[Sample]) -> Result<Option<Plot>> {
    let kept = |run: &[&Sample]| Some(value_of(run, "answers_meanwhile")? / value_of(run, "answers_before")? * 100.0);
    let title = "What clients have of a pod while it moves";
    let svg = draw::grouped(title, "percent of the answers before", &STRATEGIES, &moves(samples, kept))?;
    Ok(svg.map(|svg| Plot {
        name: "migration-meanwhile".into(),
        caption: "Answers a second (frames, of the desktop) from the beginning of the command to its end, the downtime \
                  included, against the same client before: medians with 95 % intervals.",
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
    let row = |(rate, estimate)| Interval { label: format!("{rate} checkpoints/s"), estimate };
    let rows: Vec<Interval> = by_rate(samples, "requests_per_second", 1.0).into_iter().map(row).collect();
    let svg = draw::intervals("A server that is checkpointed again and again", "requests a second", &rows, &[])?;
    Ok(svg.map(|svg| Plot {
        name: "frequency".into(),
        caption: "Apache (event) under load over 50 connections, left running; each image is written as what changed since \
                  the one before. Labels: checkpoints a second that were asked for.",
        svg,
    }))
}

/// Of the frequency experiment, by how often checkpoints were asked for.
fn by_rate(samples: &[Sample], metric: &str, factor: f64) -> Vec<(f64, Estimate)> {
    let found = values_by(samples, ["frequency", "apache-event", "leave-running", metric], "rate");
    let estimate = |(rate, values): (f64, Vec<f64>)| {
        let values: Vec<f64> = values.into_iter().map(|value| value * factor).collect();
        Some((rate, bootstrap(&values, &mut StdRng::seed_from_u64(1), median)?))
    };
    found.into_iter().filter_map(estimate).collect()
}

fn frequency_latency(samples: &[Sample]) -> Result<Option<Plot>> {
    let series = [("median", "latency_p50"), ("99th percentile", "latency_p99")];
    let mut groups: Vec<Group> = Vec::new();
    for (name, metric) in series {
        for (place, (rate, estimate)) in by_rate(samples, metric, 1e-3).into_iter().enumerate() {
            if groups.len() <= place {
                groups.push(Group { label: format!("{rate} checkpoints/s"), points: Vec::new() });
            }
            groups[place].points.push((name, estimate));
        }
    }
    let series = series.map(|(name, _)| name);
    let svg = draw::grouped("Latency of a server that is checkpointed", "milliseconds", &series, &groups)?;
    Ok(svg.map(|svg| Plot {
        name: "frequency-latency".into(),
        caption: "Of the answers of Apache (event) under load over 50 connections: medians over the runs, with 95 % \
                  intervals.",
        svg,
    }))
}

fn frequency_storage(samples: &[Sample]) -> Result<Option<Plot>> {
    let growth = claims::storage(samples).into_iter().filter(|(rate, _)| *rate > 0.0);
    let bar = |(rate, bytes): (f64, f64)| Bar {
        label: format!("{rate} checkpoints/s"),
        parts: vec![("images".into(), bytes / f64::from(1 << 20))],
    };
    let svg = draw::stacked("What images take", "MiB a second", &growth.map(bar).collect::<Vec<_>>())?;
    Ok(svg.map(|svg| Plot {
        name: "frequency-storage".into(),
        caption: "Medians of how fast storage grows while a server under load is checkpointed, each image written as what \
                  changed since the one before.",
        svg,
    }))
}

fn density_memory(samples: &[Sample]) -> Result<Option<Plot>> {
    let line = |(workload, metric): (&str, &str)| {
        let by_number = values_by(samples, ["density", workload, "copies", metric], "n");
        let each = |(n, bytes): (f64, Vec<f64>)| Some((n, median(&bytes)? / n / f64::from(1 << 20)));
        let what = if metric == "memory" { "all" } else { "anonymous" };
        Line {
            name: format!("{workload}: {what}"),
            points: by_number.into_iter().filter_map(each).collect(),
            limit: false,
        }
    };
    let of = |workload| [line((workload, "memory")), line((workload, "anonymous"))];
    let lines = [of("sleep"), of("apache-event")].concat();
    let svg = draw::lines("Memory of one of so many copies", ("copies", "MiB each"), &lines, true)?;
    Ok(svg.map(|svg| Plot {
        name: "density-memory".into(),
        caption: "What all copies have together, divided by how many there are: each page that several have counted once. \
                  Medians.",
        svg,
    }))
}

fn downtime(samples: &[Sample]) -> Result<Option<Plot>> {
    let sort = |(_, client, ..): &(&str, &str, &str, &str)| {
        let some = of_client(samples, client);
        let of = |metric: &'static str| some.iter().filter(move |s| s.metric == metric).map(|s| s.value / 1e3);
        let name = client.trim_start_matches("client=").to_owned();
        Line { name, points: of("pod_downtime").zip(of("client_gap")).collect(), limit: false }
    };
    let sorts: Vec<Line> = CLIENTS.iter().map(sort).filter(|sort| !sort.points.is_empty()).collect();
    let axes = ("reported by the pod, ms", "longest pause of the client, ms");
    let svg = draw::scatter("Downtime: the pod's own figure and a client's", axes, &sorts)?;
    Ok(svg.map(|svg| Plot {
        name: "downtime".into(),
        caption: "One point a checkpoint of a pod that is left running, by what its client waits for. On the line both agree; \
                  above it the client waited longer.",
        svg,
    }))
}

fn sizes(samples: &[Sample]) -> Result<Option<Plot>> {
    let mut bars = Vec::new();
    for workload in workloads(samples) {
        for (compression, label) in [("none", "as it is"), ("lz4", "lz4"), ("zstd", "zstd")] {
            let arm = format!("size-{compression}");
            if let Some(bytes) = median(&values(samples, "checkpoint-restart", workload, &arm, "image_bytes")) {
                let parts = vec![("image".to_string(), bytes / f64::from(1 << 20))];
                bars.push(Bar { label: format!("{workload}: {label}"), parts });
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
