//! What a pod costs a web server: the same Apache in a pod and in a bare network namespace on the same bridge.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context, Result};

use super::{Experiment, Session};
use crate::client::load::{Burst, Driver, LATENCIES};
use crate::lab::{Lab, PodOptions};
use crate::samples::Circumstances;
use crate::workload::{Apache, Mpm, Workload};

pub(super) const EXPERIMENT: Experiment = Experiment {
    name: "overhead-apache",
    claim: "low overhead",
    what: "requests a second and latency of Apache (event) in a pod and natively, in turns",
    cases: || vec!["apache-event"],
    runs: (60, 200),
    share: 3,
    run,
};

const CONNECTIONS: usize = 50;
const FILE: &str = "1k.bin";
/// Turns of each arm in a run, over the same connections.
const TURNS: u32 = 4;
/// Short, so that both arms of a run see the same machine.
const TURN: Duration = Duration::from_millis(100);

fn run(session: &mut Session) -> Result<()> {
    let lab = Lab::new()?;
    let apache = Apache { mpm: Mpm::Event };
    let pod = lab.start_pod(&apache, "web", &PodOptions::default())?;
    let native = lab.start_native(&apache)?;
    let arms: [(&str, SocketAddr); 2] = [("native", native.served_at()), ("pod", pod.served_at()?)];
    let parameters = format!("file={FILE};connections={CONNECTIONS};turns={TURNS};turn_ms={}", TURN.as_millis());

    session.each(
        &[apache.name()],
        |part| (*part).into(),
        |session, part| {
            let mut rounds = session.rounds(part, true);
            while let Some(run) = session.next(&mut rounds)? {
                session.step("in turns");
                let measured = in_turns(&lab, session, &arms)?;
                for ((arm, _), burst) in arms.iter().zip(&measured) {
                    let of = Circumstances { workload: apache.name(), parameters: &parameters, arm, run };
                    session.record(&of, "requests_per_second", burst.requests_per_second(), "1/s")?;
                    for (metric, value) in
                        LATENCIES.iter().zip(burst.latencies_us().context("no request was answered")?)
                    {
                        session.record(&of, metric, value, "us")?;
                    }
                    // Apache's event MPM closes keep-alive connections of a process all of whose threads are busy.
                    session.record(&of, "connections_closed", burst.closed as f64, "1")?;
                }
            }
            Ok(())
        },
    )?;
    pod.remove()
}

/// One run: fresh connections to each arm, which then have [`TURNS`] turns each, the first of a pair drawn.
fn in_turns(lab: &Lab, session: &mut Session, arms: &[(&str, SocketAddr); 2]) -> Result<[Burst; 2]> {
    let open = |arm: usize| Driver::open(lab.client(), arms[arm].1, FILE, CONNECTIONS);
    let mut drivers = [open(0)?, open(1)?];
    let mut sums = [Burst::default(), Burst::default()];
    for _ in 0..TURNS {
        for arm in session.shuffled(&[0, 1]) {
            sums[arm].add(drivers[arm].burst(TURN).with_context(|| format!("driving {}", arms[arm].0))?);
        }
    }
    Ok(sums)
}
