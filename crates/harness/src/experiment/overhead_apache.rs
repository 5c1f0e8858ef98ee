//! What a pod costs a web server: the same Apache in a pod and in a bare network namespace on the same bridge.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::Result;

use super::{Experiment, Session};
use crate::client::load::{Demand, LATENCIES, drive};
use crate::lab::{Lab, PodOptions};
use crate::samples::Circumstances;
use crate::workload::{Apache, Mpm, Workload, folder};

pub(super) const EXPERIMENT: Experiment = Experiment {
    name: "overhead-apache",
    claim: "low overhead",
    what: "requests a second and latency of Apache (event) in a pod and natively, in turns",
    runs: 30,
    run,
};

const CONNECTIONS: u32 = 50;
const FILE: &str = "/1k.bin";
/// Long enough to tell 1 %, short enough that both arms of a pair see the same machine.
const WINDOW: Duration = Duration::from_secs(2);

fn run(session: &mut Session) -> Result<()> {
    let lab = Lab::new()?;
    let apache = Apache { mpm: Mpm::Event };
    let pod = lab.start_pod(&apache, "web", &PodOptions::default())?;
    let native = lab.start_native(&apache)?;
    let arms: [(&str, SocketAddr); 2] = [("native", native.served_at()), ("pod", pod.served_at()?)];
    let script = folder("apache")?.join("wrk-report.lua");
    let parameters = format!("file={FILE};connections={CONNECTIONS};seconds={}", WINDOW.as_secs());
    let demand = Demand { connections: CONNECTIONS, threads: 1, duration: WINDOW };

    session.expect(u64::from(session.runs + 1) * 2);
    for run in 0..=session.runs {
        for (arm, address) in session.shuffled(&arms) {
            session.step(arm);
            let load = drive(lab.client(), address, FILE, demand, &script)?;
            // The first pair warms the servers up.
            let Some(run) = run.checked_sub(1) else { continue };
            let of = Circumstances { workload: apache.name(), parameters: &parameters, arm, run };
            session.record(&of, "requests_per_second", load.requests_per_second, "1/s")?;
            for (metric, value) in LATENCIES.iter().zip(load.latency_us) {
                session.record(&of, metric, value, "us")?;
            }
        }
    }
    pod.remove()
}
