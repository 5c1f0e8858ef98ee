//! The first program of a guest, and the one that serves commands there.

use std::fs::{self, File};
use std::net::{Ipv4Addr, TcpListener};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use nix::mount::{MsFlags, mount};
use nix::sys::wait::wait;

use super::command;

/// Tag of the host's root.
pub(super) const ROOT: &str = "root";
/// What the kernel is told: `zap.control=ADDRESS/LENGTH`.
pub(super) const CONTROL: &str = "zap.control=";

/// What there is below the root.
const MOUNTS: [(&str, &str, &str); 6] = [
    ("tmpfs", "run", "mode=755"),
    ("tmpfs", "tmp", "mode=1777"),
    ("cgroup2", "sys/fs/cgroup", ""),
    ("devpts", "dev/pts", "ptmxmode=0666,mode=0620"),
    ("tmpfs", "dev/shm", "mode=1777"),
    ("mqueue", "dev/mqueue", ""),
];

fn mounted(kind: &str, on: &str, options: &str) -> Result<()> {
    fs::create_dir_all(on).with_context(|| format!("making {on}"))?;
    mount(Some(kind), on, Some(kind), MsFlags::empty(), Some(options))
        .with_context(|| format!("mounting {kind} on {on}"))
}

/// What PID 1 of a guest does: gives it a root, starts the server, and reaps for ever.
pub fn be_init() -> Result<()> {
    for (kind, on) in [("proc", "/proc"), ("sysfs", "/sys"), ("devtmpfs", "/dev")] {
        mounted(kind, on, "")?;
    }
    load_modules()?;
    let source = Some(ROOT);
    mount(source, "/lower", Some("virtiofs"), MsFlags::MS_RDONLY, None::<&str>).context("mounting the host's root")?;
    mounted("tmpfs", "/upper", "")?;
    ["/upper/files", "/upper/work"].into_iter().try_for_each(fs::create_dir).context("making layers")?;
    mounted("overlay", "/root", "lowerdir=/lower,upperdir=/upper/files,workdir=/upper/work")?;
    for from in ["proc", "sys", "dev"] {
        let (from, to) = (format!("/{from}"), format!("/root/{from}"));
        mount(Some(&*from), &*to, None::<&str>, MsFlags::MS_MOVE, None::<&str>)
            .with_context(|| format!("moving {from}"))?;
    }
    std::env::set_current_dir("/root").context("entering the root")?;
    mount(Some("."), "/", None::<&str>, MsFlags::MS_MOVE, None::<&str>).context("moving the root")?;
    nix::unistd::chroot(".").context("changing the root")?;
    for (kind, on, options) in MOUNTS {
        mounted(kind, &format!("/{on}"), options)?;
    }
    let mut server = Command::new("/proc/self/exe");
    server.arg0("zap-server").arg("serve").env_clear().current_dir("/");
    server.env("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin").env("HOME", "/root");
    server.spawn().context("starting the server")?;
    loop {
        wait().context("waiting for a child")?;
    }
}

fn load_modules() -> Result<()> {
    let mut modules: Vec<_> =
        fs::read_dir("/modules")?.map(|entry| Ok(entry?.path())).collect::<std::io::Result<_>>()?;
    modules.sort();
    for path in modules {
        crate::sys::load_module(&File::open(&path)?).with_context(|| format!("loading {}", path.display()))?;
    }
    Ok(())
}

/// What the server of a guest does: brings its network up, and serves whoever calls.
pub fn be_server() -> Result<()> {
    let line = fs::read_to_string("/proc/cmdline").context("reading the kernel's arguments")?;
    let control = line.split_whitespace().find_map(|word| word.strip_prefix(CONTROL));
    let control = control.context("the kernel was not told an address")?;
    ip("link set lo up")?;
    ip(&format!("address add {control} dev eth0"))?;
    ip("link set eth0 up")?;
    if Path::new("/sys/class/net/eth1").exists() {
        ip("link set eth1 up")?;
    }
    let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, command::PORT)).context("listening")?;
    command::serve(&listener)
}

fn ip(line: &str) -> Result<()> {
    let output = Command::new("ip").args(line.split(' ')).output().context("running ip")?;
    ensure!(output.status.success(), "ip {line}: {}", String::from_utf8_lossy(&output.stderr).trim());
    Ok(())
}
