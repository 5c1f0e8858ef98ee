//! A guest that counts, over a pipe, and so shows whether it missed or repeated anything; and that is reached, if it has an
//! address.

use super::common::{Done, Host, eventually, finish};

/// What a shell does to count.
pub(crate) const COUNT: &str = "i=0; while :; do i=$((i+1)); echo $i; sleep 0.01; done | cat";

/// What a shell does to have whoever connects be answered. Callers close first: what waits for a while then is not the pod's.
pub(crate) const SERVE: &str = "python3 -ISc \"
import socket
server = socket.create_server(('', 80))
while True:
    caller, _ = server.accept()
    caller.sendall(b'here\\n')
    caller.recv(1)
    caller.close()
\" &";

/// What an answer may take: a request that got lost is made again after a second.
const ANSWERS_WITHIN: &str = "10";

/// A pod whose log is the numbers from some number on, and that answers where it has an address.
pub(crate) struct Counter<'a> {
    host: &'a Host,
    name: String,
}

impl<'a> Counter<'a> {
    /// Starts one, and waits until it counts.
    pub(crate) fn start(host: &'a Host, name: &str, options: &[&str]) -> Counter<'a> {
        let serve = if options.contains(&"private") { "" } else { SERVE };
        Counter::start_command(host, name, options, &["sh", "-c", &format!("{serve} {COUNT}")])
    }

    /// Starts one that another program is: one that answers, if it has an address.
    pub(crate) fn start_command(host: &'a Host, name: &str, options: &[&str], command: &[&str]) -> Counter<'a> {
        host.ok([&["run", "-d", "-n", name], options, &["--"], command].concat());
        let counter = Counter::of(host, name);
        counter.begins();
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

    /// Calls it wherever it can be called: at its address, and at a port of the host's that leads to it.
    fn calls(&self) -> Vec<Done> {
        let row = self.host.row(&self.name);
        let Some(address) = row["address"].as_str() else { return Vec::new() };
        let spec = &self.host.json(["inspect", "--json", &self.name])["spec"];
        let published =
            spec["publish"].as_array().unwrap().iter().map(|port| format!("127.0.0.1/{}", port["host_port"]));
        let places = std::iter::once(format!("{address}/80")).chain(published);
        let call = |place: String| {
            let script = format!("exec 3<>/dev/tcp/{place} && read -r answer <&3 && [ \"$answer\" = here ]");
            finish(self.host.command("timeout").args([ANSWERS_WITHIN, "bash", "-c", &script]))
        };
        places.map(call).collect()
    }

    /// Waits until it counts, and is reached.
    pub(crate) fn begins(&self) {
        eventually("it serves", || self.calls().iter().all(|call| call.code == 0));
        self.goes_on();
    }

    /// It counts on, has neither left out nor repeated a number, and is reached.
    pub(crate) fn goes_on(&self) {
        let before = self.numbers().len();
        eventually("the counter goes on", || self.numbers().len() > before);
        let numbers = self.numbers();
        let steady = numbers.windows(2).all(|pair| pair[1] == pair[0] + 1);
        assert!(steady, "{}: {numbers:?}", self.name);
        let calls = self.calls();
        assert!(calls.iter().all(|call| call.code == 0), "{} is not reached: {calls:?}", self.name);
    }
}
