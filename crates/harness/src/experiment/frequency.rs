//! A server that is checkpointed again and again: what its clients get, and what the images take.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};

use super::{Experiment, Extent, Session, bytes_below};
use crate::client::load::{Burst, Driver, LATENCIES};
use crate::lab::{Lab, Pod, PodOptions};
use crate::samples::Circumstances;
use crate::workload::{Apache, Mpm, Workload};

pub(super) const EXPERIMENT: Experiment = Experiment {
    name: "frequency",
    claim: "a server can be checkpointed again and again while it serves",
    what: "requests a second, latency and bytes of images of Apache (event), checkpointed 0 to 20 times a second",
    cases: || vec!["apache-event"],
    runs: (10, 10),
    share: 2,
    run,
};

const CONNECTIONS: usize = 50;
const FILE: &str = "1k.bin";
/// Checkpoints a second that are asked for.
const RATES: [f64; 7] = [0.0, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0];

fn run(session: &mut Session) -> Result<()> {
    let (rates, time) = match session.extent {
        Extent::Fast => (vec![0.0, 5.0], Duration::from_millis(1500)),
        Extent::Ordinary => (RATES.to_vec(), Duration::from_secs(4)),
        Extent::Full => ([&[0.1][..], &RATES].concat(), Duration::from_secs(20)),
    };
    let lab = Lab::new()?;
    let apache = Apache { mpm: Mpm::Event };
    let pod = lab.start_pod(&apache, "web", &PodOptions::default())?;
    session.each(
        &[apache.name()],
        |part| (*part).into(),
        |session, part| {
            let mut rounds = session.rounds(part);
            while let Some(run) = session.next(&mut rounds)? {
                // The most frequent one warms up whatever any of them needs.
                let rates = if session.warms_up() { &rates[rates.len() - 1..] } else { &rates[..] };
                for rate in session.shuffled(rates) {
                    session.step(&format!("{rate} a second"));
                    let (burst, images) = serve_and_checkpoint(&lab, &pod, rate, time)?;
                    let parameters =
                        format!("rate={rate};connections={CONNECTIONS};file={FILE};seconds={}", time.as_secs_f64());
                    let of =
                        Circumstances { workload: apache.name(), parameters: &parameters, arm: "leave-running", run };
                    session.record(&of, "requests_per_second", burst.requests_per_second(), "1/s")?;
                    for (metric, value) in
                        LATENCIES.iter().zip(burst.latencies_us().context("no request was answered")?)
                    {
                        session.record(&of, metric, value, "us")?;
                    }
                    session.record(&of, "checkpoints", images.made as f64 / time.as_secs_f64(), "1/s")?;
                    session.record(&of, "image_bytes", images.bytes as f64, "bytes")?;
                }
            }
            Ok(())
        },
    )?;
    pod.remove()
}

/// What came of checkpointing again and again.
#[derive(Default)]
struct Images {
    made: u32,
    /// Of all of them, each written as what changed since the one before.
    bytes: u64,
}

/// Asks the server for `time`, and checkpoints it `rate` times a second meanwhile, or as often as that can be done.
fn serve_and_checkpoint(lab: &Lab, pod: &Pod<'_>, rate: f64, time: Duration) -> Result<(Burst, Images)> {
    let directory = lab.directory().join("images");
    std::fs::create_dir(&directory).with_context(|| format!("making {}", directory.display()))?;
    let mut driver = Driver::open(lab.client(), pod.served_at()?, FILE, CONNECTIONS)?;
    let over = AtomicBool::new(false);
    let result = std::thread::scope(|scope| {
        let checkpoints = scope.spawn(|| again_and_again(pod, rate, &directory, &over));
        let burst = driver.burst(time);
        over.store(true, Ordering::Relaxed);
        let images = checkpoints.join().map_err(|_| anyhow!("whoever checkpoints panicked"))?;
        Ok((burst?, images?))
    });
    std::fs::remove_dir_all(&directory).with_context(|| format!("removing {}", directory.display()))?;
    result
}

fn again_and_again(pod: &Pod<'_>, rate: f64, directory: &Path, over: &AtomicBool) -> Result<Images> {
    let mut images = Images::default();
    let (begun, mut last): (Instant, Option<PathBuf>) = (Instant::now(), None);
    while rate > 0.0 && !over.load(Ordering::Relaxed) {
        let due = begun + Duration::from_secs_f64(f64::from(images.made + 1) / rate);
        if let Some(left) = due.checked_duration_since(Instant::now()) {
            // In short steps: the load may end meanwhile.
            std::thread::sleep(left.min(Duration::from_millis(5)));
            continue;
        }
        let image = directory.join(images.made.to_string());
        let parent = last.as_ref().map(|path| path.to_string_lossy().into_owned());
        let mut options = vec!["--leave-running"];
        parent.iter().for_each(|path| options.extend(["--parent", path]));
        pod.checkpoint(&image, &options)?;
        images.bytes += bytes_below(&image)?;
        images.made += 1;
        last = Some(image);
    }
    Ok(images)
}
