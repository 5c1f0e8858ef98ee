//! Who a process is, and how the kernel is to treat it.

use harness::program::Op;
use nix::sys::prctl;

use super::raw;

/// What a step on them says.
pub(super) fn perform(op: &Op, slot: usize) -> String {
    match op {
        Op::User(_) if slot == 0 => "never".into(),
        Op::User(number) => raw::become_user(1000 + u32::from(*number % 3)).to_string(),
        Op::Alarm(number) => raw::alarm(*number),
        Op::Tune { what, value } => tune(what % 11, *value),
        _ => "no such thing".into(),
    }
}

fn tune(what: u8, value: u8) -> String {
    let odd = value % 2 == 1;
    let written = |path: &str, text: String| format!("{:?}", std::fs::write(path, text).map_err(|e| e.kind()));
    match what {
        0 => format!("nice {}", raw::set_nice(i32::from(value % 20))),
        1 => format!("affinity {}", raw::set_affinity(u64::from(value % 3 + 1))),
        2 => format!("slack {:?}", prctl::set_timerslack(1_000 * (u64::from(value) + 1))),
        3 => format!("death {:?}", prctl::set_pdeathsig(odd.then_some(nix::sys::signal::SIGUSR1))),
        4 => format!("privileges {:?}", prctl::set_no_new_privs()),
        5 => format!("subreaper {:?}", prctl::set_child_subreaper(odd)),
        6 => format!("io {}", raw::set_io_priority(i32::from(value % 8))),
        7 => format!(
            "policy {}",
            raw::set_policy([libc::SCHED_OTHER, libc::SCHED_BATCH, libc::SCHED_IDLE][usize::from(value % 3)])
        ),
        8 => format!("oom {}", written("/proc/self/oom_score_adj", value.to_string())),
        9 => format!("stack {}", raw::alternate_stack(odd)),
        _ => format!("core {}", written("/proc/self/coredump_filter", format!("{:#x}", value % 64))),
    }
}

/// All of them.
pub(super) fn describe() -> String {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let wanted =
        ["Uid", "Gid", "Groups", "CapInh", "CapPrm", "CapEff", "CapAmb", "NoNewPrivs", "Threads", "SigIgn", "SigCgt"];
    let lines = status.lines().filter(|line| wanted.iter().any(|name| line.starts_with(name)));
    let mut text: String = lines.map(|line| line.split_whitespace().collect::<Vec<_>>().join(" ") + " ").collect();
    let read = |name: &str| std::fs::read_to_string(format!("/proc/self/{name}")).unwrap_or_default().trim().to_owned();
    text += &format!(
        "slack {:?} death {:?} subreaper {:?} oom {} core {} {} threads {:?}",
        prctl::get_timerslack(),
        prctl::get_pdeathsig(),
        prctl::get_child_subreaper(),
        read("oom_score_adj"),
        read("coredump_filter"),
        raw::scheduling(),
        threads(),
    );
    text + " timers " + &raw::timers()
}

/// The names of its threads.
fn threads() -> Vec<String> {
    let tasks = std::fs::read_dir("/proc/self/task").into_iter().flatten().flatten();
    let mut names: Vec<String> = tasks
        .map(|task| std::fs::read_to_string(task.path().join("comm")).unwrap_or_default().trim().to_owned())
        .collect();
    names.sort();
    names
}
