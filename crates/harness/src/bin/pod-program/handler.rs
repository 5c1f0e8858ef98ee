//! Going on within a signal handler.
#![allow(unsafe_code)]

use std::cell::Cell;

thread_local! {
    /// What is to be done there.
    static WORK: Cell<Option<*mut &'static mut dyn FnMut()>> = const { Cell::new(None) };
}

const SIGNAL: i32 = 42;

extern "C" fn handle(_: i32) {
    if let Some(work) = WORK.take() {
        // SAFETY: whoever raised the signal waits for it in `run_within`, and has the work there.
        unsafe { (*work)() };
    }
}

/// Does some work in the handler of a signal that this thread sends itself; on the alternate stack, if it has one.
pub(super) fn run_within(work: &mut dyn FnMut()) {
    // SAFETY: the handler runs before `raise` returns, in this thread, which touches nothing of the work meanwhile.
    unsafe {
        let mut work = std::mem::transmute::<&mut dyn FnMut(), &'static mut dyn FnMut()>(work);
        WORK.set(Some(&raw mut work));
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = handle as *const () as usize;
        action.sa_flags = libc::SA_RESTART | libc::SA_ONSTACK;
        libc::sigaction(SIGNAL, &action, std::ptr::null_mut());
        libc::raise(SIGNAL);
    }
}
