//! What the kernel keeps of the threads of a process, of all of them in one read: what otherwise each would have to tell by
//! system calls of its own, and whether all else is as with another one, which then speaks for both.

use std::io;
use std::sync::OnceLock;

use super::Kernel;
use crate::ids::HostPid;
use crate::process::signals::AlternateStack;
use crate::sys::tasks::{self, Places, Teller};

/// Who tells of threads, once it was opened; the error is why nobody does.
static TELLS: OnceLock<io::Result<Threads>> = OnceLock::new();

/// A member of a `struct task_struct`, perhaps of a structure in it, from so many bytes on, and how many bytes.
type Member = (&'static [&'static str], i32, usize);

/// What is each thread's own.
const OWN: [Member; 10] = [
    (&["task_struct.comm"], 0, 8),
    (&["task_struct.comm"], 8, 8),
    (&["task_struct.sas_ss_sp"], 0, 8),
    (&["task_struct.sas_ss_size"], 0, 8),
    (&["task_struct.sas_ss_flags"], 0, 4),
    (&["task_struct.clear_child_tid"], 0, 8),
    (&["task_struct.robust_list"], 0, 8),
    (&["task_struct.pdeath_signal"], 0, 4),
    (&["task_struct.timer_slack_ns"], 0, 8),
    (&["task_struct.pending", "sigpending.signal"], 0, 8),
];

/// What threads have in common, ordinarily: what they share, by where the kernel has it, and switches.
const COMMON: [Member; 12] = [
    (&["task_struct.flags"], 0, 4),
    (&["task_struct.thread_info", "thread_info.flags"], 0, 8),
    (&["task_struct.thread_info", "thread_info.syscall_work"], 0, 8),
    (&["task_struct.atomic_flags"], 0, 8),
    (&["task_struct.files"], 0, 8),
    (&["task_struct.fs"], 0, 8),
    (&["task_struct.cred"], 0, 8),
    (&["task_struct.personality"], 0, 4),
    // Mode and number of filters, and the newest of these.
    (&["task_struct.seccomp"], 0, 8),
    (&["task_struct.seccomp"], 8, 8),
    (&["task_struct.mempolicy"], 0, 8),
    (&["task_struct.sysvsem"], 0, 8),
];
/// Of these two, most bits are the kernel's affair.
const FLAGS: usize = 0;
const MORE_FLAGS: usize = 1;

/// What a kernel without memory nodes, or without System V semaphores, does not have: it cannot differ.
const MISSING: [&str; 2] = ["task_struct.mempolicy", "task_struct.sysvsem"];

/// What the kernel has of a thread.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Told {
    /// Its number, as we see it.
    pub(crate) thread: HostPid,
    /// `comm`, with zeros behind it.
    pub(crate) name: [u8; 16],
    /// The alternate signal stack.
    pub(crate) alternate_stack: AlternateStack,
    /// `set_tid_address`.
    pub(crate) clear_tid: u64,
    /// Where its list of robust futexes begins.
    pub(crate) robust_list: u64,
    /// Parent-death signal.
    pub(crate) death_signal: i32,
    /// Timer slack in ns.
    pub(crate) timer_slack: u64,
    /// Whether signals wait for this thread alone.
    pub(crate) has_signals: bool,
    common: [u64; COMMON.len()],
}

impl Told {
    /// Whether both have the same descriptor table, directories, undo list, credentials, filters, memory policy and
    /// personality, and whatever else they have set that is not told.
    pub(crate) fn is_like(&self, other: &Told) -> bool {
        self.common == other.common
    }
}

struct Threads {
    teller: Teller,
    /// The bits that switches leave in the flags of a thread.
    switches: [u64; 2],
}

impl Threads {
    fn open(kernel: &Kernel) -> io::Result<Threads> {
        let [_, function] = kernel.tellers;
        // Before Linux 6.1 those of every process would be told; this is a member since 6.4.
        let function = function.filter(|_| kernel.has("mm_struct.mm_lock_seq")).ok_or(io::ErrorKind::Unsupported)?;
        let offset = |path: &[&str]| {
            path.iter().map(|member| kernel.members.get(member).map(|at| *at as i32)).sum::<Option<i32>>()
        };
        let place = |&(path, further, size): &Member| {
            let is_missing = MISSING.contains(&path[0]) && !kernel.has(path[0]);
            let path = if is_missing { &["task_struct.files"] } else { path };
            offset(path).map(|offset| (offset + further, size)).ok_or(io::ErrorKind::Unsupported)
        };
        let number =
            kernel.members["pid.numbers"] + kernel.level as u64 * kernel.sizes["upid"] + kernel.members["upid.nr"];
        let places = Places {
            pid: kernel.members["task_struct.thread_pid"] as i32,
            number: number as i32,
            members: OWN.iter().chain(&COMMON).map(place).collect::<Result<_, _>>()?,
        };
        let mut threads = Threads { teller: Teller::open(function, &places)?, switches: [u64::MAX; 2] };
        threads.switches = threads.learn()?;
        Ok(threads)
    }

    fn read(&self, process: HostPid) -> io::Result<Vec<Told>> {
        let mut all = Vec::new();
        self.teller.read(process.0, |thread, word| {
            let mut common = std::array::from_fn(|place| word(OWN.len() + place));
            common[FLAGS] &= self.switches[0];
            common[MORE_FLAGS] &= self.switches[1];
            all.push(told(thread, word, common));
        })?;
        Ok(all)
    }

    /// The bits that the switches of a thread leave in its flags: reading the time stamp counter, what memory errors do, what
    /// becomes of the cache when another runs. Others that change meanwhile make threads seem unlike that are not.
    fn learn(&self) -> io::Result<[u64; 2]> {
        /// Of `prctl(2)`: the option, what sets it, and what puts it back.
        const SWITCHES: [(i32, [i32; 2], [i32; 2]); 3] = [
            (libc::PR_SET_TSC, [libc::PR_TSC_SIGSEGV, 0], [libc::PR_TSC_ENABLE, 0]),
            (libc::PR_MCE_KILL, [libc::PR_MCE_KILL_SET, libc::PR_MCE_KILL_EARLY], [libc::PR_MCE_KILL_CLEAR, 0]),
            (libc::PR_SET_SPECULATION_CTRL, [L1D_FLUSH, PR_SPEC_ENABLE], [L1D_FLUSH, PR_SPEC_DISABLE]),
        ];
        const L1D_FLUSH: i32 = 2;
        const PR_SPEC_ENABLE: i32 = 1 << 1;
        const PR_SPEC_DISABLE: i32 = 1 << 2;
        let process = HostPid(std::process::id() as i32);
        let flags = || {
            let own = nix::unistd::gettid().as_raw();
            let all = self.read(process)?;
            let own = all.iter().find(|told| told.thread.0 == own).ok_or(io::ErrorKind::NotFound)?;
            io::Result::Ok([own.common[FLAGS], own.common[MORE_FLAGS]])
        };
        let learn = || {
            let mut bits = [0; 2];
            // Some are inherited, from whoever began zap.
            for (option, _, back) in SWITCHES {
                let _ = tasks::set_switch(option, back);
            }
            let before = flags()?;
            for (option, set, back) in SWITCHES {
                // What there is not cannot be set by anybody.
                if tasks::set_switch(option, set).is_ok() {
                    let now = flags();
                    tasks::set_switch(option, back)?;
                    bits.iter_mut()
                        .zip(before.iter().zip(now?))
                        .for_each(|(bits, (before, now))| *bits |= before ^ now);
                }
            }
            Ok(bits)
        };
        // A thread that nobody else needs: it cannot read a clock meanwhile.
        std::thread::scope(|scope| scope.spawn(learn).join().unwrap_or_else(|_| Err(io::ErrorKind::Other.into())))
    }
}

fn told(thread: i32, word: &dyn Fn(usize) -> u64, common: [u64; COMMON.len()]) -> Told {
    /// Bits of the flags of an alternate stack that are kept as they were given.
    const KEPT: i32 = 1 << 31;
    let mut name = [0; 16];
    name[..8].copy_from_slice(&word(0).to_ne_bytes());
    name[8..].copy_from_slice(&word(1).to_ne_bytes());
    let disabled = if word(3) == 0 { libc::SS_DISABLE } else { 0 };
    Told {
        thread: HostPid(thread),
        name,
        alternate_stack: AlternateStack { address: word(2), size: word(3), flags: disabled | word(4) as i32 & KEPT },
        clear_tid: word(5),
        robust_list: word(6),
        death_signal: word(7) as i32,
        timer_slack: word(8),
        has_signals: word(9) != 0,
        common,
    }
}

/// What the kernel has of the threads of a process; `None` where nobody tells. Only of threads that stand still it stays true.
pub(crate) fn of(process: HostPid) -> Option<Vec<Told>> {
    TELLS.get()?.as_ref().ok()?.read(process).ok()
}

/// Whether somebody tells.
pub(crate) fn are_told() -> bool {
    TELLS.get().is_some_and(Result::is_ok)
}

/// Opens what tells of threads, if it may be: it takes some milliseconds, once.
pub(crate) fn open() {
    let open = || Threads::open(&*super::reader().map_err(io::Error::other)?);
    if let Err(error) = TELLS.get_or_init(open) {
        tracing::info!(%error, "threads are asked one by one");
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use nix::sched::{CloneFlags, unshare};
    use nix::sys::signal::{self, SigSet, Signal};

    use super::*;
    use crate::sys::{sched, testing};

    /// What is told of this thread, and of another one that has done something and stands still.
    fn pair<R: Send>(act: impl FnOnce() -> R + Send) -> (Told, Told, R) {
        open();
        let tid = || HostPid(nix::unistd::gettid().as_raw());
        std::thread::scope(|scope| {
            let ((say, hear), (end, wait)) = (mpsc::channel(), mpsc::channel::<()>());
            scope.spawn(move || {
                let result = act();
                say.send((tid(), result)).unwrap();
                let _ = wait.recv();
            });
            let (other, result) = hear.recv().unwrap();
            let all = of(HostPid(std::process::id() as i32)).unwrap();
            drop(end);
            let of = |thread| *all.iter().find(|told| told.thread == thread).unwrap();
            (of(tid()), of(other), result)
        })
    }

    #[test]
    fn what_is_told_is_what_the_thread_would_tell() {
        let (first, told, (stack, clear_tid, robust_list)) = pair(|| {
            nix::sys::prctl::set_name(c"a name of fifte").unwrap();
            tasks::set_switch(libc::PR_SET_PDEATHSIG, [libc::SIGUSR1, 0]).unwrap();
            tasks::set_switch(libc::PR_SET_TIMERSLACK, [12_345, 0]).unwrap();
            SigSet::from(Signal::SIGUSR2).thread_block().unwrap();
            signal::raise(Signal::SIGUSR2).unwrap();
            let own = HostPid(nix::unistd::gettid().as_raw());
            (testing::alternate_stack(), testing::clear_tid(), sched::robust_list(own).unwrap())
        });
        assert_eq!(&told.name, b"a name of fifte\0");
        assert_eq!((told.death_signal, told.timer_slack), (libc::SIGUSR1, 12_345));
        let AlternateStack { address, flags, size } = told.alternate_stack;
        assert_eq!([address, flags as u64, size], stack);
        assert!(size > 0 && told.clear_tid != 0 && told.robust_list != 0);
        assert_eq!((told.clear_tid, (told.robust_list, 24)), (clear_tid, robust_list));
        assert!(told.has_signals && !first.has_signals);
        assert!(first.death_signal == 0 && first.timer_slack != told.timer_slack && first.clear_tid != told.clear_tid);
        assert!(first.is_like(&told));
    }

    #[test]
    fn who_has_set_something_that_is_not_told_is_not_like_others() {
        let set = |option, values| move || tasks::set_switch(option, values);
        let (first, other, done) = pair(set(libc::PR_SET_TSC, [libc::PR_TSC_SIGSEGV, 0]));
        assert!(done.is_ok() && !first.is_like(&other));
        for (option, values) in [
            (libc::PR_MCE_KILL, [libc::PR_MCE_KILL_SET, libc::PR_MCE_KILL_EARLY]),
            (libc::PR_MCE_KILL, [libc::PR_MCE_KILL_SET, libc::PR_MCE_KILL_LATE]),
            (libc::PR_SET_NO_NEW_PRIVS, [1, 0]),
            (libc::PR_SET_SECUREBITS, [1 << 4, 0]),
            (libc::PR_SET_SPECULATION_CTRL, [0, 1 << 2]),
        ] {
            let (first, other, done) = pair(set(option, values));
            match done {
                Ok(()) => assert!(!first.is_like(&other), "{option} {values:?}"),
                Err(error) => println!("skipped: switch {option} {values:?}: {error}"),
            }
        }
        let persona = nix::sys::personality::Persona::UNAME26;
        for (first, other, ()) in [
            pair(|| unshare(CloneFlags::CLONE_FS).unwrap()),
            pair(|| unshare(CloneFlags::CLONE_FILES).unwrap()),
            pair(|| nix::sys::personality::set(persona).map(|_| ()).unwrap()),
            pair(|| testing::over(libc::SYS_set_mempolicy, 4, 0, 0)),
        ] {
            assert!(!first.is_like(&other));
        }
        let (first, other, ()) = pair(|| ());
        assert!(first.is_like(&other));
    }
}
