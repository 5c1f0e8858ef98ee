//! From PID 1 to a command of the pod's.

use std::ffi::CString;
use std::fs::File;
use std::io::{self, Read, Seek, Write};
use std::os::fd::{AsRawFd, IntoRawFd, OwnedFd};
use std::path::Path;

use nix::errno::Errno;
use nix::unistd::{Gid, Uid};

use super::message::{Command, SpawnFailure};
use super::users;
use crate::pod::seccomp;
use crate::sys::namespace::{self, Side};
use crate::sys::{capability, exec, tty};

/// Forks a child for the command in the first file. The PID, or the error number.
pub(super) fn spawn(files: Vec<OwnedFd>, terminal: bool) -> Result<i32, i32> {
    let [request, failure, stdio @ ..] = &files[..] else { return Err(libc::EINVAL) };
    match namespace::fork() {
        Ok(Side::Parent(pid)) => Ok(pid),
        Ok(Side::Child) => {
            let Err(error) = become_command(request, stdio, terminal);
            if let Ok(mut pipe) = failure.try_clone().map(File::from) {
                let _ = pipe.write_all(&crate::image::encode(&error));
            }
            namespace::exit_now(match error {
                SpawnFailure::Exec(libc::ENOENT) => 127,
                _ => 126,
            })
        }
        Err(e) => Err(e.raw_os_error().unwrap_or(libc::EIO)),
    }
}

/// Gives a forked child exactly these files, from descriptor 3 on, beside the null device as stdio.
pub(super) fn keep_files(files: Vec<OwnedFd>) -> io::Result<Vec<OwnedFd>> {
    let count = files.len() as i32;
    let above = 3 + count + files.iter().map(AsRawFd::as_raw_fd).max().unwrap_or(0);
    let mut moved = Vec::new();
    for file in files {
        moved.push(nix::fcntl::fcntl(&file, nix::fcntl::FcntlArg::F_DUPFD(above))?);
        // Not closed here: its number is about to be somebody else's.
        let _ = file.into_raw_fd();
    }
    for (from, to) in moved.iter().zip(3..) {
        exec::duplicate_to(*from, to)?;
    }
    exec::close_from(3 + count as u32)?;
    (3..3 + count).map(exec::inherited).collect()
}

fn before(what: impl std::fmt::Display) -> impl FnOnce(io::Error) -> SpawnFailure {
    let what = what.to_string();
    move |e| SpawnFailure::Before(format!("{what}: {e}"))
}

fn become_command(
    request: &OwnedFd,
    stdio: &[OwnedFd],
    terminal: bool,
) -> Result<std::convert::Infallible, SpawnFailure> {
    let command = read_command(request).map_err(before("reading the command"))?;
    exec::reset_signals().map_err(before("resetting signals"))?;
    nix::unistd::setsid().map_err(io::Error::from).map_err(before("making a session"))?;
    for (file, number) in stdio.iter().zip(0..3) {
        exec::duplicate_to(file.as_raw_fd(), number).map_err(before("setting stdio"))?;
    }
    exec::close_on_exec_from(3).map_err(before("closing files"))?;
    if terminal {
        tty::take_control(0).map_err(before("taking the terminal"))?;
    }
    let user = users::find(command.user.as_deref()).map_err(SpawnFailure::Before)?;
    let environment = environment(&command, &user.home, terminal);
    if terminal {
        // As login does: the terminal is the user's.
        let _ = nix::unistd::fchown(io::stdin(), Some(Uid::from_raw(user.uid)), None);
    }
    become_user(&command, &user)?;
    nix::unistd::chdir(&command.workdir)
        .map_err(io::Error::from)
        .map_err(before(format!("working directory {}", command.workdir.display())))?;
    Err(SpawnFailure::Exec(execute(&command, &environment) as i32))
}

fn read_command(request: &OwnedFd) -> io::Result<Command> {
    let mut file = File::from(request.try_clone()?);
    let mut bytes = Vec::new();
    file.rewind()?;
    file.read_to_end(&mut bytes)?;
    crate::image::decode(&bytes).map_err(io::Error::other)
}

/// User, groups, filter, capabilities, in the one order that works: the filter needs CAP_SYS_ADMIN (so that set-user-ID
/// programs go on working), dropping needs CAP_SETPCAP, and a change of user would take both away.
fn become_user(command: &Command, user: &users::User) -> Result<(), SpawnFailure> {
    let io_error = io::Error::from;
    let groups: Vec<Gid> = user.groups.iter().map(|g| Gid::from_raw(*g)).collect();
    nix::unistd::setgroups(&groups).map_err(io_error).map_err(before("setting groups"))?;
    let (uid, gid) = (Uid::from_raw(user.uid), Gid::from_raw(user.gid));
    nix::unistd::setresgid(gid, gid, gid).map_err(io_error).map_err(before("setting the group"))?;
    nix::sys::prctl::set_keepcaps(true).map_err(io_error).map_err(before("keeping capabilities"))?;
    nix::unistd::setresuid(uid, uid, uid).map_err(io_error).map_err(before("setting the user"))?;
    capability::raise().map_err(before("raising capabilities"))?;
    let filter =
        seccomp::filter(&command.seccomp, &command.capabilities).map_err(|e| SpawnFailure::Before(e.to_string()))?;
    if let Some(filter) = filter {
        filter.install().map_err(before("installing the seccomp filter"))?;
    }
    let set = command.capabilities.iter().fold(0u64, |set, n| set | 1 << n);
    capability::confine(set).map_err(before("dropping capabilities"))
}

const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// What was asked for, and what every program expects.
fn environment(command: &Command, home: &str, terminal: bool) -> Vec<String> {
    let mut environment = command.environment.clone();
    let mut default = |key: &str, value: &str| {
        if !environment.iter().any(|e| e.split('=').next() == Some(key)) {
            environment.push(format!("{key}={value}"));
        }
    };
    default("PATH", PATH);
    default("HOME", home);
    if let Some(name) = nix::unistd::gethostname().ok().and_then(|n| n.into_string().ok()) {
        default("HOSTNAME", &name);
    }
    if terminal {
        default("TERM", "xterm");
    }
    environment
}

/// Executes the command, looked for along its own PATH; returns why that failed.
fn execute(command: &Command, environment: &[String]) -> Errno {
    let strings = |list: &[String]| list.iter().map(|s| CString::new(s.as_str())).collect::<Result<Vec<_>, _>>();
    let (Ok(args), Ok(env)) = (strings(&command.argv), strings(environment)) else { return Errno::EINVAL };
    let Some(program) = command.argv.first() else { return Errno::ENOENT };
    let path = environment.iter().rev().find_map(|e| e.strip_prefix("PATH=")).unwrap_or(PATH);
    let candidates: Vec<String> = match program.contains('/') {
        true => vec![program.clone()],
        false => path.split(':').map(|dir| Path::new(dir).join(program).to_string_lossy().into_owned()).collect(),
    };
    let mut reason = Errno::ENOENT;
    for candidate in candidates {
        let Ok(candidate) = CString::new(candidate) else { return Errno::EINVAL };
        let Err(error) = nix::unistd::execve(&candidate, &args, &env);
        match error {
            // Another directory may have it.
            Errno::ENOENT | Errno::ENOTDIR => {}
            Errno::EACCES => reason = error,
            _ => return error,
        }
    }
    reason
}
