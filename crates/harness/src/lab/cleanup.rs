//! Leaving nothing behind.

use std::io::Read;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, Weak};

use anyhow::{Context, Result};
use nix::mount::{MntFlags, umount2};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::zap::Listed;
use super::{Inner, Netns};

static INTERRUPTED: AtomicBool = AtomicBool::new(false);
/// Every lab of this process that may still be there.
static LABS: Mutex<Vec<Weak<Inner>>> = Mutex::new(Vec::new());

pub(super) fn register(lab: &Arc<Inner>) {
    let mut labs = LABS.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    labs.retain(|lab| lab.strong_count() > 0);
    labs.push(Arc::downgrade(lab));
}

/// From now on SIGINT, SIGTERM and SIGHUP take every lab down, then end the process with 128 + the signal. A panic that
/// aborts takes them down, too.
pub fn clean_up_on_interrupt() -> Result<()> {
    let mut signals = crate::sys::interrupts().context("catching Ctrl-C")?;
    std::thread::spawn(move || {
        let mut signal = [0];
        if signals.read_exact(&mut signal).is_ok() {
            eprintln!("\ninterrupted: taking everything down; what was measured stays");
            INTERRUPTED.store(true, Ordering::SeqCst);
            take_down_all();
            std::process::exit(128 + i32::from(signal[0]));
        }
    });
    let before = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        before(info);
        if cfg!(panic = "abort") {
            take_down_all();
        }
    }));
    Ok(())
}

/// Never returns once the process has been interrupted: what fails from then on fails because its lab is being taken down.
pub fn stop_if_interrupted() {
    while INTERRUPTED.load(Ordering::SeqCst) {
        std::thread::park();
    }
}

fn take_down_all() {
    let labs: Vec<_> = LABS.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).drain(..).collect();
    labs.iter().filter_map(Weak::upgrade).for_each(|lab| take_down(&lab));
}

/// Takes down what a killed process left of its labs.
pub(super) fn sweep(zap: &Path) {
    let entries = std::fs::read_dir("/run").into_iter().flatten().flatten();
    for directory in entries.map(|entry| entry.path()).filter(|path| is_orphan(path)) {
        if let Err(error) = remove_pods(|arguments| {
            let mut command = Command::new(zap);
            command.arg("--state").arg(directory.join("state")).args(arguments).stdin(Stdio::null());
            command.output().context("running zap")
        }) {
            eprintln!("sweeping {}: {error:#}", directory.display());
        }
        let _ = umount2(&directory, MntFlags::MNT_DETACH);
        let _ = std::fs::remove_dir(&directory);
    }
}

/// Whether `path` is the directory of a lab, `/run/zap-lab-PID-NUMBER`, whose process is gone.
fn is_orphan(path: &Path) -> bool {
    let owner = || path.file_name()?.to_str()?.strip_prefix("zap-lab-")?.split('-').next()?.parse::<u32>().ok();
    owner().is_some_and(|pid| !Path::new(&format!("/proc/{pid}")).exists())
}

/// Removes the pods, ends what else runs in the lab, and unmounts it. Goes on past anything that fails, and says so.
pub(super) fn take_down(lab: &Inner) {
    let mut closed = lab.closed.write().unwrap_or_else(|poisoned| poisoned.into_inner());
    if std::mem::replace(&mut *closed, true) {
        return;
    }
    let complain = |what: &str, result: Result<()>| {
        if let Err(error) = result {
            eprintln!("taking down {}: {what}: {error:#}", lab.directory.display());
        }
    };
    complain("removing pods", remove_pods(|arguments| Ok(lab.zap_in_any_case(arguments)?.0)));
    complain("ending what runs in the lab", end_processes(&lab.host));
    complain("ending clients", end_processes(&lab.client));
    let others = std::mem::take(&mut *lab.others.lock().unwrap_or_else(|poisoned| poisoned.into_inner()));
    for netns in others.iter().filter_map(Weak::upgrade) {
        complain("ending what ran beside the pods", end_processes(&netns));
    }
    complain("unmounting", umount2(&lab.directory, MntFlags::MNT_DETACH).map_err(Into::into));
    complain("removing the mount point", std::fs::remove_dir(&lab.directory).map_err(Into::into));
}

fn remove_pods(zap: impl Fn(&[&str]) -> Result<Output>) -> Result<()> {
    let listed = zap(&["ls", "--json"])?;
    if listed.stdout.is_empty() {
        return Ok(()); // A zap that failed: the next step ends what it left.
    }
    let pods: Vec<Listed> = serde_json::from_slice(&listed.stdout).context("reading the list of pods")?;
    for pod in pods {
        let output = zap(&["rm", "-f", &pod.name])?;
        if !output.status.success() {
            eprintln!("removing pod {}: {}", pod.name, String::from_utf8_lossy(&output.stderr).trim());
        }
    }
    Ok(())
}

/// Kills every process in a namespace that is only ours.
pub(super) fn end_processes(netns: &Netns) -> Result<()> {
    for pid in netns.processes()? {
        match kill(Pid::from_raw(pid), Signal::SIGKILL) {
            Ok(()) | Err(nix::errno::Errno::ESRCH) => {}
            Err(error) => return Err(error).with_context(|| format!("killing process {pid}")),
        }
    }
    Ok(())
}
