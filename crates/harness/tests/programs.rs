//! Programs as they are packaged, under load, through a checkpoint that leaves them running and through restarts. Each has
//! a folder in `workloads/` with what starts it and what notices a loss.

#![allow(clippy::unwrap_used)]

use anyhow::{Context, Result, ensure};
use harness::lab::{Lab, PodOptions};
use harness::workload::{PROGRAMS, Program, Workload};

/// What else is expected of a program, which its check looks for when it is asked to.
#[derive(Clone, Copy, Default)]
struct Expected {
    /// Before it is restarted for the first time.
    before: &'static [&'static str],
    /// In the end.
    last: &'static [&'static str],
}

fn program(name: &str) -> Result<&'static Program> {
    PROGRAMS.iter().find(|program| program.name() == name).with_context(|| format!("there is no program {name}"))
}

fn lives_on(name: &str, expected: Expected) -> Result<()> {
    let (lab, program) = (Lab::new()?, program(name)?);
    let options = ["--net", "private"].map(Into::into).into();
    let pod = lab.start_pod(program, name, &PodOptions { options })?;
    let images = ["first", "second", "third"].map(|image| lab.directory().join(image));
    program.check(&pod, expected.before)?;
    pod.checkpoint(&images[0], &["--leave-running"])?;
    program.check(&pod, expected.before).context("left running")?;
    pod.checkpoint(&images[1], &[])?;
    for (image, next) in [(&images[1], Some(&images[2])), (&images[2], None)] {
        let (pod, _, _) = lab.restart(image, &[])?;
        let expected = if next.is_some() { &[] } else { expected.last };
        program.check(&pod, expected).with_context(|| format!("restarted; it has printed {}", pod.log()))?;
        match next {
            Some(next) => drop(pod.checkpoint(next, &[])?),
            None => pod.remove()?,
        }
    }
    ensure!(lab.pods()?.is_empty(), "a pod is left");
    Ok(())
}

/// A test a program, so that they run beside each other.
macro_rules! live_on {
    ($($name:ident $(: $expected:expr)?),* $(,)?) => {
        $(
            #[test]
            fn $name() {
                #[allow(unused_variables)]
                let expected = Expected::default();
                $(let expected = $expected;)?
                lives_on(stringify!($name), expected).unwrap();
            }
        )*

        #[test]
        fn all_are_tried() {
            let tried = [$(stringify!($name)),*];
            let names: Vec<_> = PROGRAMS.iter().map(|program| program.name()).collect();
            assert_eq!(names, tried);
        }
    };
}

live_on! {
    bubblewrap,
    caddy,
    chromium,
    compile,
    ffmpeg,
    git,
    java,
    mariadb,
    memcached,
    nginx,
    node,
    postgresql,
    python,
    redis: Expected { before: &["saving"], last: &[] },
    redis_memory,
    sqlite,
    ssh,
    supervisor: Expected { before: &[], last: &["cron"] },
    terminal,
    tokio,
}
