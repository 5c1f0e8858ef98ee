//! As many requests as a server can take: wrk, Debian's load generator.

use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

use crate::lab::Netns;

/// What to ask for, and how hard.
#[derive(Clone, Copy, Debug)]
pub struct Demand {
    /// Connections held open.
    pub connections: u32,
    /// Threads of the load generator.
    pub threads: u32,
    /// How long.
    pub duration: Duration,
}

/// What came of it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Load {
    /// Requests answered in a second.
    pub requests_per_second: f64,
    /// Latencies in microseconds: median, 90th, 99th percentile, longest.
    pub latency_us: [f64; 4],
    /// Requests that failed in any way.
    pub errors: u64,
}

/// Names of the latencies in [`Load::latency_us`].
pub const LATENCIES: [&str; 4] = ["latency_p50", "latency_p90", "latency_p99", "latency_max"];

/// Drives the server at `to` with requests for `path` from the network namespace `from`. A request that fails is an
/// error: a server that answers only some of them has no speed.
///
/// `script` is the workload's `wrk-report.lua`, which prints what is read here.
pub fn drive(from: &Netns, to: SocketAddr, path: &str, demand: Demand, script: &Path) -> Result<Load> {
    let output = from.output(
        std::process::Command::new("wrk")
            .args(["-t", &demand.threads.to_string(), "-c", &demand.connections.to_string()])
            .args(["-d", &format!("{}s", demand.duration.as_secs().max(1)), "-s"])
            .arg(script)
            .arg(format!("http://{to}{path}")),
    );
    let output = output.context("wrk could not be run: is the package wrk installed?")?;
    let text = String::from_utf8_lossy(&output.stdout);
    if !output.status.success() {
        bail!("wrk ended with {}: {}", output.status, String::from_utf8_lossy(&output.stderr).trim());
    }
    let load = parse(&text).with_context(|| format!("wrk did not report as wrk-report.lua does: {text}"))?;
    let failed = text.lines().find(|line| line.starts_with("failed: ")).unwrap_or_default();
    ensure!(load.errors == 0, "{} requests to {to} under load: {failed}", load.errors);
    Ok(load)
}

/// The line `REPORT requests duration_us errors p50 p90 p99 max`.
fn parse(text: &str) -> Option<Load> {
    let line = text.lines().find_map(|line| line.strip_prefix("REPORT "))?;
    let numbers: Vec<f64> = line.split_whitespace().map(str::parse).collect::<Result<_, _>>().ok()?;
    let [requests, duration_us, errors, latency_us @ ..] = numbers.as_slice() else { return None };
    Some(Load {
        requests_per_second: requests / (duration_us / 1e6),
        latency_us: latency_us.try_into().ok()?,
        errors: *errors as u64,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_report_of_wrk() {
        let load = parse("Running 1s test\nREPORT 5000 2000000 3 100.0 200.0 300.5 4000\n").unwrap();
        assert_eq!(load.requests_per_second, 2500.0);
        assert_eq!((load.errors, load.latency_us), (3, [100.0, 200.0, 300.5, 4000.0]));
        assert_eq!(parse("REPORT 1 2 3\n"), None);
        assert_eq!(parse("nothing"), None);
    }
}
