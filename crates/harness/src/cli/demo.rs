//! `harness demo-migrate`.

use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Result, ensure};
use clap::Args;

use crate::lab::{MigrateStats, Pair, Phase, PodOptions, Way, clean_up_on_interrupt};
use crate::viewer::Viewer;
use crate::workload::Desktop;

#[derive(Debug, Args)]
pub(super) struct Arguments {
    /// How its memory is moved, once for each
    #[arg(long, value_name = "STRATEGY", default_values = ["pre-copy", "copy-on-reference"])]
    strategy: Vec<String>,
}

pub(super) fn run(arguments: &Arguments) -> Result<ExitCode> {
    clean_up_on_interrupt()?;
    println!("Two hosts, in network namespaces of their own, with one network for their pods; somebody else looks on.");
    let pair = Pair::new()?;
    println!("A desktop starts in a pod on the first host: a window manager, terminals, editors, a browser …");
    let desktop = Desktop::Classic;
    let pod = pair.first.start_pod(&desktop, "desk", &PodOptions::default())?;
    let address = pod.served_at()?;
    let viewer = Viewer::connect(pair.first.client(), Desktop::screen_at(address))?;
    println!("A viewer connects to its screen at {}: it stays connected from here to the end.", address.ip());
    let mut at_first = true;
    for strategy in &arguments.strategy {
        let (from, to) = if at_first { ("first", "second") } else { ("second", "first") };
        println!("\nThe desktop moves from the {from} host to the {to} by {strategy}.");
        viewer.await_update()?;
        viewer.watch();
        let (_, stats) = pair.migrate(at_first, "desk", Way::Link, &["--strategy", strategy, "--stats"])?;
        at_first = !at_first;
        viewer.await_update()?;
        let gaps = viewer.watched()?;
        timeline(&stats);
        println!("  The viewer saw something new every {}, and once not for {}.", ms(gaps.typical), ms(gaps.longest));
        let (here, there) = if at_first { (&pair.first, &pair.second) } else { (&pair.second, &pair.first) };
        ensure!(there.pods()?.is_empty(), "something is left of it: {:?}", there.pods()?);
        ensure!(here.pod("desk")?.served_at()? == address, "it has another address");
        println!("  Nothing of it is left on the {from} host, and it is reached at the same address.");
    }
    ensure!(viewer.refresh()?.shows_something(), "the screen is empty");
    println!("\nThe viewer is still connected, and the whole screen is there.");
    let here = if at_first { &pair.first } else { &pair.second };
    here.pod("desk")?.remove()?;
    Ok(ExitCode::SUCCESS)
}

fn ms(duration: Duration) -> String {
    format!("{} ms", duration.as_millis())
}

/// What happened when: the source's stages, and in its last one what the destination did.
fn timeline(stats: &MigrateStats) {
    let mut at = 0;
    for phase in &stats.phases {
        let what = match &*phase.name {
            "look-ahead" => "it runs; what it has is looked at, and copied if the strategy says so",
            "hold" => "every thread is held, its packets are dropped",
            "look" => "processes, files and sockets are written down",
            "memory" => "memory that has changed is copied",
            "files" => "files that have changed are copied",
            "write" => "the last of it is sent",
            "let-go" => "the destination rebuilds it, and it is let go there; the rest of it ends here",
            _ => continue,
        };
        line(at, phase, "", what);
        if phase.name == "let-go" {
            let mut there = at;
            for phase in &stats.there {
                line(there, phase, "  there: ", &phase.name);
                there += phase.us;
            }
        }
        at += phase.us;
    }
    let (mib, rounds) = (stats.bytes as f64 / f64::from(1 << 20), stats.rounds);
    println!(
        "  It ran nowhere for {:.1} ms; {mib:.1} MiB were sent, in {rounds} rounds.",
        stats.downtime_us as f64 / 1e3
    );
    if stats.residual_bytes > 0 {
        let late = stats.residual_bytes as f64 / f64::from(1 << 20);
        println!("  {late:.1} MiB of that followed within {:.1} ms while it ran.", stats.residual_us as f64 / 1e3);
    }
}

fn line(at: u64, phase: &Phase, indent: &str, what: &str) {
    println!("  {:>9.1} ms  {:>8.1} ms  {indent}{what}", at as f64 / 1e3, phase.us as f64 / 1e3);
}
