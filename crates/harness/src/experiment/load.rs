//! Pods that have so much of one thing: see `harness-load`.

use anyhow::{Result, ensure};

use crate::lab::{Lab, Pod, built_beside, wait_until};

/// A pod called `name` with a `harness-load` in it, ready. `options` are of `zap run`.
pub(super) fn start<'a>(lab: &'a Lab, name: &str, options: &[&str], words: &[&str]) -> Result<Pod<'a>> {
    let program = built_beside("harness-load")?;
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
