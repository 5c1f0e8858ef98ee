//! What is on a host because of its pods.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use harness::lab::{Lab, wait_until};

/// Everything of a lab that pods could leave behind, as text, line by line.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Remains(BTreeSet<String>);

impl Remains {
    pub(crate) fn of(lab: &Lab) -> Remains {
        let mut lines = BTreeSet::new();
        let mut add = |kind: &str, text: &str| lines.extend(text.lines().map(|line| format!("{kind}: {line}")));
        let place = lab.directory().to_str().unwrap().to_owned();
        for pid in processes_of(lab, &place) {
            let command = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            add("process", &format!("{pid} {}", String::from_utf8_lossy(&command).replace('\0', " ")));
        }
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
        mounts.lines().filter(|line| mentions(line, &place)).for_each(|line| add("mount", line));
        control_groups(&lab.state()).iter().for_each(|group| add("control group", group));
        for words in
            ["ip -o link", "ip -o address", "ip -o route", "ip -o rule", "nft list ruleset", "ss -aun", "ss -atn"]
        {
            let mut words = words.split(' ');
            let mut command = Command::new(words.next().unwrap());
            let Ok(output) = lab.host().output(command.args(words)) else { continue };
            // An address that is still being checked for duplicates is there all the same.
            add("network", &String::from_utf8_lossy(&output.stdout).replace(" tentative ", " "));
        }
        let sysctls = lab.host().enter(|| {
            ["ipv4/ip_forward", "ipv6/conf/all/forwarding", "ipv4/conf/all/route_localnet"]
                .map(|name| {
                    format!("{name} {}", fs::read_to_string(format!("/proc/sys/net/{name}")).unwrap_or_default())
                })
                .concat()
        });
        add("sysctl", &sysctls.unwrap());
        files(lab.directory()).iter().for_each(|file| add("file", &file.display().to_string()));
        Remains(lines)
    }

    /// Waits until a lab is as it was.
    pub(crate) fn await_equal(lab: &Lab, before: &Remains) -> Result<(), String> {
        wait_until("the host to be as it was", || {
            let now = Remains::of(lab);
            let more: Vec<_> = now.0.difference(&before.0).collect();
            let less: Vec<_> = before.0.difference(&now.0).collect();
            anyhow::ensure!(more.is_empty() && less.is_empty(), "left: {more:#?}\ngone: {less:#?}");
            Ok(())
        })
        .map_err(|error| format!("{error:#}"))
    }
}

/// Processes in the lab's network namespace, in its control groups, or that mount or name something of it.
fn processes_of(lab: &Lab, place: &str) -> Vec<i32> {
    let in_network: BTreeSet<i32> = lab.host().processes().unwrap().into_iter().collect();
    let pids = fs::read_dir("/proc").unwrap().flatten();
    let pids = pids.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    let own = fs::read_link("/proc/self/ns/mnt").unwrap();
    let ours = |pid: &i32| {
        let read = |name: &str| fs::read(format!("/proc/{pid}/{name}")).unwrap_or_default();
        let names = |name: &str| mentions(&String::from_utf8_lossy(&read(name)), place);
        let elsewhere = fs::read_link(format!("/proc/{pid}/ns/mnt")).is_ok_and(|namespace| namespace != own);
        // The tmpfs of the lab itself is mounted wherever a mount namespace was made while the lab was there.
        in_network.contains(pid)
            || names("cmdline")
            || (elsewhere && String::from_utf8_lossy(&read("mountinfo")).contains(&format!("{place}/state")))
    };
    pids.filter(ours).collect()
}

/// Whether a text has this path in it, or one below it: the next lab's directory may begin with the same letters.
fn mentions(text: &str, place: &str) -> bool {
    text.match_indices(place).any(|(at, _)| !text[at + place.len()..].starts_with(|c: char| c.is_ascii_digit()))
}

/// Control groups that zap made for this state directory, in hierarchies of both versions.
fn control_groups(state: &Path) -> Vec<String> {
    let name = blake3_name(state);
    let groups = files(Path::new("/sys/fs/cgroup")).into_iter().map(|path| path.display().to_string());
    groups.filter(|path| path.contains(&name)).collect()
}

fn blake3_name(state: &Path) -> String {
    format!("zap-{}", &blake3::hash(state.as_os_str().as_encoded_bytes()).to_hex()[..12])
}

/// Everything under a directory.
fn files(directory: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten().map(|entry| entry.path());
    entries
        .flat_map(|path| {
            if path.is_dir() && !path.is_symlink() { [vec![path.clone()], files(&path)].concat() } else { vec![path] }
        })
        .collect()
}
