//! The far ends of a command's standard files: pipes, or a pty of the pod's own devpts. Nothing that a caller of zap's had
//! open is ever among them.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;

use crate::ids::HostPid;
use crate::monitor::frame::Kind;
use crate::sys::{file, tty};

/// What zap holds of a console.
#[derive(Debug)]
pub enum Ends {
    /// Three pipes.
    Pipes {
        /// Where stdin is written; gone once it is closed for good.
        stdin: Option<OwnedFd>,
        /// Where stdout is read.
        stdout: OwnedFd,
        /// Where stderr is read.
        stderr: OwnedFd,
        /// `st_ino` of the three.
        inodes: [u64; 3],
    },
    /// A pty.
    Pty {
        /// Its master.
        master: OwnedFd,
        /// Its slave, held open so that the master outlives moments in which no process of the pod has it open.
        slave: OwnedFd,
    },
}

impl Ends {
    /// Three new pipes: our ends, and stdin, stdout, stderr for the pod.
    pub fn pipes(keep_stdin: bool) -> io::Result<(Ends, [OwnedFd; 3])> {
        let (stdin_read, stdin_write) = io::pipe()?;
        let (stdout, stdout_write) = io::pipe()?;
        let (stderr, stderr_write) = io::pipe()?;
        let inodes = [inode(&stdin_write)?, inode(&stdout)?, inode(&stderr)?];
        let stdin = keep_stdin.then(|| stdin_write.into());
        let ends = Ends::Pipes { stdin, stdout: stdout.into(), stderr: stderr.into(), inodes };
        Ok((ends, [stdin_read.into(), stdout_write.into(), stderr_write.into()]))
    }

    /// A new pty in the devpts of the pod with this PID 1, and its slave three times.
    pub fn pty(init: HostPid) -> io::Result<(Ends, [OwnedFd; 3])> {
        let mut options = File::options();
        options.read(true).write(true).custom_flags(libc::O_NOCTTY);
        let master: OwnedFd = options.open(init.proc("root/dev/pts/ptmx"))?.into();
        tty::unlock(&master)?;
        let ends = Ends::of_master(master)?;
        let Ends::Pty { slave, .. } = &ends else { unreachable!("it was just made") };
        let stdio = [slave.try_clone()?, slave.try_clone()?, slave.try_clone()?];
        Ok((ends, stdio))
    }

    /// The pty of this master.
    pub fn of_master(master: OwnedFd) -> io::Result<Ends> {
        let slave = tty::slave(&master)?;
        Ok(Ends::Pty { master, slave })
    }

    /// The pipes of which these are the far ends; a missing stdin is closed.
    pub fn of_pipes(stdin: Option<OwnedFd>, stdout: OwnedFd, stderr: OwnedFd) -> io::Result<Ends> {
        let stdin_inode = stdin.as_ref().map_or(Ok(0), inode)?;
        let inodes = [stdin_inode, inode(&stdout)?, inode(&stderr)?];
        Ok(Ends::Pipes { stdin, stdout, stderr, inodes })
    }

    /// What PID 1 is to keep copies of, by slot.
    pub fn kept(&self) -> Vec<(i32, BorrowedFd<'_>)> {
        match self {
            Ends::Pipes { stdin, stdout, stderr, .. } => {
                let stdin = stdin.iter().map(|f| (0, f.as_fd()));
                stdin.chain([(1, stdout.as_fd()), (2, stderr.as_fd())]).collect()
            }
            Ends::Pty { master, .. } => vec![(0, master.as_fd())],
        }
    }

    /// The pipe of this kind of output.
    pub fn output(&self, kind: Kind) -> Option<&OwnedFd> {
        match (self, kind) {
            (Ends::Pipes { stdout, .. }, Kind::Output) => Some(stdout),
            (Ends::Pipes { stderr, .. }, Kind::ErrorOutput) => Some(stderr),
            _ => None,
        }
    }

    /// As a checkpoint needs them.
    pub fn look(&self) -> io::Result<crate::look::Console> {
        Ok(match self {
            Ends::Pipes { inodes, .. } => crate::look::Console::Pipes { inodes: *inodes },
            Ends::Pty { master, .. } => {
                crate::look::Console::Pty { index: tty::index(master)?, master: master.try_clone()? }
            }
        })
    }

    /// Copies of all of them but the pipe of stdin.
    pub fn without_stdin(&self) -> io::Result<Ends> {
        Ok(match self {
            Ends::Pipes { stdout, stderr, inodes, .. } => {
                Ends::Pipes { stdin: None, stdout: stdout.try_clone()?, stderr: stderr.try_clone()?, inodes: *inodes }
            }
            Ends::Pty { master, slave } => Ends::Pty { master: master.try_clone()?, slave: slave.try_clone()? },
        })
    }
}

fn inode(file: impl AsFd) -> io::Result<u64> {
    Ok(file::fstat(file)?.st_ino)
}
