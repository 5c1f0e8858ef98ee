//! What `/proc` says of a pod's processes and threads, opened while it runs: to open a file takes as long as to read it.

use std::collections::HashMap;
use std::fs::File;
use std::io;

use crate::ids::HostPid;
use crate::kernel;
use crate::process::discover::{self, PodProc, Population};
use crate::process::proc_files::Status;
use crate::procfs;

/// Files opened at most: the others are opened when they are read.
const MOST: usize = 4096;

/// The files that are open.
#[derive(Debug, Default)]
pub struct Statuses {
    /// The `status` of each process, and of each thread where the kernel does not tell of those.
    statuses: HashMap<HostPid, File>,
    /// The `stat` of each process, as the pod numbers things.
    stats: HashMap<HostPid, File>,
    /// How many threads each process had.
    threads: HashMap<HostPid, usize>,
}

impl Statuses {
    /// Opens those of everybody that there is.
    pub fn open(population: &Population, proc: &PodProc) -> Statuses {
        let mut opened = Statuses::default();
        for found in &population.live {
            let host = found.subject.host;
            let threads = discover::thread_numbers(host);
            opened.threads.insert(host, threads.len().max(1));
            let left = MOST.saturating_sub(opened.statuses.len() + opened.stats.len());
            if left > 0
                && let Ok(stat) = File::open(proc.path(found.subject.pod, "stat"))
            {
                opened.stats.insert(host, stat);
            }
            // Where the kernel tells of threads, few are read but the first.
            let most = left.saturating_sub(1).min(if kernel::threads::are_told() { 1 } else { MOST });
            let open = |thread: HostPid| Some((thread, File::open(path(host, thread)).ok()?));
            opened.statuses.extend(threads.into_iter().take(most).filter_map(open));
        }
        opened
    }

    /// How many processes there were.
    pub fn processes(&self) -> usize {
        self.threads.len()
    }

    /// How many threads a process had; one, if it was not there.
    pub fn threads_of(&self, process: HostPid) -> usize {
        self.threads.get(&process).copied().unwrap_or(1)
    }

    /// Reads the status of a thread.
    pub fn read(&self, process: HostPid, thread: HostPid) -> io::Result<Status> {
        // The number may be another thread's by now: what was opened then tells nothing any more.
        let opened = self.statuses.get(&thread).and_then(|file| procfs::reread_record(file).ok());
        let bytes = opened.map_or_else(|| procfs::read_record(path(process, thread)), Ok)?;
        Ok(Status::new(bytes))
    }

    /// The `stat` of a process, if it was opened and is still that of this process.
    pub fn stat(&self, process: HostPid) -> Option<Vec<u8>> {
        self.stats.get(&process).and_then(|file| procfs::reread_record(file).ok())
    }
}

fn path(process: HostPid, thread: HostPid) -> String {
    format!("/proc/{process}/task/{thread}/status")
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    #[test]
    fn a_thread_that_ended_has_none_and_one_that_came_later_has() {
        let own = HostPid(std::process::id() as i32);
        let tid = || HostPid(nix::unistd::gettid().as_raw());
        let (say, hear) = mpsc::channel();
        let (end, wait) = mpsc::channel::<()>();
        let first = std::thread::spawn(move || {
            say.send(tid()).unwrap();
            let _ = wait.recv();
        });
        let thread = hear.recv().unwrap();
        let statuses = [(thread, File::open(path(own, thread)).unwrap())].into();
        let opened = Statuses { statuses, ..Statuses::default() };
        assert_eq!(opened.read(own, thread).unwrap().numbers("Pid"), [thread.0 as u32]);
        drop(end);
        first.join().unwrap();
        assert!(opened.read(own, thread).is_err());
        assert_eq!(opened.read(own, tid()).unwrap().numbers("Pid"), [tid().0 as u32]);
    }
}
