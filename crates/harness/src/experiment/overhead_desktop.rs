//! What a pod costs a desktop: drawing, and the way from a key to the screen.

use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use super::{Experiment, Extent, Session};
use crate::lab::{Lab, Native, Pod, PodOptions};
use crate::samples::Circumstances;
use crate::viewer::{Picture, Viewer};
use crate::workload::{Desktop, NATIVE_DISPLAY, SHELL, Workload};

pub(super) const EXPERIMENT: Experiment = Experiment {
    name: "overhead-desktop",
    claim: "low overhead",
    what: "x11perf (geometric mean) and the time from a key to the screen, in a pod and natively, in turns; the full desktop \
           with --full or by name",
    cases: || ALL.iter().map(|desktop| desktop.name()).collect(),
    runs: (10, 20),
    share: 4,
    run,
};

const ALL: [Desktop; 2] = [Desktop::Classic, Desktop::Full];
const USUAL: [&str; 1] = ["desktop-classic"];
const ARMS: [&str; 2] = ["native", "pod"];
/// Drawing, copying, text, pictures from a client, and a round trip.
const TESTS: [&str; 7] = ["-rect100", "-copywinwin100", "-line100", "-ftext", "-scroll100", "-putimage100", "-prop"];
/// How long x11perf does each.
const SECONDS: &str = "1";
/// Keys a run.
const KEYS: usize = 20;
/// A key that draws something in a shell, and the one that takes it away again.
const KEY: &str = "x";
const ERASE: &str = "\u{8}";

enum Place<'a> {
    Native(&'a Native),
    Pod(Pod<'a>),
}

fn run(session: &mut Session) -> Result<()> {
    let desktops: Vec<Desktop> = ALL.into_iter().filter(|desktop| session.wants_of(&USUAL, desktop.name())).collect();
    session.each(&desktops, |desktop| desktop.name().into(), |session, desktop| measure(session, *desktop))
}

fn measure(session: &mut Session, desktop: Desktop) -> Result<()> {
    let lab = Lab::new()?;
    let pod = lab.start_pod(&desktop, "desk", &PodOptions::default())?;
    let native = lab.start_native(&desktop)?;
    let look = |address| Viewer::connect(lab.client(), Desktop::screen_at(address));
    let viewers = [look(native.served_at())?, look(pod.served_at()?)?];
    let places = [Place::Native(&native), Place::Pod(pod.clone())];
    let mut rounds = session.rounds(desktop.name());
    while let Some(run) = session.next(&mut rounds)? {
        session.step(&format!("{}: x11perf", desktop.name()));
        let rates = in_turns(session, &places)?;
        for (arm, rates) in ARMS.iter().zip(&rates) {
            let parameters = format!("tests={};seconds={SECONDS};repeat=1", rates.len());
            let of = Circumstances { workload: desktop.name(), parameters: &parameters, arm, run };
            let mean = (rates.iter().map(|(_, rate)| rate.ln()).sum::<f64>() / rates.len() as f64).exp();
            session.record(&of, "x11perf", mean, "1/s")?;
            for (test, rate) in rates {
                session.record(&of, &format!("x11perf:{test}"), *rate, "1/s")?;
            }
        }
        if desktop == Desktop::Classic {
            session.step("a key");
            for index in session.shuffled(&[0, 1]) {
                let latency = latency(&viewers[index]).with_context(|| format!("typing, {}", ARMS[index]))?;
                let parameters = format!("keys={KEYS}");
                let of = Circumstances { workload: desktop.name(), parameters: &parameters, arm: ARMS[index], run };
                session.record_duration(&of, "key_to_screen", latency)?;
            }
        }
    }
    pod.remove()
}

/// What each test of x11perf reaches in each place: one place right after the other, the first of them drawn each time.
fn in_turns(session: &mut Session, places: &[Place<'_>; 2]) -> Result<[Vec<(String, f64)>; 2]> {
    let mut rates = [Vec::new(), Vec::new()];
    let tests = match session.extent {
        // x11perf itself does each of them for a while before it measures.
        _ if session.warms_up() => &TESTS[..1],
        Extent::Fast => &TESTS[..2],
        _ => &TESTS[..],
    };
    for test in tests {
        for index in session.shuffled(&[0, 1]) {
            rates[index].push(x11perf(&places[index], test)?);
        }
    }
    Ok(rates)
}

fn x11perf(place: &Place<'_>, test: &str) -> Result<(String, f64)> {
    let options = ["-time", SECONDS, "-repeat", "1", test];
    let printed = match place {
        Place::Pod(pod) => pod.exec(&[&["env", "DISPLAY=:1", "x11perf"], &options[..]].concat())?,
        Place::Native(native) => {
            let mut command = Command::new("x11perf");
            command.args(options).env("DISPLAY", format!(":{NATIVE_DISPLAY}"));
            let output = native.netns().output(&mut command)?;
            ensure!(output.status.success(), "x11perf: {}", String::from_utf8_lossy(&output.stderr).trim());
            String::from_utf8_lossy(&output.stdout).into_owned()
        }
    };
    printed.lines().find_map(parse).with_context(|| format!("x11perf printed {printed:?}"))
}

/// `  30000 reps @   0.0390 msec ( 25600.0/sec): 100x100 rectangle`
fn parse(line: &str) -> Option<(String, f64)> {
    let (_, rest) = line.split_once(" reps @ ")?;
    let (rate, test) = rest.split_once('(')?.1.split_once("/sec): ")?;
    Some((test.trim().into(), rate.trim().parse().ok()?))
}

/// The median time from a key to what it draws in a shell.
///
/// What each key draws is looked at first: a change of any kind could as well be what a window uncovers that has just gone.
fn latency(viewer: &Viewer) -> Result<Duration> {
    // x11perf has covered the shell, had the keyboard, and moved the mouse away.
    settled(viewer)?;
    viewer.click(SHELL.middle(), 1)?;
    settled(viewer)?;
    let drawn_by = |key| {
        viewer.type_text(key)?;
        settled(viewer)
    };
    let keys = [KEY, ERASE];
    let drawn = [drawn_by(KEY)?, drawn_by(ERASE)?];
    ensure!(drawn[0] != drawn[1], "the shell draws nothing of what is typed");
    let mut times = Vec::new();
    for key in 0..KEYS {
        let pressed = Instant::now();
        viewer.type_text(keys[key % 2])?;
        viewer.await_picture("a key to be drawn", |picture| (picture.part(SHELL) == drawn[key % 2]).then_some(()))?;
        times.push(pressed.elapsed());
    }
    times.sort();
    match times.get(KEYS / 2) {
        Some(median) => Ok(*median),
        None => bail!("no key was typed"),
    }
}

/// The shell, once nothing moves on the screen that does not move by itself.
fn settled(viewer: &Viewer) -> Result<Picture> {
    Ok(viewer.settled(Desktop::Classic.moving(), Duration::from_millis(200))?.part(SHELL))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_x11perf() {
        let line = " 450000 reps @   0.0022 msec (445000.0/sec): 100x100 rectangle";
        assert_eq!(parse(line), Some(("100x100 rectangle".into(), 445_000.0)));
        assert_eq!(parse("Sync time adjustment is 0.0120 msecs."), None);
    }
}
