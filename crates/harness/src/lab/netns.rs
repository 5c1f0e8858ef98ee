//! A network namespace of our own.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::linux::fs::MetadataExt;
use std::process::{Child, Command, Output};

use anyhow::{Context, Result, anyhow};
use nix::sched::{CloneFlags, setns, unshare};

/// A network namespace, kept by a descriptor: it is gone when this is dropped and nothing runs in it any more.
#[derive(Debug)]
pub struct Netns {
    file: File,
}

impl Netns {
    /// A new one, with nothing but a loopback interface that is up.
    pub fn new() -> Result<Self> {
        // A namespace belongs to a thread: one that ends here is where the new one begins.
        let made = std::thread::spawn(|| {
            unshare(CloneFlags::CLONE_NEWNET)?;
            File::open("/proc/thread-self/ns/net")
        });
        let file = made.join().map_err(|_| anyhow!("the thread that makes a network namespace panicked"))?;
        let netns = Self { file: file.context("making a network namespace (root is needed)")? };
        netns.ip(&["link set lo up"])?;
        Ok(netns)
    }

    /// The one that the calling thread is in.
    pub fn current() -> Result<Self> {
        Ok(Self { file: File::open("/proc/thread-self/ns/net").context("opening the network namespace")? })
    }

    /// Does `work` in the namespace. Sockets made there stay in it.
    pub fn enter<T: Send>(&self, work: impl FnOnce() -> T + Send) -> Result<T> {
        std::thread::scope(|scope| {
            let inside = scope.spawn(|| {
                setns(&self.file, CloneFlags::CLONE_NEWNET)?;
                io::Result::Ok(work())
            });
            match inside.join() {
                Ok(result) => result.context("entering a network namespace"),
                Err(panic) => std::panic::resume_unwind(panic),
            }
        })
    }

    /// Runs a command in the namespace to its end.
    pub fn output(&self, command: &mut Command) -> Result<Output> {
        self.enter(|| command.output())?.with_context(|| format!("running {:?}", command.get_program()))
    }

    /// Starts a command in the namespace.
    pub fn spawn(&self, command: &mut Command) -> Result<Child> {
        self.enter(|| command.spawn())?.with_context(|| format!("starting {:?}", command.get_program()))
    }

    /// Its inode number, by which it is known.
    pub fn inode(&self) -> Result<u64> {
        Ok(self.file.metadata().context("looking at a network namespace")?.st_ino())
    }

    /// A descriptor of it that commands inherit which are started while it is open.
    pub fn inheritable(&self) -> Result<OwnedFd> {
        nix::unistd::dup(&self.file).context("duplicating the descriptor of a network namespace")
    }

    /// The first words of a command that is to run in the namespace, for a shell.
    pub fn way_in(&self) -> String {
        use std::os::fd::AsRawFd;
        format!("nsenter --net=/proc/{}/fd/{} --", std::process::id(), self.file.as_raw_fd())
    }

    /// Runs `ip` with each of `lines`.
    pub fn ip(&self, lines: &[&str]) -> Result<String> {
        let mut text = String::new();
        for line in lines {
            let output = self.output(Command::new("ip").args(line.split_whitespace()))?;
            if !output.status.success() {
                return Err(anyhow!("ip {line}: {}", String::from_utf8_lossy(&output.stderr).trim()));
            }
            text += &String::from_utf8_lossy(&output.stdout);
        }
        Ok(text)
    }

    /// Connects an interface `there` of this namespace with a new interface `here` of `host`, by a pair of veths.
    pub fn connect(&self, there: &str, host: &Netns, here: &str) -> Result<()> {
        let itself = std::process::id();
        use std::os::fd::AsRawFd;
        let path = format!("/proc/{itself}/fd/{}", self.file.as_raw_fd());
        host.ip(&[
            &format!("link add {here} type veth peer name {there} netns {path}"),
            &format!("link set {here} up"),
        ])?;
        self.ip(&[&format!("link set {there} up")])?;
        Ok(())
    }

    /// Processes whose first thread is in the namespace.
    pub fn processes(&self) -> Result<Vec<i32>> {
        let inode = self.inode()?;
        let pids = std::fs::read_dir("/proc").context("reading /proc")?.flatten();
        let pids = pids.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
        let here = |pid: &i32| std::fs::metadata(format!("/proc/{pid}/ns/net")).is_ok_and(|m| m.st_ino() == inode);
        Ok(pids.filter(here).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_namespaces_reach_each_other_and_nothing_else() {
        let (a, b) = (Netns::new().unwrap(), Netns::new().unwrap());
        b.connect("eth0", &a, "port").unwrap();
        a.ip(&["address add 198.18.0.1/24 dev port"]).unwrap();
        b.ip(&["address add 198.18.0.2/24 dev eth0"]).unwrap();
        let listener = a.enter(|| std::net::TcpListener::bind("198.18.0.1:80")).unwrap().unwrap();
        b.enter(|| std::net::TcpStream::connect("198.18.0.1:80")).unwrap().unwrap();
        drop(listener);
        assert_eq!(a.ip(&["-o route show default"]).unwrap(), "");
        assert!(a.processes().unwrap().is_empty());
    }
}
