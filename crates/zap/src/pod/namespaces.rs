//! The namespaces of a pod, and the two processes that it takes to make them.

use std::cell::Cell;
use std::fs::{self, File};
use std::io::{self, Read, Seek, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use nix::sys::memfd::{MFdFlags, memfd_create};
use serde::{Deserialize, Serialize};

use crate::ids::HostPid;
use crate::pod::init::{self, Setup};
use crate::pod::live::ClockOffsets;
use crate::pod::rootfs::Plan;
use crate::sys::channel;
use crate::sys::namespace::{self, Side};

/// Which namespaces every pod has of its own; the network's depends on its mode, cgroup and time come by other ways.
const ALWAYS: i32 = libc::CLONE_NEWPID | libc::CLONE_NEWNS | libc::CLONE_NEWIPC | libc::CLONE_NEWUTS;

/// The network namespace of a pod, made before it is known whether it gets one: that takes as long as reading an image.
struct Ahead {
    /// The host's.
    network: File,
}

impl Ahead {
    fn make() -> Result<Ahead, (usize, io::Error)> {
        let network = File::open("/proc/self/ns/net").map_err(|e| (2, e))?;
        namespace::unshare(libc::CLONE_NEWNET).map_err(|e| (2, e))?;
        Ok(Ahead { network })
    }
}

/// A process that waits to make the namespaces of a pod.
///
/// A time namespace takes its offsets only while nobody is in it, and only a child of whoever made it gets in. So this
/// one makes it, sets it, clones PID 1 as its own sibling, and ends. PID 1 has its memory: a restart forks it before it
/// reads an image.
pub struct Shim {
    pid: i32,
    socket: OwnedFd,
    ended: Cell<bool>,
}

impl Shim {
    /// Forks it. The caller must be its process's only thread.
    pub fn fork() -> io::Result<Shim> {
        let (socket, theirs) = channel::message_pair()?;
        match namespace::fork()? {
            Side::Parent(pid) => Ok(Shim { pid, socket, ended: Cell::new(false) }),
            Side::Child => {
                drop(socket);
                let ahead = Ahead::make();
                let Ok((order, files)) = hear(&theirs) else { namespace::exit_now(0) };
                let words = match ahead.and_then(|ahead| shim(&order, &files, ahead)) {
                    Ok(pid) => [0, pid],
                    Err((step, e)) => [step as i32 + 1, e.raw_os_error().unwrap_or(libc::EIO)],
                };
                let bytes: Vec<u8> = words.iter().flat_map(|w| w.to_ne_bytes()).collect();
                let _ = channel::send(&theirs, &bytes, &[], true);
                namespace::exit_now(0)
            }
        }
    }

    /// Starts PID 1 of a pod as a child of the caller, in new namespaces and in that cgroup and
    /// those that the doors lead to. Can be done once.
    pub(super) fn start_init(
        &self,
        setup: &Setup<'_>,
        clocks: ClockOffsets,
        own_network: bool,
        cgroup: &OwnedFd,
        doors: &[File],
    ) -> Result<HostPid, (&'static str, io::Error)> {
        let order = Order {
            plan: setup.plan.clone(),
            hostname: setup.hostname.to_owned(),
            clocks: (clocks.monotonic, clocks.boottime),
            own_network,
        };
        let answer = self.ask(&order, setup, cgroup, doors).map_err(|e| ("making its namespaces", e));
        self.wait();
        match answer? {
            [0, pid] => Ok(HostPid(pid)),
            [step, error] => {
                Err((STEPS[(step as usize - 1).min(STEPS.len() - 1)], io::Error::from_raw_os_error(error)))
            }
        }
    }

    fn ask(&self, order: &Order, setup: &Setup<'_>, cgroup: &OwnedFd, doors: &[File]) -> io::Result<[i32; 2]> {
        let mut memory = File::from(memfd_create(c"pod", MFdFlags::MFD_CLOEXEC)?);
        // A path of the host's that is not text is the one thing that could go wrong.
        ciborium::into_writer(order, &mut memory).map_err(io::Error::other)?;
        let mut files = vec![memory.as_fd(), setup.control.as_fd(), setup.monitor_end.as_fd(), cgroup.as_fd()];
        files.extend(doors.iter().map(AsFd::as_fd));
        channel::send(&self.socket, b"pod", &files, true)?;
        let mut bytes = [0; 8];
        match channel::receive(&self.socket, &mut bytes)?.0 {
            8 => {
                let word = |at: usize| i32::from_ne_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
                Ok([word(0), word(4)])
            }
            _ => Err(io::ErrorKind::UnexpectedEof.into()),
        }
    }

    fn wait(&self) {
        if !self.ended.replace(true) {
            let _ = nix::sys::wait::waitpid(nix::unistd::Pid::from_raw(self.pid), None);
        }
    }
}

impl Shim {
    /// One that was not needed ends when nobody can ask it any more.
    pub(super) fn dismiss(&self) {
        let _ = nix::sys::socket::shutdown(self.socket.as_raw_fd(), nix::sys::socket::Shutdown::Both);
        self.wait();
    }
}

impl Drop for Shim {
    fn drop(&mut self) {
        self.dismiss();
    }
}

/// What a shim is asked for.
#[derive(Serialize, Deserialize)]
struct Order {
    plan: Plan,
    hostname: String,
    /// Offsets of the monotonic clock and the boot-time clock.
    clocks: (i64, i64),
    own_network: bool,
}

/// What comes with an order.
struct Files {
    control: OwnedFd,
    monitor_end: OwnedFd,
    cgroup: OwnedFd,
    /// To groups of version 1.
    doors: Vec<File>,
}

fn hear(socket: &OwnedFd) -> io::Result<(Order, Files)> {
    let (_, files) = channel::receive(socket, &mut [0; 8])?;
    let mut files = files.into_iter();
    let mut next = || files.next().ok_or(io::ErrorKind::UnexpectedEof);
    let (memory, control, monitor_end, cgroup) = (next()?, next()?, next()?, next()?);
    let mut bytes = Vec::new();
    let mut memory = File::from(memory);
    memory.rewind()?;
    memory.read_to_end(&mut bytes)?;
    let files = Files { control, monitor_end, cgroup, doors: files.map(File::from).collect() };
    Ok((crate::image::decode(&bytes).map_err(io::Error::other)?, files))
}

const STEPS: [&str; 4] =
    ["making a time namespace", "setting its clocks", "making its namespaces", "joining its control groups"];

fn shim(order: &Order, files: &Files, ahead: Ahead) -> Result<i32, (usize, io::Error)> {
    let Files { control, monitor_end, cgroup, doors } = files;
    let clocks = ClockOffsets { monotonic: order.clocks.0, boottime: order.clocks.1 };
    namespace::unshare(libc::CLONE_NEWTIME).map_err(|e| (0, e))?;
    fs::write("/proc/self/timens_offsets", clock_lines(clocks)).map_err(|e| (1, e))?;
    if !order.own_network {
        nix::sched::setns(&ahead.network, nix::sched::CloneFlags::CLONE_NEWNET).map_err(|e| (2, e.into()))?;
    }
    drop(ahead);
    // What it clones is where it is itself.
    doors.iter().try_for_each(|mut door| door.write_all(b"0")).map_err(|e| (3, e))?;
    match namespace::clone_sibling(ALWAYS, cgroup.as_fd()).map_err(|e| (2, e))? {
        Side::Parent(pid) => Ok(pid),
        Side::Child => init::run(&Setup { control, monitor_end, plan: &order.plan, hostname: &order.hostname }),
    }
}

/// The kernel wants whole seconds, which may be negative, and nanoseconds, which may not.
fn clock_lines(clocks: ClockOffsets) -> String {
    const SECOND: i64 = 1_000_000_000;
    let line =
        |name: &str, offset: i64| format!("{name} {} {}\n", offset.div_euclid(SECOND), offset.rem_euclid(SECOND));
    line("monotonic", clocks.monotonic) + &line("boottime", clocks.boottime)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn offsets_are_written_as_the_kernel_wants_them() {
        let clocks = ClockOffsets { monotonic: -1, boottime: 2_500_000_000 };
        assert_eq!(clock_lines(clocks), "monotonic -1 999999999\nboottime 2 500000000\n");
    }
}
