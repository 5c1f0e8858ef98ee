//! How the time of a checkpoint and a restart grows with what a pod has, one thing at a time.

use std::io::Write;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use super::{Experiment, Extent, Session, bytes_below, load};
use crate::lab::Lab;
use crate::samples::Circumstances;

pub(super) const EXPERIMENT: Experiment = Experiment {
    name: "scaling",
    claim: "downtime does not grow with the pod's memory; nothing is worse than linear",
    what: "checkpoint, downtime, restart and image size by memory, writing rate, processes, threads, mappings, files, sockets",
    cases: || DIMENSIONS.iter().map(|dimension| dimension.name).collect(),
    runs: (10, 10),
    share: 6,
    run,
};

/// One thing that a pod can have more of.
#[derive(Debug)]
pub struct Dimension {
    /// Its name in samples.
    pub name: &'static str,
    /// What is counted.
    pub unit: &'static str,
    /// How many of them.
    sizes: &'static [u64],
    /// How many beside them when everything is measured.
    large: &'static [u64],
}

/// MiB of memory that a pod has while it writes to it.
const WRITTEN: &str = "256";

/// Every one of them. `dirty` is MiB written a second by a pod of [`WRITTEN`] MiB.
pub const DIMENSIONS: [Dimension; 8] = [
    Dimension { name: "memory", unit: "MiB", sizes: &[4, 64, 512], large: &[2048, 4096] },
    Dimension { name: "dirty", unit: "MiB/s", sizes: &[1, 20, 200], large: &[1000] },
    Dimension { name: "processes", unit: "process", sizes: &[1, 10, 100], large: &[300, 1000] },
    Dimension { name: "threads", unit: "thread", sizes: &[1, 30, 300], large: &[2000] },
    Dimension { name: "mappings", unit: "mapping", sizes: &[100, 1000, 10_000], large: &[60_000] },
    Dimension { name: "files", unit: "open file", sizes: &[10, 100, 1000], large: &[5000, 20_000] },
    Dimension { name: "sockets", unit: "unix socket", sizes: &[10, 100, 1000], large: &[5000, 10_000] },
    Dimension { name: "connections", unit: "TCP socket", sizes: &[10, 100, 1000], large: &[5000, 10_000] },
];

impl Dimension {
    fn sizes(&self, extent: Extent) -> Vec<u64> {
        match extent {
            Extent::Fast => self.sizes.iter().copied().take(1).collect(),
            Extent::Ordinary => self.sizes.to_vec(),
            Extent::Full => [self.sizes, self.large].concat(),
        }
    }
}

fn run(session: &mut Session) -> Result<()> {
    let wanted: Vec<&Dimension> = DIMENSIONS.iter().filter(|dimension| session.wants(dimension.name)).collect();
    let extent = session.extent;
    session.each(
        &wanted,
        |dimension| dimension.name.into(),
        |session, dimension| {
            // A lab each: what one leaves behind when it fails is in nobody's way.
            let lab = Lab::new()?;
            let mut rounds = session.rounds(dimension.name);
            while let Some(run) = session.next(&mut rounds)? {
                for size in session.shuffled(&dimension.sizes(extent)) {
                    session.step(&format!("{size} × {}", dimension.unit));
                    measure(session, &lab, dimension, size, run)
                        .with_context(|| format!("{size} × {}", dimension.unit))?;
                }
            }
            Ok(())
        },
    )
}

/// Measures one size, in a pod of its own: left running (the second time, when its memory is followed already), stopped,
/// restarted; and the bytes of its image alone, copied in memory and written.
fn measure(session: &mut Session, lab: &Lab, dimension: &Dimension, size: u64, run: u32) -> Result<()> {
    let (count, image) = (size.to_string(), lab.directory().join("image"));
    let words = match dimension.name {
        "dirty" => ["memory", WRITTEN, &count],
        name => [name, &count, "0"],
    };
    let pod = load::start(lab, "load", &["--net", "private"], &words)?;
    let beside = if dimension.name == "dirty" { format!(";memory={WRITTEN}") } else { String::new() };
    let parameters = format!("n={size}{beside}");
    let of = |arm| Circumstances { workload: dimension.name, parameters: &parameters, arm, run };
    let remove = || std::fs::remove_dir_all(&image).with_context(|| format!("removing {}", image.display()));

    for recorded in [false, true] {
        let (stats, whole) = pod.checkpoint(&image, &["--leave-running"])?;
        if recorded {
            session.record(&of("leave-running"), "downtime", stats.downtime_us as f64, "us")?;
            session.record_duration(&of("leave-running"), "whole", whole)?;
        }
        remove()?;
    }
    let (stats, whole) = pod.checkpoint(&image, &[])?;
    let bytes = bytes_below(&image)?;
    session.record(&of("stop"), "downtime", stats.downtime_us as f64, "us")?;
    session.record_duration(&of("stop"), "whole", whole)?;
    session.record(&of("stop"), "image_bytes", bytes as f64, "bytes")?;
    let (pod, _, whole) = lab.restart(&image, &[])?;
    session.record_duration(&of("restart"), "whole", whole)?;
    pod.remove()?;
    remove()?;
    let (copied, written) = limits(lab, bytes)?;
    session.record_duration(&of("memcpy"), "whole", copied)?;
    session.record_duration(&of("write"), "whole", written)
}

/// How long so many bytes take: copied from memory to memory that was touched before, and written to a file where images are.
fn limits(lab: &Lab, bytes: u64) -> Result<(Duration, Duration)> {
    let from = vec![1u8; bytes as usize];
    let mut to = vec![2u8; bytes as usize];
    let begun = Instant::now();
    to.copy_from_slice(std::hint::black_box(&from));
    std::hint::black_box(&to);
    let copied = begun.elapsed();
    drop(to);
    let path = lab.directory().join("written");
    let begun = Instant::now();
    std::fs::File::create(&path)?.write_all(&from)?;
    let written = begun.elapsed();
    std::fs::remove_file(&path)?;
    Ok((copied, written))
}
