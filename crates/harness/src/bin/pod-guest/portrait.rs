//! What `/proc` says of every process of the pod: the same before and after.

use std::collections::BTreeMap;

use crate::stage::{Checked, check, read};

/// Lines by file and process.
pub(crate) type Portrait = BTreeMap<i32, BTreeMap<String, String>>;

/// Fields of `status` that tell how things are, not what they cost or which numbers the host gave.
const STATUS: &[&str] = &[
    "Name",
    "Umask",
    "Tgid",
    "Ngid",
    "PPid",
    "TracerPid",
    "Uid",
    "Gid",
    "Groups",
    "NStgid",
    "NSpid",
    "NSpgid",
    "NSsid",
    "VmLck",
    "VmExe",
    "VmLib",
    "CoreDumping",
    "THP_enabled",
    "untag_mask",
    "Threads",
    "SigPnd",
    "ShdPnd",
    "SigBlk",
    "SigIgn",
    "SigCgt",
    "CapInh",
    "CapPrm",
    "CapEff",
    "CapBnd",
    "CapAmb",
    "NoNewPrivs",
    "Seccomp",
    "Seccomp_filters",
    "Speculation_Store_Bypass",
    "SpeculationIndirectBranch",
    "Cpus_allowed",
    "Mems_allowed",
];

/// Fields of `stat`, counted from 1 as proc(5) does: family, terminal, flags of the program's own making, layout.
const STAT: &[usize] =
    &[1, 2, 4, 5, 6, 7, 8, 18, 19, 20, 26, 27, 28, 31, 32, 33, 34, 38, 40, 41, 45, 46, 47, 48, 49, 50, 51];

/// A portrait of a state that has come to rest: this program's own allocations for it are made already.
pub(crate) fn settled() -> Result<Portrait, String> {
    print!("");
    // What is freed stays on the heap, and the heap has room for all that will be there.
    unsafe { libc::mallopt(libc::M_TRIM_THRESHOLD, i32::MAX) };
    unsafe { libc::mallopt(libc::M_MMAP_THRESHOLD, 1 << 25) };
    drop([take()?, take()?, take()?]);
    take()
}

/// What `/proc` says now.
pub(crate) fn take() -> Result<Portrait, String> {
    let entries = std::fs::read_dir("/proc").map_err(|e| e.to_string())?.flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    Ok(pids.filter(|pid| *pid != 1).map(|pid| (pid, of(pid))).collect())
}

/// What nobody can do anything with any more once a process has ended.
const OF_THE_LIVING: &[&str] = &[
    "status SigBlk",
    "status SigIgn",
    "status SigCgt",
    "status SigPnd",
    "status ShdPnd",
    "stat field 20",
    "stat field 31",
    "stat field 32",
    "stat field 33",
    "stat field 34",
    "stat field 40",
    "limits",
    "timerslack_ns",
];

fn of(pid: i32) -> BTreeMap<String, String> {
    let mut lines = BTreeMap::new();
    let mut put = |key: &str, value: String| drop(lines.insert(key.to_owned(), value));
    let text = |name: &str| read(format!("/proc/{pid}/{name}")).unwrap_or_else(|e| format!("({e})"));
    for line in text("status").lines() {
        let Some((label, value)) = line.split_once(':') else { continue };
        if STATUS.contains(&label) {
            put(&format!("status {label}"), value.trim().into());
        }
        // Sleeping and running come and go; ended and stopped do not.
        if label == "State" && value.contains(['Z', 'T', 't', 'X']) {
            put("state", value.trim().into());
        }
    }
    stat(&text("stat"), &mut put);
    for name in [
        "cmdline",
        "environ",
        "limits",
        "comm",
        "oom_score_adj",
        "coredump_filter",
        "personality",
        "timerslack_ns",
        "uid_map",
        "gid_map",
        "setgroups",
    ] {
        put(name, text(name).replace('\0', " "));
    }
    for name in ["exe", "cwd", "root"] {
        put(name, link(&format!("/proc/{pid}/{name}")));
    }
    files(pid, &mut put);
    mappings(&text("smaps"), &mut put);
    if lines.get("state").is_some_and(|state| state.starts_with('Z')) {
        lines.retain(|key, _| !OF_THE_LIVING.contains(&key.as_str()));
    }
    lines
}

fn stat(text: &str, put: &mut impl FnMut(&str, String)) {
    let Some((front, back)) = text.rsplit_once(") ") else { return };
    let fields: Vec<&str> = front.splitn(2, ' ').chain(back.split_whitespace()).collect();
    for field in STAT {
        put(&format!("stat field {field}"), fields.get(field - 1).unwrap_or(&"").to_string());
    }
}

fn link(path: &str) -> String {
    std::fs::read_link(path).map_or_else(|e| format!("({e})"), |target| target.to_string_lossy().into_owned())
}

/// Every descriptor: what it shows, where it stands, how it was opened. The portrait's own are not there any more or not yet.
fn files(pid: i32, put: &mut impl FnMut(&str, String)) {
    let Ok(entries) = std::fs::read_dir(format!("/proc/{pid}/fd")) else { return };
    for entry in entries.flatten() {
        let number = entry.file_name().to_string_lossy().into_owned();
        let target = link(&format!("/proc/{pid}/fd/{number}"));
        if target.ends_with("/fd") || target == "/proc" {
            continue;
        }
        let info = read(format!("/proc/{pid}/fdinfo/{number}")).unwrap_or_default();
        let info: Vec<&str> = info.lines().filter(|l| l.starts_with("pos") || l.starts_with("flags")).collect();
        put(&format!("descriptor {number}"), format!("{} {}", unnumbered(&target), info.join(" ")));
    }
}

/// `pipe:[123]` without the number, which the host gives.
fn unnumbered(target: &str) -> &str {
    target.split_once(":[").map_or(target, |(kind, _)| kind)
}

/// A mapping: first address, address behind, and the rest of what is told.
type Mapping<'a> = (&'a str, &'a str, String);

/// Every mapping: place, protection, offset, name, flags. Inodes and devices are the host's; neighbours without a file
/// that are alike may be one mapping or two.
fn mappings(smaps: &str, put: &mut impl FnMut(&str, String)) {
    let mut all: Vec<Mapping<'_>> = Vec::new();
    for line in smaps.lines() {
        let words: Vec<&str> = line.split_whitespace().collect();
        if let Some((start, end)) = words.first().and_then(|word| word.split_once('-')) {
            let name = words.get(5..).unwrap_or_default().join(" ");
            let name = unnumbered(&name);
            all.push((start, end, format!("{} {} {name}", words[1], words[2])));
        } else if let (Some(flags), Some(mapping)) = (line.strip_prefix("VmFlags: "), all.last_mut()) {
            let flags: Vec<&str> = flags.split(' ').filter(|f| !["sd", "um", "uw", "ui", "ac"].contains(f)).collect();
            mapping.2 += &flags.join(" ");
        }
    }
    all.dedup_by(|next, before| {
        let one = before.1 == next.0 && before.2 == next.2 && before.2.contains(" 00000000 ");
        if one {
            before.1 = next.1;
        }
        one
    });
    for (start, end, what) in all {
        // A stack grows when it must, and the heap when the portrait is taken.
        let place = match &what {
            _ if what.contains("[stack]") => end.into(),
            _ if what.contains("[heap]") => start.into(),
            _ => format!("{start}-{end}"),
        };
        put(&format!("mapping {place}"), what);
    }
}

/// Everything of `before` is as it was; processes that came since are the driver's.
pub(crate) fn compare(before: &Portrait, after: &Portrait) -> Checked {
    let mut differences = Vec::new();
    for (pid, lines) in before {
        let Some(now) = after.get(pid) else {
            differences.push(format!("process {pid} is gone"));
            continue;
        };
        let keys: std::collections::BTreeSet<&String> = lines.keys().chain(now.keys()).collect();
        for key in keys.into_iter().filter(|key| lines.get(*key) != now.get(*key)) {
            let side = |value: Option<&String>| value.cloned().unwrap_or_else(|| "nothing".into());
            differences.push(format!("process {pid}: {key}: {}, not {}", side(now.get(key)), side(lines.get(key))));
        }
    }
    check(differences.is_empty(), differences.join("\n"))
}
