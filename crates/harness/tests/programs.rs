//! Programs as they are packaged, under load, through a checkpoint that leaves them running and through restarts. Each has
//! a folder in `workloads/` with what starts it and what notices a loss.

#![allow(clippy::unwrap_used)]

use std::path::Path;

use anyhow::{Context, Result, ensure};
use harness::lab::{Lab, Pod, wait_until};

/// Whether nothing was lost; `how` is what is expected in particular.
fn check(pod: &Pod<'_>, name: &str, how: &[&str]) -> Result<()> {
    let script = format!("/srv/{name}/check");
    pod.exec(&[&[script.as_str()], how].concat()).map(drop)
}

fn lives_on(name: &str, options: &[&str], how: &[&str]) -> Result<()> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../workloads").join(name).canonicalize()?;
    let lab = Lab::new()?;
    let bind = format!("{}:/srv/{name}:ro", folder.display());
    let start = format!("/srv/{name}/start");
    let run = ["run", "-d", "-n", name, "--net", "private", "--bind", &bind];
    lab.zap(&[&run, options, &["--", &start]].concat())?;
    let pod = lab.pod(name)?;
    wait_until("the program to be at work", || check(&pod, name, how)).with_context(|| pod.log())?;
    let images = ["first", "second", "third"].map(|image| lab.directory().join(image));
    pod.checkpoint(&images[0], &["--leave-running"])?;
    check(&pod, name, how).context("left running")?;
    pod.checkpoint(&images[1], &[])?;
    for (image, next) in [(&images[1], Some(&images[2])), (&images[2], None)] {
        let (pod, _, _) = lab.restart(image, &[])?;
        check(&pod, name, &[]).with_context(|| format!("restarted; it has printed {}", pod.log()))?;
        match next {
            Some(next) => drop(pod.checkpoint(next, &[])?),
            None => pod.remove()?,
        }
    }
    ensure!(lab.pods()?.is_empty(), "a pod is left");
    Ok(())
}

#[test]
fn redis() {
    lives_on("redis", &[], &["saving"]).unwrap();
}

#[test]
fn memcached() {
    lives_on("memcached", &[], &[]).unwrap();
}

#[test]
fn postgresql() {
    lives_on("postgresql", &[], &[]).unwrap();
}

#[test]
fn ssh() {
    lives_on("ssh", &[], &[]).unwrap();
}

#[test]
fn supervisor() {
    lives_on("supervisor", &[], &[]).unwrap();
}

#[test]
fn bubblewrap() {
    lives_on("bubblewrap", &["--cap-add", "sys_admin"], &[]).unwrap();
}
