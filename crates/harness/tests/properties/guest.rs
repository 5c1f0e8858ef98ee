//! A pod that runs a generated program.

use std::cell::Cell;
use std::path::{Path, PathBuf};
use std::process::Output;
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::Context;
use harness::lab::{Lab, wait_until};
use harness::program::{MEETING_POINT, Op, Step};
use proptest::test_runner::TestCaseError;

pub(crate) type Checked<T = ()> = Result<T, TestCaseError>;

fn checked<T>(done: anyhow::Result<T>) -> Checked<T> {
    done.map_err(|error| TestCaseError::fail(format!("{error:#}")))
}

/// The exit code of a command for a pod that there is not.
const NO_SUCH_POD: i32 = 6;

/// The pod, removed with this.
pub(crate) struct Guest<'a> {
    lab: &'a Lab,
    name: String,
    meeting: PathBuf,
    /// The host that it is on now.
    home: Cell<&'a Lab>,
}

fn fresh(lab: &Lab, what: &str) -> PathBuf {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    lab.directory().join(format!("{what}-{}", NEXT.fetch_add(1, Ordering::Relaxed)))
}

impl<'a> Guest<'a> {
    pub(crate) fn start(lab: &'a Lab, name: &str, steps: &[Step]) -> Checked<Guest<'a>> {
        Guest::start_with(lab, name, &["--net", "private", "--hostname", "guest"], steps)
    }

    /// One with an address, and a hostname that is not its own.
    pub(crate) fn start_bridged(lab: &'a Lab, name: &str, hostname: &str, steps: &[Step]) -> Checked<Guest<'a>> {
        Guest::start_with(lab, name, &["--hostname", hostname], steps)
    }

    fn start_with(lab: &'a Lab, name: &str, options: &[&str], steps: &[Step]) -> Checked<Guest<'a>> {
        let guest = Guest::called(lab, name);
        let bind = guest.bind();
        let steps = serde_json::to_string(steps).unwrap();
        let program = env!("CARGO_BIN_EXE_pod-program");
        guest.zap(&[&["run", "-d", "-n", name, "--bind", &bind], options, &["--", program, &steps]].concat())?;
        Ok(guest)
    }

    /// Another pod from the image of one.
    pub(crate) fn copy(lab: &'a Lab, image: &Path) -> Checked<Guest<'a>> {
        let copy = Guest::called(lab, "copy");
        copy.zap(&["restart", image.to_str().unwrap(), "-d", "-n", "copy", "--bind", &copy.bind()])?;
        Ok(copy)
    }

    fn called(lab: &'a Lab, name: &str) -> Guest<'a> {
        let guest = Guest { lab, name: name.into(), meeting: fresh(lab, "meeting"), home: Cell::new(lab) };
        std::fs::create_dir(&guest.meeting).unwrap();
        guest
    }

    /// Runs a command on its host.
    fn try_zap(&self, words: &[&str]) -> Output {
        self.home.get().try_zap(words).unwrap().0
    }

    fn zap(&self, words: &[&str]) -> Checked {
        checked(self.home.get().zap(words).map(drop))
    }

    /// Moves it to another host.
    pub(crate) fn migrate(&self, to: &'a Lab, pre_copy: bool) -> Checked {
        let (zap, state) = (harness::lab::zap_binary().unwrap(), to.state());
        let via = format!("{} --state {} receive", zap.display(), state.display());
        let strategy = if pre_copy { "pre-copy" } else { "stop-and-copy" };
        self.zap(&["migrate", &self.name, "--via", &via, "--strategy", strategy])?;
        self.home.set(to);
        Ok(())
    }

    fn bind(&self) -> String {
        format!("{}:{MEETING_POINT}", self.meeting.display())
    }

    /// Waits for it to be there; the kinds of steps that its living processes have taken.
    pub(crate) fn await_pause(&self, step: usize) -> Checked<Vec<String>> {
        let name = format!("at-{step}");
        self.await_file(&name)?;
        let taken = std::fs::read_link(self.meeting.join(name)).unwrap();
        Ok(Op::kinds_in(taken.to_str().unwrap()))
    }

    fn await_file(&self, name: &str) -> Checked {
        let there = wait_until(name, || {
            let found = self.meeting.join(name).symlink_metadata();
            found.map(drop).with_context(|| format!("{name} is not there"))
        });
        checked(there.with_context(|| {
            let run = |words: &[&str]| format!("{:?}", self.try_zap(words));
            format!("{}: {} {}", self.name, run(&["ls"]), run(&["logs", &self.name]))
        }))
    }

    pub(crate) fn go(&self, step: usize) {
        std::fs::write(self.meeting.join(format!("go-{step}")), "").unwrap();
    }

    fn image(&self) -> PathBuf {
        self.meeting.join("image")
    }

    pub(crate) fn suspend_and_resume(&self) -> Checked {
        self.zap(&["suspend", &self.name])?;
        self.zap(&["resume", &self.name])
    }

    /// A checkpoint that leaves it running; the image.
    pub(crate) fn checkpoint_and_go_on(&self) -> Checked<PathBuf> {
        let image = fresh(self.lab, "image");
        self.zap(&["checkpoint", &self.name, "-o", image.to_str().unwrap(), "--leave-running"])?;
        Ok(image)
    }

    pub(crate) fn restart(&self) -> Checked {
        self.checkpoint()?;
        self.restart_from_image()
    }

    /// A checkpoint that ends it.
    pub(crate) fn checkpoint(&self) -> Checked {
        self.zap(&["checkpoint", &self.name, "-o", self.image().to_str().unwrap()])
    }

    pub(crate) fn restart_from_image(&self) -> Checked {
        self.zap(&["restart", self.image().to_str().unwrap(), "-d"])?;
        std::fs::remove_dir_all(self.image()).unwrap();
        Ok(())
    }

    /// Addresses of its interface, as its processes see them.
    pub(crate) fn inner_address(&self) -> String {
        let pods = self.lab.pods().unwrap();
        let init = pods.iter().find(|pod| pod.name == self.name).unwrap().init_pid.unwrap();
        let namespace = format!("--net=/proc/{init}/ns/net");
        let mut look = std::process::Command::new("nsenter");
        let looked = look.args([&namespace, "ip", "-o", "address"]).output().unwrap();
        let text = String::from_utf8(looked.stdout).unwrap();
        let addresses = text.lines().filter_map(|line| line.split_whitespace().nth(3));
        addresses.collect::<Vec<_>>().join(" ")
    }

    /// The transcript, when it has ended.
    pub(crate) fn end(self) -> Checked<String> {
        self.await_file("transcript")?;
        Ok(std::fs::read_to_string(self.meeting.join("transcript")).unwrap())
    }
}

impl Drop for Guest<'_> {
    fn drop(&mut self) {
        let removed = self.try_zap(&["rm", "-f", &self.name]);
        // It is not there where a checkpoint was not followed by a restart.
        if !matches!(removed.status.code(), Some(0 | NO_SUCH_POD)) {
            eprintln!("{}", String::from_utf8_lossy(&removed.stderr));
        }
        let _ = std::fs::remove_dir_all(&self.meeting);
    }
}
