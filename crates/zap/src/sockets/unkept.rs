//! What the kernel keeps of an internet socket and shows to nobody, or only once: refused by name.

use std::os::fd::BorrowedFd;

use crate::error::{CaptureError, Context};
use crate::files::Descriptor;
use crate::kernel;
use crate::look::Look;
use crate::sys::socket;

const TCP_AO_INFO: i32 = 40;
const SO_TIMESTAMPING_NEW: i32 = 65;
/// `SOF_TIMESTAMPING_OPT_ID`, and every time of something sent.
const NUMBERED: i32 = 1 << 7;
const OF_SENT: i32 = 1 | 2 | 1 << 8 | 1 << 9;

/// Refuses a socket of TCP that has something which cannot be kept. `connected`: it has a connection.
pub(super) fn refuse_tcp(descriptor: &Descriptor, connected: bool) -> Result<(), CaptureError> {
    let fd = descriptor.as_fd();
    if socket::get_bytes(fd, libc::IPPROTO_TCP, TCP_AO_INFO, &mut [0; 64]).is_ok() {
        return Err(descriptor.refuse("is protected by TCP_AO, which cannot be checkpointed yet"));
    }
    // With no room for it the kernel says that there is something, and keeps it.
    let kept = socket::get_bytes(fd, libc::IPPROTO_TCP, libc::TCP_SAVED_SYN, &mut []);
    if connected && kept.is_err_and(|e| e.raw_os_error() == Some(libc::EINVAL)) {
        let why = "keeps the packet by which its connection began (TCP_SAVE_SYN) until it is read";
        return Err(descriptor.refuse(format!("{why}, and then cannot have it again; read it, or do not ask for it")));
    }
    if connected { refuse_numbers(descriptor).and_then(|()| refuse_news(descriptor)) } else { Ok(()) }
}

/// The same of UDP.
pub(super) fn refuse_udp(descriptor: &Descriptor) -> Result<(), CaptureError> {
    refuse_numbers(descriptor)?;
    // An error that a packet brought may be lost as the packet may; a time was made here.
    if timestamping(descriptor.as_fd()) & OF_SENT != 0 { refuse_news(descriptor) } else { Ok(()) }
}

/// What is sent is numbered, and nobody can set how far that has come. If nothing has been sent so yet, as the kernel's
/// memory tells, numbers begin anew as they would have.
fn refuse_numbers(descriptor: &Descriptor) -> Result<(), CaptureError> {
    let fd = descriptor.as_fd();
    let refuse = |what: &str| {
        Err(descriptor.refuse(format!("has {what} numbered, and the kernel lets nobody set how far that has come")))
    };
    let is_without_copy = socket::get_int(fd, libc::SOL_SOCKET, libc::SO_ZEROCOPY).unwrap_or(0) != 0;
    if is_without_copy && !is_zero(fd, "sock.sk_zckey") {
        return refuse("what is sent without a copy (SO_ZEROCOPY)");
    }
    // Those of TCP are places in its stream.
    let is_stream = socket::get_int(fd, libc::SOL_SOCKET, libc::SO_TYPE).is_ok_and(|kind| kind == libc::SOCK_STREAM);
    if timestamping(fd) & NUMBERED != 0 && (is_stream || !is_zero(fd, "sock.sk_tskey")) {
        return refuse("the times of what is sent (SOF_TIMESTAMPING_OPT_ID)");
    }
    Ok(())
}

/// Whether it can be known that a counter of a socket is zero.
fn is_zero(fd: BorrowedFd<'_>, counter: &str) -> bool {
    let Ok(mut kernel) = kernel::reader() else { return false };
    let count = kernel.socket(fd).and_then(|socket| kernel.word(socket, counter));
    count.is_ok_and(|count| count == 0)
}

fn timestamping(fd: BorrowedFd<'_>) -> i32 {
    let ask = |name| socket::get_int(fd, libc::SOL_SOCKET, name).unwrap_or(0);
    ask(libc::SO_TIMESTAMPING) | ask(SO_TIMESTAMPING_NEW)
}

/// News of its error queue are given out only once.
fn refuse_news(descriptor: &Descriptor) -> Result<(), CaptureError> {
    let ready = socket::readiness(descriptor.as_fd(), 0).capturing("polling", descriptor.object())?;
    if ready & libc::POLLERR == 0 {
        return Ok(());
    }
    let why = "has an error or a time to tell that its program has not read (MSG_ERRQUEUE)";
    Err(descriptor.refuse(format!("{why}, which the kernel gives out only once; try again later")))
}

/// Refuses a socket of TCP whose packets are signed (`TCP_MD5SIG`): it cannot be asked, but the list of its network namespace
/// tells. For while the pod runs, when every process has been met.
pub(super) fn refuse_signed(look: &mut Look<'_>, descriptor: &Descriptor) -> Result<(), CaptureError> {
    let signed = look.sockets.signed(look.init, look.namespaces.networks());
    if signed.capturing("asking sock_diag about", descriptor.object())?.contains(&descriptor.stat.st_ino) {
        return Err(descriptor.refuse("has its packets signed (TCP_MD5SIG), which cannot be checkpointed yet"));
    }
    Ok(())
}
