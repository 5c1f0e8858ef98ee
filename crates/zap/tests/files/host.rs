//! A host of the test's own, and a probe in a pod of it.

use std::path::PathBuf;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

/// How long anything may take on a busy machine.
const PATIENCE: Duration = Duration::from_secs(60);

/// How long a probe waits in its pod for all that is done with it, so that it does not for ever.
const LIFE: Duration = Duration::from_secs(900);

/// A host: a state directory. Its pods go with it.
pub(crate) struct Host {
    directory: tempfile::TempDir,
}

impl Host {
    pub(crate) fn new() -> Host {
        Host { directory: tempfile::tempdir().unwrap() }
    }

    fn zap(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_zap"));
        command.arg("--state").arg(self.directory.path().join("state")).args(arguments).stdin(Stdio::null());
        command
    }

    pub(crate) fn run(&self, arguments: &[&str]) -> Output {
        self.zap(arguments).output().unwrap()
    }

    pub(crate) fn must(&self, arguments: &[&str]) -> String {
        let output = self.run(arguments);
        let all = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        assert!(output.status.success(), "zap {arguments:?}: {}{}", all(&output.stdout), all(&output.stderr));
        all(&output.stdout)
    }

    pub(crate) fn image(&self) -> PathBuf {
        self.directory.path().join("image")
    }

    /// Runs the probe of that name in a pod of that name, until it is ready.
    pub(crate) fn start_probe(&self, probe: &str, options: &[&str]) {
        let program = std::env::current_exe().unwrap();
        let variable = format!("ZAP_PROBE={probe}");
        let mut arguments = vec!["run", "-d", "-n", "probe", "--net", "private", "-e", &variable];
        arguments.extend(options);
        let program = program.to_str().unwrap();
        arguments.extend(["--", program, "probe_in_pod", "--exact", "--nocapture", "--test-threads=1"]);
        self.must(&arguments);
        self.until("ready", "probe");
    }

    /// Waits until a pod has made the file `/tmp/FILE`.
    pub(crate) fn until(&self, file: &str, pod: &str) {
        let begun = Instant::now();
        let path = format!("/tmp/{file}");
        while !self.run(&["exec", pod, "/bin/test", "-e", &path]).status.success() {
            let state = self.must(&["ls"]);
            assert!(!state.contains("stopped") && begun.elapsed() < PATIENCE, "no {path}: {state}{}", self.log(pod));
        }
    }

    /// Lets the probe of a pod look at what it has, and expects it to be content.
    pub(crate) fn must_be_content(&self, pod: &str) {
        // Whether it succeeds is not asked: the pod may end, and `touch` with it, as soon as the file is there.
        self.run(&["exec", pod, "/bin/touch", "/tmp/go"]);
        let begun = Instant::now();
        let code = loop {
            let listed = self.must(&["ls", "--json"]);
            let pods: Vec<serde_json::Value> = serde_json::from_str(&listed).unwrap();
            match pods.iter().find(|p| p["name"] == pod) {
                Some(ended) if ended["state"] == "stopped" => break ended["exit_code"].clone(),
                _ => assert!(begun.elapsed() < PATIENCE, "{pod} does not end: {listed}"),
            }
        };
        assert_eq!(code, 0, "{pod}: {}", self.log(pod));
    }

    /// What a pod said, stdout and stderr.
    pub(crate) fn log(&self, pod: &str) -> String {
        let said = self.run(&["logs", pod]);
        [said.stdout, said.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).concat()
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        let pods = self.run(&["ls", "--json"]).stdout;
        for pod in serde_json::from_slice::<Vec<serde_json::Value>>(&pods).unwrap_or_default() {
            self.run(&["rm", "-f", pod["name"].as_str().unwrap_or_default()]);
        }
    }
}

/// The probe, in the pod: prepares, waits until it is told to go on, and looks.
pub(crate) fn probe(prepare: impl FnOnce() -> Box<dyn FnOnce()>) {
    let check = prepare();
    std::fs::write("/tmp/ready", "").unwrap();
    let begun = Instant::now();
    while !std::path::Path::new("/tmp/go").exists() {
        assert!(begun.elapsed() < LIFE);
        std::thread::sleep(Duration::from_millis(2));
    }
    check();
}
