//! Who a process is, and how the kernel is to treat it.

use harness::program::Op;
use nix::sys::prctl;
use nix::sys::resource::{Resource, getrlimit, setrlimit};

use super::{masks, raw};

/// What a step on them says.
pub(super) fn perform(op: &Op, slot: usize) -> String {
    match op {
        Op::User(_) if slot == 0 => "never".into(),
        // Of the thread alone: the C library's would do it for all.
        Op::User(number) => raw::become_user(1000 + u32::from(*number % 3)).to_string(),
        Op::Tune { what, value } => tune(what % 16, *value),
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
        3 => format!("death {}", raw::set_death_signal(if odd { raw::DEATH } else { 0 })),
        4 => format!("privileges {:?}", prctl::set_no_new_privs()),
        5 => format!("subreaper {:?}", prctl::set_child_subreaper(odd)),
        6 => format!("io {}", raw::set_io_priority(i32::from(value % 8))),
        7 => format!(
            "policy {}",
            raw::set_policy([libc::SCHED_OTHER, libc::SCHED_BATCH, libc::SCHED_IDLE][usize::from(value % 3)])
        ),
        8 => format!("oom {}", written("/proc/self/oom_score_adj", value.to_string())),
        9 => format!("stack {}", raw::alternate_stack(odd)),
        10 => format!("core {}", written("/proc/self/coredump_filter", format!("{:#x}", value % 64))),
        11 => format!("dumpable {:?}", prctl::set_dumpable(odd)),
        12 => format!("keep {:?}", prctl::set_keepcaps(odd)),
        13 => format!("huge pages {:?}", prctl::set_thp_disable(odd)),
        14 => format!("bounds {}", raw::drop_capability(value % 41)),
        _ => format!("personality {}", raw::set_personality(odd)),
    }
}

/// What each thread has of its own.
pub(super) fn describe_thread() -> String {
    let status = masks::shown("/proc/thread-self/status");
    let wanted = ["Uid", "Gid", "Groups", "CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb", "NoNewPrivs"];
    let lines = status.lines().filter(|line| wanted.iter().any(|name| line.starts_with(name)));
    let text: String = lines.map(|line| line.split_whitespace().collect::<Vec<_>>().join(" ") + " ").collect();
    let (slack, keep) = (prctl::get_timerslack(), prctl::get_keepcaps());
    format!("{text} slack {slack:?} death {} keep {keep:?} {}", raw::death_signal(), raw::scheduling())
}

/// All of them.
pub(super) fn describe() -> String {
    let status = masks::shown("/proc/self/status");
    let wanted = ["Threads", "SigIgn", "SigCgt"];
    let lines = status.lines().filter(|line| wanted.iter().any(|name| line.starts_with(name)));
    let mut text: String = lines.map(|line| line.split_whitespace().collect::<Vec<_>>().join(" ") + " ").collect();
    text += &describe_thread();
    let read = |name: &str| masks::shown(format!("/proc/self/{name}")).trim().to_owned();
    text += &format!(
        " subreaper {:?} oom {} core {} threads {:?} dumpable {:?} huge {:?} limits {:x} {}",
        prctl::get_child_subreaper(),
        read("oom_score_adj"),
        read("coredump_filter"),
        threads(),
        prctl::get_dumpable(),
        prctl::get_thp_disable(),
        super::channel::hash(read("limits").as_bytes()),
        ["exe", "root"].map(link).join(" "),
    );
    text + " timers " + &raw::timers()
}

fn link(name: &str) -> String {
    std::fs::read_link(format!("/proc/self/{name}")).map_or_else(|e| e.to_string(), |path| path.display().to_string())
}

/// Sets a soft limit that keeps nobody from what it does.
pub(super) fn limit(number: u8) -> String {
    let resources = [
        Resource::RLIMIT_NOFILE,
        Resource::RLIMIT_CORE,
        Resource::RLIMIT_LOCKS,
        Resource::RLIMIT_RSS,
        Resource::RLIMIT_STACK,
        Resource::RLIMIT_NICE,
    ];
    let resource = resources[usize::from(number) % resources.len()];
    let hard = getrlimit(resource).map_or(0, |(_, hard)| hard);
    let soft = if resource == Resource::RLIMIT_STACK { 8 << 20 } else { 600 };
    format!("{resource:?} {:?}", setrlimit(resource, (soft + u64::from(number)).min(hard), hard))
}

/// The names of its threads.
fn threads() -> Vec<String> {
    let tasks = std::fs::read_dir("/proc/self/task").into_iter().flatten().flatten();
    let mut names: Vec<String> = tasks.map(|task| masks::shown(task.path().join("comm")).trim().to_owned()).collect();
    names.sort();
    names
}
