//! What `status` tells of a pod's threads. The file takes the kernel longer than everything else that is asked of a thread:
//! it is opened while the pod runs, and of most threads it is read then, for what it says of them cannot change any more
//! without showing elsewhere.

use std::collections::HashMap;
use std::fs::File;
use std::io;

use crate::ids::HostPid;
use crate::parallel;
use crate::process::credentials::{self, CredentialsState};
use crate::process::discover::{self, Population};
use crate::process::proc_files::Status;
use crate::procfs;
use crate::sys::pidfd::PidFd;
use crate::sys::{capability, ptrace};

/// Files opened at most: the others are opened when they are read.
const MOST: usize = 4096;

/// What is known, by thread.
#[derive(Debug, Default)]
pub struct Statuses(HashMap<HostPid, Known>);

#[derive(Debug)]
enum Known {
    /// Nothing yet.
    Opened(File),
    /// Boxed, for there are many.
    Powerless(Box<Powerless>),
}

/// A thread beside its process's first that had no permitted capability. It gets none by anything but `execve`, which it
/// would not survive as this thread, or a new user namespace, which is for processes of one thread. Without them its
/// groups, its bounding and its ambient set stay what they are.
#[derive(Debug)]
struct Powerless {
    thread: PidFd,
    facts: Facts,
}

/// What `status` tells of a thread, as far as it is needed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Facts {
    /// Its numbers in each PID namespace, from ours inwards.
    pub numbers: Vec<i32>,
    /// Its credentials, but for the securebits.
    pub credentials: CredentialsState,
    /// How many seccomp filters apply.
    pub filters: u32,
    /// Whether it may only read, write and end.
    pub strict: bool,
    /// Whether it is known to have no signals of its own queued.
    pub has_none_queued: bool,
}

/// What the thread itself said: the results of `PR_GET_NO_NEW_PRIVS` and `PR_GET_SECCOMP`.
#[derive(Clone, Copy, Debug)]
pub struct Said {
    /// Whether no program gives it privileges.
    pub no_new_privs: i64,
    /// 0 without filters, 1 if it is strict, 2 with filters.
    pub seccomp: i64,
}

impl Facts {
    fn of(status: &Status) -> Facts {
        Facts {
            numbers: status.namespace_pids(),
            credentials: credentials::of_status(status),
            filters: status.field("Seccomp_filters").and_then(|n| n.parse().ok()).unwrap_or(0),
            strict: status.field("Seccomp") == Some("1"),
            has_none_queued: status.mask("SigPnd") == 0,
        }
    }

    /// Its numbers in the last so many PID namespaces.
    pub fn inner(&self, level: usize) -> Vec<i32> {
        self.numbers[self.numbers.len().saturating_sub(level)..].to_vec()
    }
}

impl Statuses {
    /// Looks at every thread that there is.
    pub fn look_ahead(population: &Population) -> Statuses {
        let hosts = population.live.iter().map(|found| found.subject.host);
        let threads = hosts.flat_map(|host| discover::thread_numbers(host).into_iter().map(move |tid| (host, tid)));
        let known = |(process, thread): (HostPid, HostPid)| Some((thread, Known::of(process, thread)?));
        Statuses(parallel::map(threads.take(MOST).collect(), known).into_iter().flatten().collect())
    }

    /// What is true of a thread, which is held.
    pub fn of(&self, process: HostPid, thread: HostPid, said: Said) -> io::Result<Facts> {
        let read_anew = || procfs::read_record(path(process, thread));
        let bytes = match self.0.get(&thread) {
            Some(Known::Powerless(known)) => match known.now(thread, said) {
                Some(facts) => return Ok(facts),
                None => read_anew()?,
            },
            // The number may be another thread's by now: what was opened then tells nothing any more.
            Some(Known::Opened(file)) => procfs::reread_record(file).or_else(|_| read_anew())?,
            None => read_anew()?,
        };
        Ok(Facts::of(&Status::new(bytes)))
    }
}

impl Known {
    fn of(process: HostPid, thread: HostPid) -> Option<Known> {
        let file = File::open(path(process, thread)).ok()?;
        if process == thread {
            return Some(Known::Opened(file));
        }
        // The handle first: what is read afterwards is of the thread that it is on, if that lives when it is asked.
        let Ok(handle) = PidFd::of_thread(thread) else { return Some(Known::Opened(file)) };
        let facts = Facts::of(&Status::new(procfs::reread_record(&file).ok()?));
        let [_, permitted, ..] = facts.credentials.capabilities;
        let can_tell = permitted == 0 && !facts.strict && handle.identities().is_ok();
        Some(if can_tell {
            Known::Powerless(Box::new(Powerless { thread: handle, facts }))
        } else {
            Known::Opened(file)
        })
    }
}

impl Powerless {
    /// What is true now, if that can be told.
    fn now(&self, thread: HostPid, said: Said) -> Option<Facts> {
        let ids = self.thread.identities().ok()?;
        let [effective, permitted, inheritable] = capability::of(thread).ok()?;
        // Filters are never taken away: there are as many as there were if there is none behind them.
        let filters_known = match (said.seccomp, self.facts.filters) {
            (0, 0) => true,
            (2, known) => !ptrace::has_seccomp_filter(thread, known as usize).ok()?,
            _ => false,
        };
        if permitted != 0 || said.no_new_privs < 0 || !filters_known {
            return None;
        }
        let before = &self.facts.credentials;
        let [_, _, _, bounding, ambient] = before.capabilities;
        let credentials = CredentialsState {
            uids: [ids.real.0, ids.effective.0, ids.saved.0, ids.file.0],
            gids: [ids.real.1, ids.effective.1, ids.saved.1, ids.file.1],
            capabilities: [inheritable, permitted, effective, bounding, ambient],
            no_new_privs: said.no_new_privs == 1,
            ..before.clone()
        };
        Some(Facts { credentials, has_none_queued: false, ..self.facts.clone() })
    }
}

fn path(process: HostPid, thread: HostPid) -> String {
    format!("/proc/{process}/task/{thread}/status")
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    const SAID: Said = Said { no_new_privs: 0, seccomp: 0 };

    fn own() -> HostPid {
        HostPid(std::process::id() as i32)
    }

    fn tid() -> HostPid {
        HostPid(nix::unistd::gettid().as_raw())
    }

    #[test]
    fn a_thread_that_ended_has_none_and_one_that_came_later_has() {
        let (say, hear) = mpsc::channel();
        let (end, wait) = mpsc::channel::<()>();
        let first = std::thread::spawn(move || {
            say.send(tid()).unwrap();
            let _ = wait.recv();
        });
        let thread = hear.recv().unwrap();
        let opened = Statuses([(thread, Known::of(own(), thread).unwrap())].into());
        assert_eq!(opened.of(own(), thread, SAID).unwrap().numbers[0], thread.0);
        drop(end);
        first.join().unwrap();
        assert!(opened.of(own(), thread, SAID).is_err());
        assert_eq!(opened.of(own(), tid(), SAID).unwrap().numbers[0], tid().0);
    }

    /// What is put together from what was known is what the file says.
    #[test]
    fn a_thread_without_capabilities_is_told_without_its_file() {
        if PidFd::of_thread(tid()).and_then(|thread| thread.identities()).is_err() {
            eprintln!("skipped: this kernel (before 6.13) does not tell the identities of a thread");
            return;
        }
        let (say, hear) = mpsc::channel();
        let (go_on, wait) = mpsc::channel::<()>();
        let thread = std::thread::spawn(move || {
            capability::confine(0).unwrap();
            say.send(tid()).unwrap();
            wait.recv().unwrap();
            nix::sys::prctl::set_no_new_privs().unwrap();
            say.send(tid()).unwrap();
            let _ = wait.recv();
        });
        let number = hear.recv().unwrap();
        let known = Known::of(own(), number).unwrap();
        let Known::Powerless(known) = known else { panic!("{known:?}") };
        let as_file = || Facts::of(&Status::new(procfs::read_record(path(own(), number)).unwrap()));
        let told = |no_new_privs| {
            let facts = known.now(number, Said { no_new_privs, seccomp: 0 });
            facts.map(|facts| Facts { has_none_queued: true, ..facts })
        };
        assert_eq!(told(0), Some(as_file()));
        go_on.send(()).unwrap();
        hear.recv().unwrap();
        assert_eq!(told(1), Some(as_file()));
        drop(go_on);
        thread.join().unwrap();
        assert_eq!(told(1), None);
    }
}
