//! A guest that counts, over a pipe, and so shows whether it missed or repeated anything.

use super::common::{Host, eventually};

/// What a shell does to count.
pub(crate) const COUNT: &str = "i=0; while :; do i=$((i+1)); echo $i; sleep 0.01; done | cat";

/// A pod whose log is the numbers from some number on.
pub(crate) struct Counter<'a> {
    host: &'a Host,
    name: String,
}

impl<'a> Counter<'a> {
    /// Starts one, and waits until it counts.
    pub(crate) fn start(host: &'a Host, name: &str, options: &[&str]) -> Counter<'a> {
        Counter::start_command(host, name, options, &["sh", "-c", COUNT])
    }

    /// Starts one that another program is.
    pub(crate) fn start_command(host: &'a Host, name: &str, options: &[&str], command: &[&str]) -> Counter<'a> {
        host.ok([&["run", "-d", "-n", name], options, &["--"], command].concat());
        let counter = Counter::of(host, name);
        counter.goes_on();
        counter
    }

    /// One that is there.
    pub(crate) fn of(host: &'a Host, name: &str) -> Counter<'a> {
        Counter { host, name: name.into() }
    }

    fn numbers(&self) -> Vec<u64> {
        let log = self.host.ok(["logs", &self.name]);
        // The last line may be half a line.
        let complete = log.rsplit_once('\n').map_or("", |(complete, _)| complete);
        complete.lines().filter_map(|line| line.parse().ok()).collect()
    }

    /// It counts on, and has neither left out nor repeated a number.
    pub(crate) fn goes_on(&self) {
        let before = self.numbers().len();
        eventually("the counter goes on", || self.numbers().len() > before);
        let numbers = self.numbers();
        let steady = numbers.windows(2).all(|pair| pair[1] == pair[0] + 1);
        assert!(steady, "{}: {numbers:?}", self.name);
    }
}
