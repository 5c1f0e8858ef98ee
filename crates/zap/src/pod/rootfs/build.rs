//! Mounting it all, in the pod's new mount namespace, by its PID 1.

use std::ffi::{CStr, CString};
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use super::{Overlay, Plan, devices};
use crate::pod::Bind;
use crate::sys::mount::{self, NO_DEV, NO_EXEC, NO_SUID, READ_ONLY};

/// What could not be mounted.
#[derive(Debug, thiserror::Error)]
#[error("mounting {what}: {source}")]
pub struct BuildError {
    /// What: a path, as the pod names it.
    pub what: String,
    /// What the kernel said.
    pub source: io::Error,
}

trait What<T> {
    fn what(self, what: impl std::fmt::Display) -> Result<T, BuildError>;
}

impl<T, E: Into<io::Error>> What<T> for Result<T, E> {
    fn what(self, what: impl std::fmt::Display) -> Result<T, BuildError> {
        self.map_err(|e| BuildError { what: what.to_string(), source: e.into() })
    }
}

/// Mounts what the plan says, and makes it the root of the caller.
pub fn build(plan: &Plan) -> Result<(), BuildError> {
    mount::make_all_private().what("/")?;
    // Everything of the host's is opened before its tree is out of reach.
    let root = overlay_mount(&plan.overlays[0]).what("/")?;
    let mut others = Vec::new();
    for overlay in &plan.overlays[1..] {
        // Some file systems (with case folding, say) cannot be below an overlay; the pod sees those read-only.
        let mounted = overlay_mount(overlay).or_else(|_| bind_mount(&overlay.lower, false, true));
        others.push((mounted.what(overlay.target.display())?, overlay.target.clone()));
    }
    for bind in &plan.read_only {
        others.push((bind_mount(&bind.source, false, true).what(bind.target.display())?, bind.target.clone()));
    }
    let binds = open_binds(&plan.binds)?;
    others.sort_by(|a, b| a.1.cmp(&b.1));

    mount::attach(&root, &plan.mount_point).what("/")?;
    nix::unistd::chdir(&plan.mount_point).what("/")?;
    mount::pivot_here().what("/")?;
    for (mounted, target) in others {
        mount::attach(&mounted, &target).what(target.display())?;
    }
    system_directories(plan)?;
    for mask in &plan.masks {
        hide_directory(mask)?;
    }
    attach_binds(binds)?;
    write_names(plan);
    Ok(())
}

fn overlay_mount(overlay: &Overlay) -> io::Result<OwnedFd> {
    // By descriptor: a path may hold characters that separate options, and the pod can read the options.
    let open = |path: &Path| File::options().read(true).open(path);
    let (lower, upper, work) = (open(&overlay.lower)?, open(&overlay.upper)?, open(&overlay.work)?);
    let name = |file: &File| CString::new(format!("/proc/self/fd/{}", file.as_raw_fd())).expect("no NUL in a number");
    mount::new_mount(
        c"overlay",
        &[
            (c"source", Some(c"overlay")),
            (c"lowerdir", Some(&name(&lower))),
            (c"upperdir", Some(&name(&upper))),
            (c"workdir", Some(&name(&work))),
            // Renaming a directory of the lower layer works; nothing refers to the lower layer by inode, so that the
            // upper one can travel.
            (c"redirect_dir", Some(c"on")),
            (c"index", Some(c"off")),
            (c"metacopy", Some(c"off")),
            // Unmounting would otherwise write out all that the host's file system has in memory, whoever wrote it. A pod
            // does not outlive a crash of its host, so there is nothing to write it out for.
            (c"volatile", None),
        ],
        0,
    )
}

fn bind_mount(source: &Path, recursive: bool, read_only: bool) -> io::Result<OwnedFd> {
    let mounted = mount::copy_mount(source, recursive)?;
    if read_only {
        mount::set_attributes(mounted.as_fd(), READ_ONLY, recursive)?;
    }
    Ok(mounted)
}

struct OpenBind {
    mounted: OwnedFd,
    target: PathBuf,
    directory: bool,
}

fn open_binds(binds: &[Bind]) -> Result<Vec<OpenBind>, BuildError> {
    let open = |bind: &Bind| {
        let mounted = bind_mount(&bind.source, true, bind.read_only).what(bind.source.display())?;
        let directory = fs::metadata(&bind.source).what(bind.source.display())?.is_dir();
        Ok(OpenBind { mounted, target: bind.target.clone(), directory })
    };
    binds.iter().map(open).collect()
}

fn attach_binds(binds: Vec<OpenBind>) -> Result<(), BuildError> {
    for bind in binds {
        let shown = &bind.target.display();
        let parent = if bind.directory { Some(bind.target.as_path()) } else { bind.target.parent() };
        fs::create_dir_all(parent.unwrap_or(Path::new("/"))).what(shown)?;
        if !bind.directory && !bind.target.exists() {
            File::create(&bind.target).what(shown)?;
        }
        mount::attach(&bind.mounted, &bind.target).what(bind.target.display())?;
    }
    Ok(())
}

pub(super) fn fresh(
    kind: &CStr,
    target: &str,
    options: &[(&CStr, Option<&CStr>)],
    attributes: u64,
) -> Result<(), BuildError> {
    fs::create_dir_all(target).what(target)?;
    let mounted = mount::new_mount(kind, options, attributes).what(target)?;
    mount::attach(mounted, Path::new(target)).what(target)
}

fn system_directories(plan: &Plan) -> Result<(), BuildError> {
    let safe = NO_SUID | NO_DEV | NO_EXEC;
    devices::populate(plan.tty)?;
    fresh(c"proc", "/proc", &[(c"source", Some(c"proc"))], safe)?;
    if let Some(pid) = plan.last_pid {
        let path = "/proc/sys/kernel/ns_last_pid";
        fs::write(path, pid.to_string()).what(path)?;
    }
    protect_proc()?;
    fresh(c"sysfs", "/sys", &[(c"source", Some(c"sysfs"))], safe | READ_ONLY)?;
    if Path::new("/sys/fs/cgroup").is_dir() {
        let options = [(c"source", Some(c"cgroup2"))];
        let mounted = mount::new_mount(c"cgroup2", &options, safe | READ_ONLY).what("/sys/fs/cgroup")?;
        mount::attach(mounted, Path::new("/sys/fs/cgroup")).what("/sys/fs/cgroup")?;
    }
    hide_if_there(&["/sys/firmware", "/sys/kernel/debug", "/sys/kernel/tracing", "/sys/kernel/security"])?;
    let tmpfs = |mode| [(c"source", Some(c"tmpfs")), (c"mode", Some(mode))];
    fresh(c"tmpfs", "/tmp", &tmpfs(c"1777"), NO_SUID | NO_DEV)?;
    fresh(c"tmpfs", "/run", &tmpfs(c"755"), NO_SUID | NO_DEV)?;
    fs::create_dir("/run/lock").and_then(|()| chmod("/run/lock", 0o1777)).what("/run/lock")
}

pub(super) fn chmod(path: &str, mode: u32) -> io::Result<()> {
    fs::set_permissions(path, std::os::unix::fs::PermissionsExt::from_mode(mode))
}

/// What `/proc` shows of the whole machine is hidden, or cannot be written to.
fn protect_proc() -> Result<(), BuildError> {
    let own_sysctls = bind_mount(Path::new("/proc/sys/net"), false, false);
    for path in ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"] {
        if Path::new(path).exists() {
            let mounted = bind_mount(Path::new(path), true, true).what(path)?;
            mount::attach(mounted, Path::new(path)).what(path)?;
        }
    }
    if let Ok(net) = own_sysctls {
        // These belong to the pod's own network namespace.
        mount::attach(net, Path::new("/proc/sys/net")).what("/proc/sys/net")?;
    }
    hide_if_there(&[
        "/proc/acpi",
        "/proc/asound",
        "/proc/kcore",
        "/proc/keys",
        "/proc/kmsg",
        "/proc/kpagecgroup",
        "/proc/kpagecount",
        "/proc/kpageflags",
        "/proc/latency_stats",
        "/proc/sched_debug",
        "/proc/scsi",
        "/proc/timer_list",
        "/proc/timer_stats",
    ])
}

fn hide_if_there(paths: &[&str]) -> Result<(), BuildError> {
    for path in paths.iter().map(Path::new) {
        match fs::symlink_metadata(path) {
            Ok(meta) if meta.is_dir() => hide_directory(path)?,
            Ok(_) => {
                let null = bind_mount(Path::new("/dev/null"), false, true);
                mount::attach(null.what(path.display())?, path).what(path.display())?;
            }
            Err(_) => {}
        }
    }
    Ok(())
}

/// Covers a directory, if it is there, with an empty one that cannot be written to.
fn hide_directory(path: &Path) -> Result<(), BuildError> {
    if !path.is_dir() {
        return Ok(());
    }
    let options = [(c"source", Some(c"tmpfs")), (c"mode", Some(c"555")), (c"size", Some(c"0"))];
    let attributes = READ_ONLY | NO_SUID | NO_DEV | NO_EXEC;
    let mounted = mount::new_mount(c"tmpfs", &options, attributes).what(path.display())?;
    mount::attach(mounted, path).what(path.display())
}

/// Best effort: a root without `/etc` has no use for these files.
fn write_names(plan: &Plan) {
    let Some(names) = &plan.names else { return };
    if !Path::new("/etc").is_dir() {
        return;
    }
    let _ = fs::write("/etc/hostname", format!("{}\n", names.hostname));
    let mut hosts = fs::read_to_string("/etc/hosts").unwrap_or_else(|_| "127.0.0.1\tlocalhost\n".to_owned());
    if !hosts.ends_with('\n') {
        hosts.push('\n');
    }
    hosts.push_str(&format!("127.0.1.1\t{}\n", names.hostname));
    let _ = fs::write("/etc/hosts", hosts);
    if let Some((path, contents)) = &names.resolver {
        let _ = path.parent().map_or(Ok(()), fs::create_dir_all).and_then(|()| fs::write(path, contents));
    }
}
