//! What a pod costs a web server: the same Apache in a pod and in a bare network namespace on the same bridge.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context, Result};

use super::{Experiment, Extent, Session};
use crate::client::load::{Burst, Driver, LATENCIES};
use crate::lab::{Lab, PodOptions};
use crate::samples::Circumstances;
use crate::stats::quantile;
use crate::workload::{Apache, Mpm, Workload};

pub(super) const EXPERIMENT: Experiment = Experiment {
    name: "overhead-apache",
    claim: "low overhead",
    what: "requests a second and latency of Apache in a pod and natively, in turns: three MPMs, files of 1 kB and 1 MB, CGI",
    cases: || vec!["apache-event", "apache-worker", "apache-prefork"],
    runs: (60, 200),
    share: 7,
    run,
};

/// What is asked for, over how many connections, and how long a turn is: short, so that both arms of a run see the same
/// machine, but long enough for some answers.
const REQUESTS: [(&str, usize, Duration); 3] = [
    ("1k.bin", 50, Duration::from_millis(100)),
    ("1m.bin", 10, Duration::from_millis(150)),
    ("cgi/hello?who=pod", 8, Duration::from_millis(250)),
];
/// Turns of each arm in a run, over the same connections.
const TURNS: u32 = 4;
/// Parts of the latency's distribution that are recorded, in percent.
const QUANTILES: [f64; 12] = [1.0, 5.0, 10.0, 25.0, 50.0, 75.0, 90.0, 95.0, 98.0, 99.0, 99.5, 99.9];

fn run(session: &mut Session) -> Result<()> {
    let mpms = [Mpm::Event, Mpm::Worker, Mpm::Prefork].map(|mpm| Apache { mpm });
    let wanted = mpms.iter().filter(|apache| session.wants(apache.name()));
    // The fast form asks every server for one thing, and one for all of them.
    let some =
        |apache: &Apache| if session.extent == Extent::Fast && apache.mpm != Mpm::Event { 1 } else { REQUESTS.len() };
    let parts: Vec<_> =
        wanted.flat_map(|apache| REQUESTS[..some(apache)].iter().map(move |of| (*apache, *of))).collect();
    session.each(
        &parts,
        |(apache, (file, ..))| format!("{} {file}", apache.name()),
        |session, part| measure(session, *part),
    )
}

fn measure(
    session: &mut Session,
    (apache, (file, connections, turn)): (Apache, (&'static str, usize, Duration)),
) -> Result<()> {
    let lab = Lab::new()?;
    let pod = lab.start_pod(&apache, "web", &PodOptions::default())?;
    let native = lab.start_native(&apache)?;
    let arms: [(&str, SocketAddr); 2] = [("native", native.served_at()), ("pod", pod.served_at()?)];
    let parameters = format!("file={file};connections={connections};turns={TURNS};turn_ms={}", turn.as_millis());
    let mut rounds = session.rounds(&format!("{} {file}", apache.name()));
    while let Some(run) = session.next(&mut rounds)? {
        session.step(&format!("{}, {file}", apache.name()));
        let measured = in_turns(&lab, session, &arms, (file, connections, turn))?;
        for ((arm, _), burst) in arms.iter().zip(&measured) {
            let of = Circumstances { workload: apache.name(), parameters: &parameters, arm, run };
            record(session, &of, burst)?;
        }
    }
    pod.remove()
}

fn record(session: &mut Session, of: &Circumstances<'_>, burst: &Burst) -> Result<()> {
    session.record(of, "requests_per_second", burst.requests_per_second(), "1/s")?;
    for (metric, value) in LATENCIES.iter().zip(burst.latencies_us().context("no request was answered")?) {
        session.record(of, metric, value, "us")?;
    }
    for percent in QUANTILES {
        let parameters = format!("{};percent={percent}", of.parameters);
        let value = quantile(&burst.latencies, percent / 100.0).context("no request was answered")?;
        session.record(&Circumstances { parameters: &parameters, ..*of }, "latency", value, "us")?;
    }
    // Apache's event MPM closes keep-alive connections of a process all of whose threads are busy.
    session.record(of, "connections_closed", burst.closed as f64, "1")
}

/// One run: fresh connections to each arm, which then have [`TURNS`] turns each, the first of a pair drawn.
fn in_turns(
    lab: &Lab,
    session: &mut Session,
    arms: &[(&str, SocketAddr); 2],
    (file, connections, turn): (&'static str, usize, Duration),
) -> Result<[Burst; 2]> {
    let open = |arm: usize| Driver::open(lab.client(), arms[arm].1, file, connections);
    let mut drivers = [open(0)?, open(1)?];
    let mut sums = [Burst::default(), Burst::default()];
    for _ in 0..TURNS {
        for arm in session.shuffled(&[0, 1]) {
            sums[arm].add(drivers[arm].burst(turn).with_context(|| format!("driving {}", arms[arm].0))?);
        }
    }
    Ok(sums)
}
