//! Ends of ptys: masters and slaves of the pod's own `/dev/pts`, and the console, whose master is the monitor's.

use std::collections::HashMap;
use std::os::fd::{AsFd, OwnedFd};

use serde::{Deserialize, Serialize};

use super::terminal::{self, TerminalState, slave_path};
use super::{Descriptor, FileKind, decoded, pipe, reopen};
use crate::error::{CaptureError, Context, RebuildError};
use crate::ids::FileId;
use crate::image::encode;
use crate::look::{Console, Look};
use crate::rebuild::Rebuild;
use crate::sys::terminal::{self as calls, Ask};

/// An end of a pty.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PtyState {
    /// N of `/dev/pts/N`.
    pub index: u32,
    /// The path it was opened by: `/dev/ptmx`, `/dev/pts/3`, `/dev/tty`.
    #[serde(with = "serde_bytes")]
    pub path: Vec<u8>,
    /// Access mode and status flags.
    pub flags: i32,
    /// Which end.
    pub end: End,
    /// Whether the end is in exclusive mode.
    pub exclusive: bool,
    /// What both ends share; with the master, or with the first slave where the master is the monitor's.
    pub terminal: Option<TerminalState>,
}

/// An end of a pty.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum End {
    /// The end of the program that plays the terminal.
    Master {
        /// Whether what it reads is in packets.
        packets: bool,
    },
    /// The end of the programs that run in it.
    Slave {
        /// Whether it is the pod's console.
        console: bool,
    },
}

pub(super) struct Pty;

/// Major number of the slaves.
const SLAVES: std::ops::RangeInclusive<u32> = 136..=143;

/// The kind of a device number: a master, a slave of that index, or neither.
fn slave_index(device: u64) -> Option<u32> {
    let (major, minor) = (libc::major(device), libc::minor(device));
    SLAVES.contains(&major).then(|| (major - SLAVES.start()) << 20 | minor)
}

fn is_master(descriptor: &Descriptor) -> bool {
    let device = descriptor.stat.st_rdev;
    (libc::major(device), libc::minor(device)) == (5, 2)
}

/// The index of a slave, also of one that was opened as `/dev/tty`.
fn slave(descriptor: &Descriptor) -> Option<u32> {
    let device = descriptor.stat.st_rdev;
    if (libc::major(device), libc::minor(device)) == (5, 0) {
        // The kernel's own encoding of a device number, as user space has it.
        return slave_index(calls::ask(descriptor, Ask::Device).ok()? as u32 as u64);
    }
    slave_index(device)
}

impl FileKind for Pty {
    fn name(&self) -> &'static str {
        "pty"
    }

    fn recognizes(&self, descriptor: &Descriptor) -> bool {
        let character = descriptor.stat.st_mode & libc::S_IFMT == libc::S_IFCHR;
        character && (is_master(descriptor) || slave(descriptor).is_some())
    }

    fn capture(&self, look: &mut Look<'_>, descriptor: &Descriptor) -> Result<Vec<u8>, CaptureError> {
        let object = || descriptor.object();
        let ask = |what| calls::ask(descriptor, what).capturing("asking", object());
        let (index, end, terminal) = if is_master(descriptor) {
            let (index, packets) = (ask(Ask::Index)? as u32, ask(Ask::Packets)? != 0);
            look.first_sight("pty", 0, index.into());
            (index, End::Master { packets }, Some(terminal::capture(look, descriptor, index, descriptor)?))
        } else {
            let index = slave(descriptor).unwrap_or_default();
            let console = matches!(&look.console, Console::Pty { index: n, .. } if *n == index);
            let first = console && look.first_sight("pty", 0, index.into());
            let terminal = match &look.console {
                Console::Pty { master, .. } if first => Some(terminal::capture(look, master, index, descriptor)?),
                _ => None,
            };
            (index, End::Slave { console }, terminal)
        };
        // A slave whose master is gone answers nothing any more.
        let exclusive = calls::ask(descriptor, Ask::Exclusive).is_ok_and(|e| e != 0);
        let flags = crate::sys::descriptor::flags(descriptor).capturing("reading the flags", object())?;
        let path = descriptor.link.clone();
        Ok(encode(&PtyState { index, path, flags, end, exclusive, terminal }))
    }

    fn open(&self, rebuild: &mut Rebuild<'_>, id: FileId, state: &[u8]) -> Result<OwnedFd, RebuildError> {
        let state: PtyState = decoded(state)?;
        let shown = || format!("{id} (pty {})", state.index);
        let ptys = allocate(rebuild, state.index)?;
        let Some(master) = ptys.masters.get(&state.index) else {
            return Err(RebuildError::Damaged(format!("{} is of two kinds", shown())));
        };
        if let Some(terminal) = &state.terminal {
            terminal::restore(master, state.index, terminal).rebuilding("setting up", shown())?;
        }
        match state.end {
            End::Master { packets } => {
                let master = master.try_clone().rebuilding("copying", shown())?;
                calls::set_packets(&master, packets).rebuilding("setting up", shown())?;
                reopen::set_flags(&master, state.flags).rebuilding("setting the flags of", shown())?;
                Ok(master)
            }
            End::Slave { console } => {
                let file = open_slave(master, &state).rebuilding("opening", shown())?;
                if console && rebuild.console_master.is_none() {
                    let master = rebuild.object::<Ptys>("ptys", 0).and_then(|p| p.masters.get(&state.index));
                    let master = master.map(OwnedFd::try_clone).transpose().rebuilding("copying", shown())?;
                    rebuild.console_master = master;
                }
                Ok(file)
            }
        }
    }

    fn connect(&self, rebuild: &mut Rebuild<'_>, id: FileId, state: &[u8]) -> Result<(), RebuildError> {
        let state: PtyState = decoded(state)?;
        if state.exclusive {
            calls::set_exclusive(rebuild.file(id)?).rebuilding("making exclusive", id)?;
        }
        let ptys = rebuild.object::<Ptys>("ptys", 0);
        let master = ptys.and_then(|p| p.masters.get(&state.index));
        if let (Some(master), Some(terminal)) = (master, &state.terminal) {
            terminal.refill(master, state.index).rebuilding("filling", id)?;
            if terminal.locked {
                calls::set_locked(master, true).rebuilding("locking", id)?;
            }
        }
        Ok(())
    }
}

/// The masters made so far, by index; those that nobody asks for go at the end, and their numbers with them.
#[derive(Default)]
struct Ptys {
    masters: HashMap<u32, OwnedFd>,
}

/// Makes the pty of that index: the kernel gives the lowest that is free, so those below are made as well.
fn allocate<'r>(rebuild: &'r mut Rebuild<'_>, index: u32) -> Result<&'r mut Ptys, RebuildError> {
    let ptys: &mut Ptys = rebuild.object_or_default("ptys", 0);
    while !ptys.masters.contains_key(&index) {
        let master = reopen::path("/dev/ptmx", libc::O_RDWR).rebuilding("opening", "/dev/ptmx")?;
        let made = calls::ask(&master, Ask::Index).rebuilding("asking", "a new pty")? as u32;
        if made > index {
            return Err(RebuildError::Lacks(format!("a free pty {index}: /dev/pts/{index} is taken")));
        }
        calls::set_locked(&master, false).rebuilding("unlocking", "a new pty")?;
        ptys.masters.insert(made, master);
    }
    Ok(ptys)
}

fn open_slave(master: &OwnedFd, state: &PtyState) -> std::io::Result<OwnedFd> {
    // One that was not opened by a path shows it, here as in a pipe.
    if state.flags & pipe::LARGE_FILE == 0 {
        return calls::peer(master, state.flags);
    }
    let slave = reopen::path(slave_path(state.index), state.flags)?;
    if state.path != b"/dev/tty" {
        return Ok(slave);
    }
    calls::open_as_controlling(slave.as_fd(), state.flags)
}

#[cfg(test)]
mod tests {
    use nix::mount::{MsFlags, mount};
    use nix::sched::{CloneFlags, unshare};
    use nix::unistd::{read, write};

    use super::*;
    use crate::files::testing::{captured, rebuilt};
    use crate::sys::descriptor;

    /// Runs `work` in a thread with a mount namespace of its own.
    fn apart(work: impl FnOnce() + Send) {
        let work = || {
            unshare(CloneFlags::CLONE_NEWNS).unwrap();
            mount(None::<&str>, "/", None::<&str>, MsFlags::MS_PRIVATE | MsFlags::MS_REC, None::<&str>).unwrap();
            work();
        };
        std::thread::scope(|scope| scope.spawn(work).join()).unwrap();
    }

    /// A `/dev/pts` in which every number is free.
    fn fresh_devpts() {
        let options = Some("newinstance,ptmxmode=0666,mode=0620");
        mount(Some("devpts"), "/dev/pts", Some("devpts"), MsFlags::empty(), options).unwrap();
        mount(Some("/dev/pts/ptmx"), "/dev/ptmx", None::<&str>, MsFlags::MS_BIND, None::<&str>).unwrap();
    }

    fn new_master() -> OwnedFd {
        let master = reopen::path("/dev/ptmx", libc::O_RDWR | libc::O_NONBLOCK).unwrap();
        calls::set_locked(&master, false).unwrap();
        master
    }

    fn text(from: &OwnedFd) -> String {
        let mut bytes = [0; 100];
        let length = read(from, &mut bytes).unwrap();
        String::from_utf8_lossy(&bytes[..length]).into_owned()
    }

    #[test]
    fn both_ends_come_back_under_their_number() {
        apart(|| {
            fresh_devpts();
            let (_other, master) = (new_master(), new_master());
            let slave = reopen::path("/dev/pts/1", libc::O_RDWR).unwrap();
            let tty = calls::open_as_controlling(slave.as_fd(), libc::O_RDONLY).unwrap();
            let mut settings = calls::settings(&slave).unwrap();
            settings.local &= !(libc::ECHO | libc::ICANON);
            calls::set_settings(&slave, &settings).unwrap();
            calls::set_window(&slave, [50, 132, 1, 2]).unwrap();
            calls::set_packets(&master, true).unwrap();
            let captured = captured(&[&slave, &master, &tty], Console::None);
            fresh_devpts();
            let (again, _) = rebuilt(captured);
            assert_eq!(calls::ask(&again[1], Ask::Index).unwrap(), 1);
            assert_eq!(calls::ask(&again[1], Ask::Packets).unwrap(), 1);
            assert_eq!(calls::settings(&again[0]).unwrap(), settings);
            assert_eq!(calls::window(&again[0]).unwrap(), [50, 132, 1, 2]);
            for (old, new) in [&slave, &master, &tty].iter().zip(&again) {
                assert_eq!(descriptor::flags(old).unwrap(), descriptor::flags(new).unwrap());
            }
            calls::set_packets(&again[1], false).unwrap();
            write(&again[1], b"typed").unwrap();
            assert_eq!(text(&again[2]), "typed");
            write(&again[0], b"printed").unwrap();
            assert_eq!(text(&again[1]), "printed");
            // The number below was taken for a moment only.
            assert_eq!(calls::ask(new_master(), Ask::Index).unwrap(), 0);
        });
    }

    /// What is typed and printed waits in the old pty, and in the new.
    fn waits(change: impl Fn(&mut calls::Termios) + Sync, typed: &[u8], lines: &[&str]) {
        apart(|| {
            fresh_devpts();
            let master = new_master();
            let slave = reopen::path("/dev/pts/0", libc::O_RDWR | libc::O_NONBLOCK).unwrap();
            let mut settings = calls::settings(&slave).unwrap();
            settings.local &= !libc::ECHO;
            change(&mut settings);
            calls::set_settings(&slave, &settings).unwrap();
            write(&master, typed).unwrap();
            write(&slave, b"printed\n").unwrap();
            let captured = captured(&[&slave, &master], Console::None);
            fresh_devpts();
            let (again, _) = rebuilt(captured);
            for (slave, master) in [(&slave, &master), (&again[0], &again[1])] {
                assert_eq!(calls::settings(slave).unwrap(), settings);
                assert_eq!(text(master), "printed\r\n");
                for line in lines {
                    assert_eq!(text(slave), *line);
                }
                assert_eq!(read(slave, &mut [0; 9]), Err(nix::Error::EAGAIN));
                // The rest of a line that has been begun.
                write(master, b"!\n").unwrap();
                assert!(text(slave).ends_with("!\n"));
                assert_eq!(read(slave, &mut [0; 9]), Err(nix::Error::EAGAIN));
            }
        });
    }

    #[test]
    fn lines_that_were_typed_ahead_stay_lines() {
        waits(|_| (), b"one\rtwo\n\x04partial", &["one\n", "two\n", ""]);
    }

    #[test]
    fn keys_that_were_typed_ahead_stay_as_they_are() {
        waits(|s| s.local &= !(libc::ICANON | libc::ISIG), b"a\x03\x04b", &["a\x03\x04b"]);
    }

    #[test]
    fn the_master_of_the_console_goes_to_the_monitor() {
        apart(|| {
            fresh_devpts();
            let master = new_master();
            let slave = reopen::path("/dev/pts/0", libc::O_RDWR).unwrap();
            calls::set_window(&slave, [9, 8, 7, 6]).unwrap();
            let captured = captured(&[&slave], Console::Pty { index: 0, master });
            fresh_devpts();
            let (again, master) = rebuilt(captured);
            let master = master.unwrap();
            assert_eq!(calls::window(&master).unwrap(), [9, 8, 7, 6]);
            write(&again[0], b"prompt").unwrap();
            assert_eq!(text(&master), "prompt");
        });
    }

    #[test]
    fn a_slave_whose_master_is_gone_is_hung_up() {
        apart(|| {
            fresh_devpts();
            let master = new_master();
            let slave = reopen::path("/dev/pts/0", libc::O_RDWR).unwrap();
            drop(master);
            let captured = captured(&[&slave], Console::None);
            fresh_devpts();
            let (again, _) = rebuilt(captured);
            crate::files::testing::wait_for_hangup(&again[0]);
            assert_eq!(write(&again[0], b"x").unwrap_err(), nix::Error::EIO);
        });
    }
}
