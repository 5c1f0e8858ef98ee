//! Who a process is and how it is run: credentials, limits, names, directories, scheduling.

use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use crate::stage::*;

pub(crate) const KINDS: &[crate::stage::Kind] = &[
    ("credentials", credentials),
    ("capabilities", capabilities),
    ("no-new-privileges", no_new_privileges),
    ("securebits", securebits),
    ("limits", limits),
    ("names", names),
    ("umask", umask),
    ("cwd", cwd),
    ("cwd-deleted", cwd_deleted),
    ("chroot", chroot),
    ("scheduling", scheduling),
    ("oom-score", oom_score),
    ("undumpable", undumpable),
    ("login-user", login_user),
    ("personality", personality),
];

fn prctl(what: &str, args: [u64; 5]) -> Result<i64, String> {
    call(what, libc::SYS_prctl, args)
}

/// A child that becomes somebody, and a portrait of it before and after.
fn with_child(become_somebody: impl FnOnce() -> Checked, afterwards: impl FnOnce() -> Checked) -> Checked {
    let set_up = Gate::new()?;
    let child = fork(|| {
        become_somebody()?;
        set_up.open()?;
        await_go();
        afterwards()
    })?;
    set_up.pass(1)?;
    hold()?;
    reap(child)
}

fn become_user(real: u64, effective: u64, saved: u64) -> Checked {
    let groups = [7u32, 1000, 2000];
    call("setgroups", libc::SYS_setgroups, [3, groups.as_ptr() as u64])?;
    call("setresgid", libc::SYS_setresgid, [real + 100, effective + 100, saved + 100])?;
    call("setresuid", libc::SYS_setresuid, [real, effective, saved]).map(drop)
}

fn ids() -> [u32; 6] {
    let mut ids = [0u32; 6];
    unsafe {
        libc::getresuid(&raw mut ids[0], &raw mut ids[1], &raw mut ids[2]);
        libc::getresgid(&raw mut ids[3], &raw mut ids[4], &raw mut ids[5]);
    }
    ids
}

/// Nobody with groups; a user who can change back; one with another file system user.
fn credentials() -> Checked {
    with_child(
        || become_user(65534, 65534, 65534),
        || {
            equal("the user", ids(), [65534, 65534, 65534, 65634, 65634, 65634])?;
            check(unsafe { libc::setuid(0) } != 0, "nobody became root")
        },
    )
}

/// Capabilities kept over a change of user, an ambient one, a smaller bounding set.
fn capabilities() -> Checked {
    const CHOWN: u64 = 0;
    const SETUID: u64 = 7;
    const BIND: u64 = 10;
    with_child(
        || {
            prctl("PR_CAPBSET_DROP", [libc::PR_CAPBSET_DROP as u64, CHOWN, 0, 0, 0])?;
            prctl("PR_SET_KEEPCAPS", [libc::PR_SET_KEEPCAPS as u64, 1, 0, 0, 0])?;
            become_user(1000, 1000, 1000)?;
            let (some, header) = ((1u32 << SETUID | 1 << BIND), [0x2008_0522u32, 0]);
            let data = [1 << BIND, some, some, 0u32, 0, 0];
            call("capset", libc::SYS_capset, [header.as_ptr() as u64, data.as_ptr() as u64])?;
            let raise = [libc::PR_CAP_AMBIENT as u64, libc::PR_CAP_AMBIENT_RAISE as u64, BIND, 0, 0];
            prctl("PR_CAP_AMBIENT_RAISE", raise).map(drop)
        },
        || {
            let dropped = prctl("PR_CAPBSET_READ", [libc::PR_CAPBSET_READ as u64, CHOWN, 0, 0, 0])?;
            equal("a dropped capability", dropped, 0)
        },
    )
}

fn no_new_privileges() -> Checked {
    with_child(
        || {
            prctl("PR_SET_NO_NEW_PRIVS", [libc::PR_SET_NO_NEW_PRIVS as u64, 1, 0, 0, 0])?;
            become_user(1000, 1000, 1000)
        },
        || {
            let now = prctl("PR_GET_NO_NEW_PRIVS", [libc::PR_GET_NO_NEW_PRIVS as u64, 0, 0, 0, 0])?;
            equal("no_new_privs", now, 1)
        },
    )
}

fn securebits() -> Checked {
    const BITS: u64 = 0x2f; // SECBIT_NOROOT and _NO_SETUID_FIXUP, locked; _NO_CAP_AMBIENT_RAISE is left
    prctl("PR_SET_SECUREBITS", [libc::PR_SET_SECUREBITS as u64, BITS & 0xf, 0, 0, 0])?;
    let before = prctl("PR_GET_SECUREBITS", [libc::PR_GET_SECUREBITS as u64, 0, 0, 0, 0])?;
    hold()?;
    equal("securebits", prctl("PR_GET_SECUREBITS", [libc::PR_GET_SECUREBITS as u64, 0, 0, 0, 0])?, before)
}

/// Limits are in the portrait; they are also in force.
fn limits() -> Checked {
    let lower = |resource, soft, hard| {
        let limit = libc::rlimit { rlim_cur: soft, rlim_max: hard };
        done("setrlimit", unsafe { libc::setrlimit(resource, &raw const limit) }).map(drop)
    };
    lower(libc::RLIMIT_NOFILE, 40, 50)?;
    lower(libc::RLIMIT_CORE, 0, 4096)?;
    lower(libc::RLIMIT_STACK, 4 << 20, 16 << 20)?;
    lower(libc::RLIMIT_FSIZE, 1 << 20, 1 << 30)?;
    lower(libc::RLIMIT_CPU, 1000, 2000)?;
    lower(libc::RLIMIT_NPROC, 500, 600)?;
    hold()?;
    let files: Vec<_> = (0..60).map_while(|_| std::fs::File::open("/dev/null").ok()).collect();
    check(files.len() < 40, format!("{} files could be opened", files.len()))
}

/// Names of process and thread, arguments and environment as they are in memory now, the executable, the auxiliary vector.
fn names() -> Checked {
    let auxv = || std::fs::read("/proc/self/auxv").map_err(|e| e.to_string());
    let name = c"na\xff me) (";
    prctl("PR_SET_NAME", [libc::PR_SET_NAME as u64, name.as_ptr() as u64, 0, 0, 0])?;
    overwrite_last_argument()?;
    let before = auxv()?;
    let random = || unsafe { (libc::getauxval(libc::AT_RANDOM) as *const u128).read_unaligned() };
    let random_before = random();
    hold()?;
    let mut now = [0u8; 16];
    prctl("PR_GET_NAME", [libc::PR_GET_NAME as u64, now.as_mut_ptr() as u64, 0, 0, 0])?;
    check(now.starts_with(name.to_bytes()), format!("the name: {now:?}"))?;
    equal("the auxiliary vector", auxv()?, before)?;
    equal("the random bytes", random(), random_before)?;
    equal("the arguments", read("/proc/self/cmdline")?.ends_with("NAMES\0"), true)
}

/// As programs do that show their state in `ps`.
fn overwrite_last_argument() -> Checked {
    let stat = read("/proc/self/stat")?;
    let end = stat.rsplit_once(") ").and_then(|(_, rest)| rest.split(' ').nth(46)?.parse::<usize>().ok());
    let end = end.ok_or("no arg_end")?;
    unsafe { std::ptr::copy_nonoverlapping(b"NAMES".as_ptr(), (end - 6) as *mut u8, 5) };
    Ok(())
}

fn umask() -> Checked {
    unsafe { libc::umask(0o027) };
    hold()?;
    write("/tmp/masked", "")?;
    use std::os::unix::fs::PermissionsExt;
    let mode = std::fs::metadata("/tmp/masked").map_err(|e| e.to_string())?.permissions().mode();
    equal("the mode of a new file", mode & 0o777, 0o640)
}

pub(crate) fn go_to(path: &str) -> Checked {
    std::env::set_current_dir(path).map_err(|e| format!("{path}: {e}"))
}

fn make(path: &str) -> Checked {
    std::fs::create_dir_all(path).map_err(|e| format!("{path}: {e}"))
}

fn cwd() -> Checked {
    make("/tmp/here/below")?;
    write("/tmp/here/word", "here")?;
    go_to("/tmp/here/below")?;
    hold()?;
    equal("a relative file", read("../word")?, "here".into())?;
    write("new", "x")?;
    check(Path::new("/tmp/here/below/new").exists(), "a relative file went elsewhere")
}

/// A working directory that was removed.
fn cwd_deleted() -> Checked {
    make("/tmp/gone")?;
    go_to("/tmp/gone")?;
    std::fs::remove_dir("/tmp/gone").map_err(|e| e.to_string())?;
    hold()?;
    check(std::env::current_dir().is_err(), "a removed directory has a name")?;
    check(std::fs::write("new", "x").is_err(), "a file was made in a removed directory")
}

/// Another root directory. The child cannot see the driver's file there: it waits for a byte.
fn chroot() -> Checked {
    make("/tmp/cell/tmp")?;
    write("/tmp/cell/inside", "inside")?;
    let (set_up, go) = (Gate::new()?, Gate::new()?);
    let child = fork(|| {
        done("chroot", unsafe { libc::chroot(c"/tmp/cell".as_ptr()) })?;
        go_to("/tmp")?;
        set_up.open()?;
        go.pass(1)?;
        equal("a file of the new root", read("/inside")?, "inside".into())?;
        check(!Path::new("/proc").exists(), "the old root is there")
    })?;
    set_up.pass(1)?;
    hold()?;
    go.open()?;
    reap(child)
}

/// Nice value, policy, affinity, I/O priority, timer slack; each thread's own.
fn scheduling() -> Checked {
    let set_up = Gate::new()?;
    let thread = std::thread::spawn(move || -> Checked {
        done("setpriority", unsafe { libc::setpriority(libc::PRIO_PROCESS, libc::gettid() as u32, 11) })?;
        set_up.open()?;
        await_go();
        equal("a thread's nice value", unsafe { libc::getpriority(libc::PRIO_PROCESS, libc::gettid() as u32) }, 11)
    });
    set_up.pass(1)?;
    done("setpriority", unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, 5) })?;
    let none = libc::sched_param { sched_priority: 0 };
    done("sched_setscheduler", unsafe { libc::sched_setscheduler(0, libc::SCHED_BATCH, &raw const none) })?;
    call("ioprio_set", libc::SYS_ioprio_set, [1, 0, 2 << 13 | 6])?;
    prctl("PR_SET_TIMERSLACK", [libc::PR_SET_TIMERSLACK as u64, 123_456, 0, 0, 0])?;
    let mut one: libc::cpu_set_t = unsafe { std::mem::zeroed() };
    unsafe { libc::CPU_SET(0, &mut one) };
    done("sched_setaffinity", unsafe { libc::sched_setaffinity(0, size_of_val(&one), &raw const one) })?;
    hold()?;
    equal("the policy", unsafe { libc::sched_getscheduler(0) }, libc::SCHED_BATCH)?;
    equal("the nice value", unsafe { libc::getpriority(libc::PRIO_PROCESS, 0) }, 5)?;
    equal("the I/O priority", call("ioprio_get", libc::SYS_ioprio_get, [1, 0])?, 2 << 13 | 6)?;
    equal("the timer slack", prctl("PR_GET_TIMERSLACK", [libc::PR_GET_TIMERSLACK as u64, 0, 0, 0, 0])?, 123_456)?;
    thread.join().map_err(|_| "a thread panicked")?
}

fn oom_score() -> Checked {
    write("/proc/self/oom_score_adj", "321")?;
    write("/proc/self/coredump_filter", "0x7")?;
    hold()
}

fn undumpable() -> Checked {
    prctl("PR_SET_DUMPABLE", [libc::PR_SET_DUMPABLE as u64, 0, 0, 0, 0])?;
    prctl("PR_SET_THP_DISABLE", [libc::PR_SET_THP_DISABLE as u64, 1, 0, 0, 0])?;
    hold()?;
    equal("dumpable", prctl("PR_GET_DUMPABLE", [libc::PR_GET_DUMPABLE as u64, 0, 0, 0, 0])?, 0)?;
    equal("huge pages off", prctl("PR_GET_THP_DISABLE", [libc::PR_GET_THP_DISABLE as u64, 0, 0, 0, 0])?, 1)
}

fn personality() -> Checked {
    const NO_RANDOMIZE: u64 = 0x0040_0000;
    call("personality", libc::SYS_personality, [NO_RANDOMIZE])?;
    hold()?;
    equal("the personality", call("personality", libc::SYS_personality, [0xffff_ffff])?, NO_RANDOMIZE as i64)?;
    let itself = std::fs::read_link("/proc/self/exe").map_err(|e| e.to_string())?;
    check(itself.as_os_str().as_bytes().ends_with(b"pod-guest"), format!("the executable is {}", itself.display()))
}

/// Who logged in, as `sshd` and `cron` note it.
fn login_user() -> Checked {
    let child = fork(|| {
        write("/proc/self/loginuid", "1234")?;
        let grandchild = fork(|| {
            await_go();
            equal("who logged in, for a child", read("/proc/self/loginuid")?.trim(), "1234")
        })?;
        await_go();
        equal("who logged in", read("/proc/self/loginuid")?.trim(), "1234")?;
        reap(grandchild)
    })?;
    until_asleep(child)?;
    hold()?;
    reap(child)
}
