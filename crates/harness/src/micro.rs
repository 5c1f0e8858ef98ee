//! Single operations, whose cost is compared between places: see `harness-micro`.

use std::fs::File;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use nix::sys::eventfd::EventFd;
use nix::time::{ClockId, clock_gettime};

use crate::sys;

/// Every operation, and how often it is done in a batch of about a millisecond: the paper's own list first.
pub const OPERATIONS: [(&str, u32); 18] = [
    ("getpid", 5000),
    ("ioctl_fionread", 3000),
    ("shmget_shmctl", 200),
    ("semget_semctl", 500),
    ("fork_exit", 8),
    ("fork_exec", 3),
    ("fork_sh", 2),
    ("read", 5000),
    ("openat_close", 800),
    ("stat", 2000),
    ("pipe_byte", 1000),
    ("pipe_round_trip", 100),
    ("unix_round_trip", 100),
    ("tcp_round_trip", 50),
    ("mmap_touch_munmap", 50),
    ("clock_gettime", 10_000),
    ("thread_create_join", 30),
    ("context_switch", 150),
];

/// Pages of a mapping that is made and unmade.
const PAGES: usize = 16;

/// What the operations need, made before anything is timed.
#[derive(Debug)]
pub struct Bench {
    zero: File,
    pipe: (File, File),
    echo: Echo,
    unix: UnixStream,
    tcp: TcpStream,
    /// To a thread that waits, and from it.
    tokens: (Arc<EventFd>, Arc<EventFd>),
}

/// A process that gives back every byte.
#[derive(Debug)]
struct Echo {
    child: Child,
}

impl Drop for Echo {
    fn drop(&mut self) {
        // It ends at the end of its input.
        drop(self.child.stdin.take());
        let _ = self.child.wait();
    }
}

impl Bench {
    /// Makes everything. `echo` is a command that gives back every byte.
    pub fn new(mut echo: Command) -> Result<Self> {
        let (reader, writer) = nix::unistd::pipe()?;
        let (unix, far) = UnixStream::pair()?;
        give_back(far);
        let listener = TcpListener::bind("127.0.0.1:0").context("listening on the loopback interface")?;
        let tcp = TcpStream::connect(listener.local_addr()?).context("connecting over the loopback interface")?;
        tcp.set_nodelay(true)?;
        let (far, _) = listener.accept()?;
        far.set_nodelay(true)?;
        give_back(far);
        let child = echo.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().context("starting an echo")?;
        Ok(Self {
            zero: File::open("/dev/zero")?,
            pipe: (reader.into(), writer.into()),
            echo: Echo { child },
            unix,
            tcp,
            tokens: hand_back()?,
        })
    }

    /// Does one batch of an operation, and gives the nanoseconds of one.
    pub fn batch(&mut self, operation: &str) -> Result<f64> {
        let Some((_, count)) = OPERATIONS.iter().find(|(name, _)| *name == operation) else {
            bail!("there is no operation {operation}");
        };
        let start = Instant::now();
        for _ in 0..*count {
            self.once(operation)?;
        }
        // Two hand-overs are there and back.
        let each = if operation == "context_switch" { 2 * count } else { *count };
        Ok(start.elapsed().as_nanos() as f64 / f64::from(each))
    }

    fn once(&mut self, operation: &str) -> Result<()> {
        match operation {
            "getpid" => drop(std::hint::black_box(nix::unistd::getpid())),
            "ioctl_fionread" => drop(sys::readable_bytes(&self.pipe.0)?),
            "shmget_shmctl" => sys::segment_and_gone()?,
            "semget_semctl" => sys::semaphore_and_gone()?,
            "fork_exit" => sys::fork_and_exit()?,
            "fork_exec" => run(Command::new("/bin/true"))?,
            "fork_sh" => {
                let mut shell = Command::new("/bin/sh");
                shell.args(["-c", ":"]);
                run(shell)?;
            }
            "read" => self.zero.read_exact(&mut [0])?,
            "openat_close" => drop(File::open("/dev/null")?),
            "stat" => {
                std::fs::metadata("/bin/sh")?;
            }
            "pipe_byte" => {
                self.pipe.1.write_all(&[0])?;
                self.pipe.0.read_exact(&mut [0])?;
            }
            "pipe_round_trip" => {
                let child = &mut self.echo.child;
                let (to, from) = (child.stdin.as_mut(), child.stdout.as_mut());
                let (to, from) = to.zip(from).context("pipes of the echo")?;
                to.write_all(&[0])?;
                from.read_exact(&mut [0])?;
            }
            "unix_round_trip" => there_and_back(&mut self.unix)?,
            "tcp_round_trip" => there_and_back(&mut self.tcp)?,
            "mmap_touch_munmap" => sys::map_touch_unmap(PAGES)?,
            "clock_gettime" => drop(std::hint::black_box(clock_gettime(ClockId::CLOCK_MONOTONIC)?)),
            "thread_create_join" => drop(std::thread::spawn(|| ()).join()),
            "context_switch" => {
                self.tokens.0.write(1)?;
                self.tokens.1.read()?;
            }
            other => bail!("there is no operation {other}"),
        }
        Ok(())
    }
}

fn run(mut command: Command) -> Result<()> {
    command.stdin(Stdio::null()).status()?;
    Ok(())
}

fn there_and_back(stream: &mut (impl Read + Write)) -> Result<()> {
    stream.write_all(&[0])?;
    Ok(stream.read_exact(&mut [0])?)
}

/// A thread that gives back every byte until the stream ends.
fn give_back(mut stream: impl Read + Write + Send + 'static) {
    std::thread::spawn(move || {
        let mut byte = [0];
        while stream.read_exact(&mut byte).and_then(|()| stream.write_all(&byte)).is_ok() {}
    });
}

/// A thread that hands back a token whenever it gets one.
fn hand_back() -> Result<(Arc<EventFd>, Arc<EventFd>)> {
    let tokens = (Arc::new(EventFd::new()?), Arc::new(EventFd::new()?));
    let (there, back) = tokens.clone();
    std::thread::spawn(move || while there.read().and_then(|token| back.write(token)).is_ok() {});
    Ok(tokens)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_operation_can_be_done_and_takes_time() {
        let mut bench = Bench::new(Command::new("cat")).unwrap();
        for (operation, _) in OPERATIONS {
            let nanoseconds = bench.batch(operation).unwrap();
            assert!(nanoseconds > 1.0, "{operation} took {nanoseconds} ns");
        }
        assert!(bench.batch("nothing").is_err());
    }
}
