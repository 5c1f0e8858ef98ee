//! Programs that try to get out of a pod, or to look out, as root and as a user, before and after a restart: each attempt
//! fails as `docs/confinement.md` says.

#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::fs;
use std::os::fd::OwnedFd;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, symlink};
use std::os::unix::net::{SocketAddr, UnixListener};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use harness::escape::Facts;
use harness::lab::{Lab, wait_until, zap_binary};
use nix::mqueue::{MQ_OFlag, MqAttr, MqdT, mq_open, mq_unlink};
use nix::sys::stat::Mode;

/// Things of a host's that a pod is not to reach, and the host.
struct Outside {
    lab: Lab,
    directory: tempfile::TempDir,
    facts: Facts,
    process: Child,
    _sockets: [OwnedFd; 3],
    _reader: fs::File,
    queue: Option<MqdT>,
    segment: i32,
}

impl Outside {
    fn new() -> Result<Outside> {
        let lab = Lab::new()?;
        // Not where a pod has a fresh directory of its own: it sees these by their paths in the host's root.
        let directory = tempfile::Builder::new().prefix("zap-outside-").tempdir_in("/var/tmp")?;
        let at = |name: &str| directory.path().join(name);
        let text = |path: PathBuf| path.to_str().unwrap().to_owned();
        let unique = text(directory.path().to_owned()).replace('/', "-");
        let marker = lab.directory().join("marker");
        fs::write(&marker, "outside")?;
        for name in ["bind", "read-only"] {
            fs::create_dir(at(name))?;
            fs::set_permissions(at(name), std::os::unix::fs::PermissionsExt::from_mode(0o777))?;
        }
        fs::write(at("read-only/file"), "as it was")?;
        fs::set_permissions(at("read-only/file"), std::os::unix::fs::PermissionsExt::from_mode(0o666))?;
        fs::set_permissions(directory.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755))?;
        symlink(&marker, at("bind/to-marker"))?;
        symlink("../../../../../..".to_owned() + marker.to_str().unwrap(), at("bind/to-above"))?;
        let by_path = UnixListener::bind(at("socket"))?;
        fs::set_permissions(at("socket"), std::os::unix::fs::PermissionsExt::from_mode(0o777))?;
        let (by_name, by_port, port) = lab.host().enter(|| -> Result<_> {
            let tcp = std::net::TcpListener::bind("127.0.0.1:0")?;
            let port = tcp.local_addr()?.port();
            Ok((UnixListener::bind_addr(&SocketAddr::from_abstract_name(&unique)?)?, tcp, port))
        })??;
        nix::unistd::mkfifo(&at("pipe"), Mode::from_bits_truncate(0o666))?;
        fs::set_permissions(at("pipe"), std::os::unix::fs::PermissionsExt::from_mode(0o666))?;
        let reader = fs::OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(at("pipe"))?;
        let queue_name = format!("/{unique}");
        let size = MqAttr::new(0, 4, 64, 0);
        let queue =
            mq_open(&*queue_name, MQ_OFlag::O_CREAT | MQ_OFlag::O_RDWR, Mode::from_bits_truncate(0o666), Some(&size))?;
        let process = Command::new("sleep").arg("1000").stdin(Stdio::null()).spawn()?;
        let key = 0x7a61_7000 ^ process.id() as i32;
        let segment = harness::sys::shared_segment(key)?;
        let disk = fs::metadata("/")?.dev();
        let facts = Facts {
            pid: process.id() as i32,
            marker: text(marker),
            state: text(at("state")),
            bind: "/srv/bind".into(),
            read_only_bind: "/srv/read-only".into(),
            socket: text(at("socket")),
            abstract_name: unique,
            pipe: text(at("pipe")),
            port,
            key,
            queue: queue_name,
            disk: (nix::sys::stat::major(disk) as u32, nix::sys::stat::minor(disk) as u32),
        };
        let sockets = [by_path.into(), by_name.into(), by_port.into()];
        Ok(Outside { lab, directory, facts, process, _sockets: sockets, _reader: reader, queue: Some(queue), segment })
    }

    fn at(&self, name: &str) -> String {
        self.directory.path().join(name).to_str().unwrap().to_owned()
    }

    /// Runs zap, with a state directory that is in the root that the pod sees.
    fn zap(&self, words: &[&str]) -> Result<String> {
        let mut command = Command::new(zap_binary()?);
        command.args(["--state", &self.facts.state]).args(words).stdin(Stdio::null());
        let output = self.lab.host().output(&mut command)?;
        ensure!(output.status.success(), "{words:?}: {}", String::from_utf8_lossy(&output.stderr));
        Ok(String::from_utf8(output.stdout)?)
    }

    /// Has a pod try everything once more; the outcomes as root and as a user by the names of the attempts.
    fn round(&self, pod: &str, number: u32) -> Result<BTreeMap<String, [String; 2]>> {
        self.zap(&["exec", pod, "touch", &format!("/tmp/round-{number}")])?;
        let log = wait_until("a round to end", || {
            let log = self.zap(&["logs", pod])?;
            ensure!(log.contains(&format!("end of round {number}\n")), "it has printed {log}");
            Ok(log)
        })?;
        let prefix = format!("{number} ");
        let lines = log.lines().filter_map(|line| line.strip_prefix(&prefix));
        lines
            .map(|line| match line.split(' ').collect::<Vec<_>>()[..] {
                [name, root, user] => Ok((name.to_owned(), [root.to_owned(), user.to_owned()])),
                _ => anyhow::bail!("it has printed {line:?}"),
            })
            .collect()
    }

    /// Nothing of it has suffered.
    fn is_well(&mut self) -> Result<()> {
        ensure!(self.process.try_wait()?.is_none(), "the host's process has ended");
        ensure!(fs::read_to_string(self.at("read-only/file"))? == "as it was", "a file was written to");
        let left: Vec<_> = fs::read_dir(self.at("bind"))?.map(|e| e.unwrap().file_name()).collect();
        ensure!(left.len() == 2, "{left:?} in the directory that was bound");
        Ok(())
    }
}

impl Drop for Outside {
    fn drop(&mut self) {
        let listed = self.zap(&["ls", "--json"]).unwrap_or_default();
        let pods: Vec<serde_json::Value> = serde_json::from_str(&listed).unwrap_or_default();
        for pod in pods {
            let _ = self.zap(&["rm", "-f", pod["name"].as_str().unwrap_or_default()]);
        }
        let _ = self.process.kill();
        let _ = self.process.wait();
        let _ = self.queue.take().map(nix::mqueue::mq_close);
        let _ = mq_unlink(&*self.facts.queue);
        harness::sys::remove_segment(self.segment);
    }
}

/// What the page says of each attempt.
fn promised() -> BTreeMap<String, [String; 2]> {
    let page = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/confinement.md");
    let page = fs::read_to_string(page).unwrap_or_default();
    let rows = page.lines().filter_map(|line| line.strip_prefix("| `"));
    rows.map(|row| {
        let cells: Vec<&str> = row.trim_end_matches('|').split(" | ").map(str::trim).collect();
        let [name, _, root, user] = cells[..] else { panic!("a row of docs/confinement.md: {row}") };
        (name.trim_end_matches('`').to_owned(), [root.to_owned(), user.to_owned()])
    })
    .collect()
}

/// An outcome is one of those that the page names: kernels differ in a few.
fn differences(round: &str, found: &BTreeMap<String, [String; 2]>) -> Vec<String> {
    let promised = promised();
    let mut all: Vec<&String> = found.keys().chain(promised.keys()).collect();
    all.sort();
    all.dedup();
    let agrees = |promised: &str, found: &str| promised.split(" or ").any(|one| one == found);
    let wrong = |name: &&String| match (promised.get(*name), found.get(*name)) {
        (Some(promised), Some(found)) => promised.iter().zip(found).any(|(one, other)| !agrees(one, other)),
        _ => true,
    };
    let shown = |name: &String| {
        let row = |outcomes: Option<&[String; 2]>| outcomes.map_or("(nothing)".into(), |o| o.join(" | "));
        format!("{round}: {name} | {} (the page: {})", row(found.get(name)), row(promised.get(name)))
    };
    all.into_iter().filter(wrong).map(shown).collect()
}

fn nothing_gets_out(outside: &mut Outside) -> Result<Vec<String>> {
    let facts = serde_json::to_string(&outside.facts)?;
    let binds = [format!("{}:/srv/bind", outside.at("bind")), format!("{}:/srv/read-only:ro", outside.at("read-only"))];
    let program = env!("CARGO_BIN_EXE_pod-escape");
    let run = ["run", "-d", "-n", "out", "--net", "private", "--bind", &binds[0], "--bind", &binds[1], "--", program];
    outside.zap(&[&run[..], &[&facts]].concat())?;
    let mut wrong = differences("in a new pod", &outside.round("out", 0)?);
    let image = outside.lab.directory().join("image");
    let image = image.to_str().unwrap();
    outside.zap(&["checkpoint", "out", "-o", image])?;
    outside.zap(&["restart", image, "-d"])?;
    let again = outside.round("out", 1).context("after a restart")?;
    wrong.extend(differences("after a restart", &again));
    // Whoever is started in a pod that was restarted.
    outside.zap(&["restart", image, "-d", "-n", "copy"])?;
    let told = outside.zap(&["exec", "copy", program, &facts, "once"])?;
    let fresh = told.lines().filter_map(|line| line.strip_prefix("0 "));
    let fresh = fresh.filter_map(|line| {
        let [name, root, user] = line.split(' ').collect::<Vec<_>>()[..] else { return None };
        Some((name.to_owned(), [root.to_owned(), user.to_owned()]))
    });
    wrong.extend(differences("started in a restarted pod", &fresh.collect()));
    outside.is_well()?;
    // No group of the pod's own making is in the way.
    outside.zap(&["rm", "-f", "out"])?;
    outside.zap(&["rm", "-f", "copy"])?;
    Ok(wrong)
}

#[test]
fn nothing_gets_out_or_looks_out() {
    let mut outside = Outside::new().unwrap();
    match nothing_gets_out(&mut outside) {
        Ok(wrong) => assert!(wrong.is_empty(), "{} outcomes differ:\n{}", wrong.len(), wrong.join("\n")),
        Err(error) => panic!("{error:#}"),
    }
}

/// Gets hold of zap's own program, which a command begins as, and tries to write to it when nobody runs it but PID 1.
const OVERWRITER: &str = "
import os, time
def held():
    while True:
        for number in filter(str.isdigit, os.listdir('/proc')):
            try:
                if number != '1' and os.path.basename(os.readlink(f'/proc/{number}/exe')) == 'zap':
                    return os.open(f'/proc/{number}/exe', os.O_PATH), number
            except OSError:
                pass
while True:
    program, number = held()
    print('held', flush=True)
    while os.path.exists(f'/proc/{number}'): time.sleep(0.001)
    try:
        os.open(f'/proc/self/fd/{program}', os.O_WRONLY)
        print('OPENED', flush=True)
    except OSError as error:
        print('refused', error.errno, flush=True)
    os.close(program)
";

/// The program of zap that a pod's PID 1 runs is a file of the host's: who is run as it, by its link, cannot write to it.
#[test]
fn the_program_of_pid_1_is_not_written_to() {
    let outside = Outside::new().unwrap();
    let image = outside.lab.directory().join("image");
    let image = image.to_str().unwrap();
    outside.zap(&["run", "-d", "-n", "over", "--net", "private", "--", "python3", "-c", OVERWRITER]).unwrap();
    let refused = || -> Result<usize> {
        let log = outside.zap(&["logs", "over"])?;
        ensure!(!log.contains("OPENED"), "it has printed {log:?}");
        Ok(log.lines().filter(|line| *line == format!("refused {}", libc::ETXTBSY)).count())
    };
    for _ in ["in a new pod", "after a restart"] {
        let before = refused().unwrap();
        wait_until("it to be refused", || {
            // Each is there for a moment only.
            outside.zap(&["exec", "over", "/proc/self/exe", "--version"])?;
            ensure!(refused()? > before, "it was not refused once more");
            Ok(())
        })
        .unwrap();
        outside.zap(&["checkpoint", "over", "-o", image]).unwrap();
        outside.zap(&["restart", image, "-d"]).unwrap();
        fs::remove_dir_all(image).unwrap();
    }
    refused().unwrap();
}

/// A device that is bound into a pod works there, others do not.
#[test]
fn a_device_that_is_bound_works() {
    let outside = Outside::new().unwrap();
    let run = ["run", "-d", "-n", "bound", "--net", "private", "--bind", "/dev/loop-control", "--", "sleep", "1000"];
    if !Path::new("/dev/loop-control").exists() {
        return;
    }
    outside.zap(&run).unwrap();
    outside.zap(&["exec", "bound", "sh", "-c", ": </dev/loop-control"]).unwrap();
    let refused = outside.zap(&["exec", "bound", "sh", "-c", "mknod /dev/log c 1 11 && : </dev/log"]).unwrap_err();
    assert!(refused.to_string().contains("not permitted"), "{refused}");
}

/// What root in a pod does to the pod's own groups of version 1, from namespaces of its own, goes with the pod: groups that it
/// made are in nobody's way, and who froze all of the pod, PID 1 too, has it end all the same. Neither is lost unnoticed.
#[test]
fn groups_of_version_1_go_with_the_pod() {
    if !fs::read_to_string("/proc/self/cgroup").unwrap().contains(":freezer:") {
        return;
    }
    let outside = Outside::new().unwrap();
    let image = outside.lab.directory().join("image");
    let inner = "mkdir /mnt/inner; echo $$ >/mnt/inner/tasks; echo FROZEN >/mnt/inner/freezer.state";
    for (pod, freezes) in [("part", inner), ("whole", "echo FROZEN >/mnt/freezer.state")] {
        let script = format!("mount -t cgroup -o freezer none /mnt; {freezes}; sleep 1000");
        let run = ["run", "-d", "-n", pod, "--net", "private", "--", "unshare", "-UrCm", "sh", "-c", &script];
        outside.zap(&run).unwrap();
        let refused = wait_until("it to be refused", || {
            match outside.zap(&["checkpoint", pod, "-o", image.to_str().unwrap(), "--leave-running"]) {
                Err(error) => Ok(error.to_string()),
                Ok(_) => {
                    fs::remove_dir_all(&image)?;
                    anyhow::bail!("{pod} has not begun")
                }
            }
        });
        let refused = refused.unwrap();
        assert!(refused.contains("freezer"), "{refused}");
        if pod == "whole" {
            let refused = outside.zap(&["exec", pod, "true"]).unwrap_err().to_string();
            assert!(refused.contains("frozen by one of its own processes"), "{refused}");
            // Nobody waits for ten seconds until those stand still who cannot be told to.
            let asked = Instant::now();
            let refused = outside.zap(&["suspend", pod]).unwrap_err().to_string();
            assert!(refused.contains("does not come to a stand"), "{refused}");
            assert!(asked.elapsed() < Duration::from_secs(5), "refused after {:?}", asked.elapsed());
        }
        outside.zap(&["rm", "-f", pod]).unwrap();
        let groups = fs::read_dir("/sys/fs/cgroup/freezer").into_iter().flatten().flatten();
        let left = groups.filter(|group| group.file_name().to_string_lossy().ends_with(&format!("-{pod}")));
        assert_eq!(left.count(), 0, "{pod} has left its group");
    }
}
