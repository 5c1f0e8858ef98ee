//! The `status` files of a pod's threads, opened while it runs: to open one takes as long as to read it.

use std::collections::HashMap;
use std::fs::File;
use std::io;

use crate::ids::HostPid;
use crate::process::discover::{self, Population};
use crate::process::proc_files::Status;
use crate::procfs;

/// Files opened at most: the others are opened when they are read.
const MOST: usize = 4096;

/// The files that are open, by thread.
#[derive(Debug, Default)]
pub struct Statuses(HashMap<HostPid, File>);

impl Statuses {
    /// Opens those of every thread that there is.
    pub fn open(population: &Population) -> Statuses {
        let hosts = population.live.iter().map(|found| found.subject.host);
        let threads = hosts.flat_map(|host| discover::thread_numbers(host).into_iter().map(move |tid| (host, tid)));
        let open = |(process, thread): (HostPid, HostPid)| Some((thread, File::open(path(process, thread)).ok()?));
        Statuses(threads.take(MOST).filter_map(open).collect())
    }

    /// Reads that of a thread.
    pub fn read(&self, process: HostPid, thread: HostPid) -> io::Result<Status> {
        // The number may be another thread's by now: what was opened then tells nothing any more.
        let opened = self.0.get(&thread).and_then(|file| procfs::reread_record(file).ok());
        let bytes = opened.map_or_else(|| procfs::read_record(path(process, thread)), Ok)?;
        Ok(Status::new(bytes))
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
        let opened = Statuses([(thread, File::open(path(own, thread)).unwrap())].into());
        assert_eq!(opened.read(own, thread).unwrap().numbers("Pid"), [thread.0 as u32]);
        drop(end);
        first.join().unwrap();
        assert!(opened.read(own, thread).is_err());
        assert_eq!(opened.read(own, tid()).unwrap().numbers("Pid"), [tid().0 as u32]);
    }
}
