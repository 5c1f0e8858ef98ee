//! Bare namespaces of the kinds that a pod has, made with `unshare`: where a peer's copy of a workload runs.

use std::fs::File;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::lab::{Lab, Netns, served_at, wait_until};
use crate::workload::Workload;

/// Has the root of the host, and of everything mounted below it no more than the lab's directory, devices, and a /proc of
/// its own; then becomes the command. `$1` is the mount point of the root, `$2` the directory, `$3` a log.
const ENTER: &str = r#"
set -e
root=$1 lab=$2 log=$3
shift 3
mount --bind /dev "$root/dev"
mount --bind "$lab" "$root$lab"
mount -t proc proc "$root/proc"
cd "$root"
pivot_root . .
umount -l .
cd /
exec </dev/null >"$log" 2>&1
# What was inherited from whoever started the harness is of another mount namespace.
for file in /proc/self/fd/*; do
  number=${file##*/}
  ((number < 3)) || eval "exec $number>&-"
done
exec setsid "$@"
"#;

/// See the [module](self). What runs in it ends when this is dropped.
#[derive(Debug)]
pub(super) struct Place {
    netns: Arc<Netns>,
    /// What the first process is a child of; gone once the peer has ended it.
    parent: Option<Child>,
    /// The first process, as the host sees it.
    first: Option<Pid>,
    directory: PathBuf,
}

impl Place {
    /// Starts `workload` in one.
    pub(super) fn start(lab: &Lab, workload: &dyn Workload, directory: PathBuf) -> Result<Self> {
        let netns = lab.another_netns()?;
        let root = directory.join("root");
        std::fs::create_dir_all(&root).with_context(|| format!("making {}", root.display()))?;
        // In this mount namespace, too: a peer that starts the copy again looks for its root here.
        mount(Some("/"), &root, None::<&str>, MsFlags::MS_BIND, None::<&str>)
            .with_context(|| format!("mounting the root on {}", root.display()))?;
        let mut place = Self { netns: netns.clone(), parent: None, first: None, directory: directory.clone() };
        let recipe = workload.natively(lab, &directory)?;
        let mut command = Command::new("unshare");
        command.args(["--pid", "--fork", "--kill-child", "--mount", "--ipc", "--uts", "--propagation", "private"]);
        command.args(["--", "bash", "-c", ENTER, "bash"]).args([&*root, lab.directory(), &directory.join("output")]);
        command.args(&recipe.command).envs(recipe.environment).stdin(Stdio::null());
        let errors = File::create(directory.join("errors")).context("making a log")?;
        let mut parent = netns.spawn(command.stdout(errors.try_clone()?).stderr(errors))?;
        let first = wait_until("the first process of a namespace", || {
            let of = parent.id();
            ensure!(parent.try_wait()?.is_none(), "{}", read(&directory.join("errors")));
            child_of(of).context("there is none yet")
        })?;
        place.parent = Some(parent);
        place.first = Some(first);
        let ready = workload.ready_for(&place.netns, place.served_at());
        ready.with_context(|| {
            format!("{} in bare namespaces: {}", workload.name(), read(&place.directory.join("output")))
        })?;
        Ok(place)
    }

    /// Where its workload serves, for who is in [its network](Self::netns).
    pub(super) fn served_at(&self) -> SocketAddr {
        served_at(Ipv4Addr::LOCALHOST)
    }

    pub(super) fn netns(&self) -> &Arc<Netns> {
        &self.netns
    }

    pub(super) fn first(&self) -> Option<Pid> {
        self.first
    }

    pub(super) fn directory(&self) -> &Path {
        &self.directory
    }

    /// The peer has ended everything in it.
    pub(super) fn ended(&mut self) {
        self.first = None;
        if let Some(mut parent) = self.parent.take() {
            let _ = parent.wait();
        }
    }

    /// The peer has started everything again.
    pub(super) fn started(&mut self, first: Pid) {
        self.first = Some(first);
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        // The first process of a PID namespace takes all others with it.
        if let Some(first) = self.first.take() {
            let _ = kill(first, Signal::SIGKILL);
        }
        if let Some(mut parent) = self.parent.take() {
            let _ = parent.wait();
        }
        let gone = wait_until("the end of a peer's processes", || {
            ensure!(self.netns.processes()?.is_empty(), "some are left");
            Ok(())
        });
        if let Err(error) = gone {
            eprintln!("ending what a peer ran: {error:#}");
        }
        match umount2(&self.directory.join("root"), MntFlags::MNT_DETACH) {
            Ok(()) => drop(std::fs::remove_dir_all(&self.directory)),
            // Never remove what is below it: that is the host.
            Err(error) => eprintln!("unmounting a peer's root: {error}"),
        }
    }
}

fn read(path: &Path) -> String {
    std::fs::read_to_string(path).unwrap_or_default().trim().into()
}

/// The only child of a process.
fn child_of(pid: u32) -> Option<Pid> {
    let children = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).ok()?;
    children.split_whitespace().next()?.parse().ok().map(Pid::from_raw)
}
