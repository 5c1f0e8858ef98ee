//! Pods that have so much of one thing: see `harness-load`.

use anyhow::{Context, Result, ensure};

use crate::lab::{Lab, Pod, wait_until};

/// A pod called `name` with a `harness-load` in it, ready. `options` are of `zap run`.
pub(super) fn start<'a>(lab: &'a Lab, name: &str, options: &[&str], words: &[&str]) -> Result<Pod<'a>> {
    let own = std::env::current_exe().context("finding this program's own path")?;
    // A test is one directory deeper than a command.
    let beside = own.ancestors().skip(1).take(2).map(|directory| directory.join("harness-load"));
    let program = beside.into_iter().find(|path| path.is_file());
    let program = program.with_context(|| format!("there is no harness-load beside {}: build it", own.display()))?;
    let program = program.to_string_lossy();
    lab.zap(&[&["run", "-d", "-n", name], options, &["--", &program], words].concat())?;
    let pod = lab.pod(name)?;
    wait_until("a load", || {
        let log = pod.log();
        ensure!(log.contains("ready"), "harness-load {} is not ready; it says {log:?}", words.join(" "));
        Ok(())
    })?;
    Ok(pod)
}
