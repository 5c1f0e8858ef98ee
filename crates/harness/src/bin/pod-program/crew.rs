//! Threads of a process that take steps. Each waits for the order of the first one, which waits for its answer; the process is
//! lent to it meanwhile.
#![allow(unsafe_code)]

use std::cell::Cell;
use std::path::Path;
use std::ptr::null_mut;
use std::sync::atomic::{AtomicI32, AtomicPtr, AtomicU32, AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Mutex, PoisonError};

use harness::program::{Op, Step};

use super::bell::Bell;
use super::board::THREADS;
use super::{Process, handler, raw};

/// A thread, as its process knows it.
pub(super) struct Thread {
    number: usize,
    pub(super) id: i32,
    /// Mutexes that it has taken.
    pub(super) mutexes: Vec<usize>,
    /// Whether it is in a signal handler.
    pub(super) in_handler: bool,
    /// Whether it has made a child, which would be told of its end (docs/differences.md).
    pub(super) has_forked: bool,
    /// What it waits for; it takes no steps meanwhile.
    pub(super) awaits: Option<Arc<Bell>>,
    /// Where it gets its orders; the first one gets none.
    desk: Option<Arc<Desk>>,
}

/// Where one thread waits for orders.
struct Desk {
    state: AtomicU32,
    id: AtomicI32,
    process: AtomicPtr<Process>,
    step: AtomicUsize,
    said: Mutex<Option<String>>,
}

/// What a desk is: its thread begins, waits, or has an order.
const BEGINS: u32 = 0;
const WAITS: u32 = 1;
const AT_WORK: u32 = 2;

/// An order that only wants an answer.
const ROLL_CALL: usize = usize::MAX;

thread_local! {
    static NUMBER: Cell<i32> = const { Cell::new(0) };
    /// Whether this thread has directories of its own.
    static WANDERS: Cell<bool> = const { Cell::new(false) };
    /// In a child that a thread other than the first one has made: the process, whose only thread it is.
    static ADOPTED: Cell<*mut Process> = const { Cell::new(null_mut()) };
}

/// The number of this thread in its process.
pub(super) fn number() -> i32 {
    NUMBER.get()
}

/// Whether this thread is somewhere by itself.
pub(super) fn wanders() -> bool {
    WANDERS.get()
}

/// Has this thread go to places by itself from now on, if it is not the first one.
pub(super) fn wander() {
    if raw::thread_id() != nix::unistd::getpid().as_raw() {
        WANDERS.set(nix::sched::unshare(nix::sched::CloneFlags::CLONE_FS).is_ok());
    }
}

impl Thread {
    /// The only one of a process.
    pub(super) fn first() -> Thread {
        Thread {
            number: 0,
            id: raw::thread_id(),
            mutexes: Vec::new(),
            in_handler: false,
            has_forked: false,
            awaits: None,
            desk: None,
        }
    }
}

impl Desk {
    /// The process and the step that it is to take.
    fn await_order(&self) -> (*mut Process, usize) {
        while self.state.load(SeqCst) != AT_WORK {
            raw::futex_wait(&self.state, WAITS);
        }
        (self.process.load(SeqCst), self.step.load(SeqCst))
    }

    /// The process is its first thread's again.
    fn answer(&self, said: Option<String>) {
        *self.said.lock().unwrap_or_else(PoisonError::into_inner) = said;
        self.state.store(WAITS, SeqCst);
        raw::futex_wake(&self.state);
    }

    /// Gives an order and waits for the answer; nothing if the thread has ended.
    fn order(&self, process: *mut Process, step: usize) -> Option<String> {
        self.process.store(process, SeqCst);
        self.step.store(step, SeqCst);
        self.state.store(AT_WORK, SeqCst);
        raw::futex_wake(&self.state);
        self.await_answer()
    }

    fn await_answer(&self) -> Option<String> {
        self.await_idle(AT_WORK);
        self.said.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    fn await_idle(&self, before: u32) {
        while self.state.load(SeqCst) == before {
            raw::futex_wait(&self.state, before);
        }
    }

    /// Does what it is told, until the thread ends or, in a signal handler, until it comes back from that.
    fn serve(&self) {
        loop {
            let (process, now) = self.await_order();
            // SAFETY: it is lent to this thread until that answers, or its own: in a child.
            let process = unsafe { &mut *process };
            match process.steps.get(now).map(|step| &step.op) {
                None => self.answer(Some(String::new())),
                Some(Op::Await(which)) => match Bell::new(*which).map(Arc::new) {
                    Ok(bell) => {
                        process.thread_mut().awaits = Some(bell.clone());
                        self.answer(Some("waits".into()));
                        let came = bell.wait();
                        // Its descriptors are free for others as soon as it has answered.
                        drop(bell);
                        self.answer(Some(came));
                    }
                    Err(error) => self.answer(Some(error.to_string())),
                },
                Some(Op::Leave) if !process.thread().in_handler && !process.thread().has_forked => {
                    return self.answer(None);
                }
                Some(Op::Handler) if process.thread().in_handler => return,
                Some(Op::Handler) => {
                    handler::run_within(&mut || {
                        process.thread_mut().in_handler = true;
                        self.answer(Some("goes on within".into()));
                        self.serve();
                    });
                    let adopted = ADOPTED.get();
                    if adopted.is_null() {
                        process.thread_mut().in_handler = false;
                        self.answer(Some("comes back".into()));
                    } else {
                        // SAFETY: as below.
                        unsafe { &mut *adopted }.come_back();
                    }
                }
                Some(op) => match process.perform(now, op) {
                    Some(said) => self.answer(Some(said)),
                    None => ADOPTED.set(process),
                },
            }
            let adopted = ADOPTED.get();
            if !adopted.is_null() {
                // SAFETY: of what there was before the fork, nobody else is left.
                return unsafe { &mut *adopted }.run();
            }
        }
    }
}

impl Process {
    /// The thread that takes a step now.
    pub(super) fn thread(&self) -> &Thread {
        &self.threads[self.acting]
    }

    pub(super) fn thread_mut(&mut self) -> &mut Thread {
        &mut self.threads[self.acting]
    }

    /// Which thread is to take a step.
    pub(super) fn chosen(&self, step: &Step) -> usize {
        if matches!(step.op, Op::Pause) {
            return 0;
        }
        let idle: Vec<usize> = (0..self.threads.len()).filter(|at| self.threads[*at].awaits.is_none()).collect();
        idle[usize::from(step.thread) % idle.len()]
    }

    /// What it is called in the transcript.
    pub(super) fn acting_name(&self) -> String {
        let thread = self.thread().number;
        let thread = if thread == 0 { String::new() } else { format!("t{thread}") };
        format!("p{}{thread}", self.slot)
    }

    /// Has the thread whose turn it is take a step.
    pub(super) fn hand_over(&mut self, now: usize) -> String {
        let process: *mut Process = self;
        let Some(desk) = self.thread().desk.clone() else { return "not a further thread".into() };
        let said = desk.order(process, now);
        let Thread { number, id, ref awaits, .. } = self.threads[self.acting];
        if awaits.is_some() {
            Bell::await_waiter(id);
        }
        said.unwrap_or_else(|| {
            while Path::new(&format!("/proc/self/task/{id}")).exists() {
                std::thread::sleep(std::time::Duration::from_micros(200));
            }
            self.board.set_thread(self.slot, number, 0);
            "ended".into()
        })
    }

    /// Strikes the thread that has just ended off.
    pub(super) fn strike_off(&mut self) {
        let id = self.thread().id;
        if !self.board.threads(self.slot).iter().any(|(_, living)| *living == id) {
            self.threads.remove(self.acting);
        }
        self.acting = 0;
    }

    /// Waits until no thread is in the handler of a signal that came before.
    pub(super) fn call_roll(&mut self) {
        let process: *mut Process = self;
        let idle = self.threads.iter().filter(|thread| thread.awaits.is_none());
        for desk in idle.filter_map(|thread| thread.desk.clone()).collect::<Vec<_>>() {
            desk.order(process, ROLL_CALL);
        }
    }

    /// Has every other thread that does not wait take the step, too.
    pub(super) fn ask_others(&mut self, now: usize) -> String {
        let idle = (1..self.threads.len()).filter(|at| self.threads[*at].awaits.is_none());
        let idle: Vec<usize> = idle.collect();
        let mut said = String::new();
        for at in idle {
            self.acting = at;
            said += &format!(" {}: {}", self.acting_name(), self.hand_over(now));
        }
        self.acting = 0;
        said
    }

    /// Starts a thread, with what the one has that takes this step.
    pub(super) fn start_thread(&mut self, name: &str) -> String {
        if self.threads_born == THREADS {
            return "enough of them".into();
        }
        let number = self.threads_born;
        let desk = Arc::new(Desk {
            state: AtomicU32::new(BEGINS),
            id: AtomicI32::new(0),
            process: AtomicPtr::new(null_mut()),
            step: AtomicUsize::new(0),
            said: Mutex::new(None),
        });
        let own = desk.clone();
        let serve = move || {
            NUMBER.set(number as i32);
            // Rust's own is too small to go on there.
            raw::alternate_stack(false);
            own.id.store(raw::thread_id(), SeqCst);
            own.answer(None);
            own.serve();
        };
        if let Err(error) = std::thread::Builder::new().name(name.to_owned()).stack_size(512 << 10).spawn(serve) {
            return error.to_string();
        }
        desk.await_idle(BEGINS);
        let id = desk.id.load(SeqCst);
        self.board.set_thread(self.slot, number, id);
        self.threads.push(Thread { number, id, desk: Some(desk), ..Thread::first() });
        self.threads_born += 1;
        self.had_threads = true;
        format!("t{number}")
    }

    /// Ends the wait of a thread.
    pub(super) fn ring(&mut self, which: u8) -> String {
        let mut waiting: Vec<&mut Thread> = self.threads.iter_mut().filter(|thread| thread.awaits.is_some()).collect();
        let Some(at) = usize::from(which).checked_rem(waiting.len()) else { return "nobody waits".into() };
        let thread = &mut waiting[at];
        let (Some(bell), Some(desk)) = (thread.awaits.take(), &thread.desk) else { return "nobody waits".into() };
        desk.state.store(AT_WORK, SeqCst);
        bell.ring(thread.id);
        let said = desk.await_answer();
        format!("t{} {}", thread.number, said.unwrap_or_default())
    }

    /// Threads that wait, and in which call.
    pub(super) fn waiting(&self) -> String {
        let waiting = self.threads.iter().filter_map(|thread| Some((thread.number, thread.awaits.as_ref()?)));
        waiting.map(|(number, bell)| format!("t{number} {} ", bell.describe())).collect()
    }

    /// In a child: the thread that made it is its only one, and has nothing of what it took.
    pub(super) fn be_alone(&mut self) {
        let in_handler = self.thread().in_handler;
        self.threads = vec![Thread { in_handler, ..Thread::first() }];
        (self.acting, self.threads_born) = (0, 1);
        NUMBER.set(0);
    }

    /// Sends a signal with a value to one thread.
    pub(super) fn direct(&mut self, now: usize, to: u8, thread: u8, signal: u8) -> String {
        let living = self.board.living();
        let to = living[usize::from(to) % living.len()];
        let threads = self.board.threads(to);
        let (number, id) = threads[usize::from(thread) % threads.len()];
        self.board.senders[now].store(nix::unistd::getpid().as_raw(), SeqCst);
        let signal = raw::OF_THREADS[usize::from(signal) % raw::OF_THREADS.len()];
        let value = raw::DIRECTED * (number as i32 + 1) + now as i32;
        let sent = raw::send_to_thread(self.board.pid(to), id, signal, value);
        self.alarmed.push(to);
        format!("to p{to}t{number} {sent}")
    }
}
