//! The system call filter of a pod's processes.

mod docker;
mod names;
mod program;
mod standard;

use crate::pod::{Seccomp, capabilities};

/// A filter, ready to be installed after a fork: nothing is allocated any more.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Filter(Vec<libc::sock_filter>);

/// What can be wrong with a profile (exit code 2).
#[derive(Debug, thiserror::Error)]
#[error("the seccomp profile: {0}")]
pub struct ProfileError(pub String);

/// The filter of a profile for a pod with these capabilities (by number); `None` for an unconfined one.
pub fn filter(profile: &Seccomp, capabilities: &[u32]) -> Result<Option<Filter>, ProfileError> {
    let allowed = |name: &str| capabilities::includes(capabilities, name.strip_prefix("CAP_").unwrap_or(name));
    let decisions = match profile {
        Seccomp::Unconfined => return Ok(None),
        Seccomp::Default => standard::decisions(allowed),
        Seccomp::Profile(text) => docker::decisions(text, allowed, &kernel())?,
    };
    Ok(Some(Filter(decisions.compile()?)))
}

fn kernel() -> String {
    nix::sys::utsname::uname().map(|u| u.release().to_string_lossy().into_owned()).unwrap_or_default()
}

impl Filter {
    /// Installs it in the calling thread, which must have CAP_SYS_ADMIN (so that set-user-ID programs go on working:
    /// no_new_privs is left alone). Makes one system call and nothing else, so it is safe after a fork.
    pub fn install(&self) -> std::io::Result<()> {
        crate::sys::seccomp::install(&self.0)
    }

    /// The number of its instructions.
    pub fn instructions(&self) -> usize {
        self.0.len()
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;

    fn installed<T: Send + 'static>(capabilities: &[u32], act: impl FnOnce() -> T + Send + 'static) -> T {
        let filter = filter(&Seccomp::Default, capabilities).unwrap().unwrap();
        let filtered = std::thread::spawn(move || {
            filter.install().unwrap();
            act()
        });
        filtered.join().unwrap()
    }

    fn error(call: impl FnOnce() -> i64) -> i32 {
        if call() < 0 { std::io::Error::last_os_error().raw_os_error().unwrap() } else { 0 }
    }

    #[test]
    fn what_reaches_outside_or_cannot_be_saved_is_denied() {
        let errors = installed(&[], || {
            use crate::sys::seccomp::probe;
            [libc::SYS_kexec_load, libc::SYS_bpf, libc::SYS_io_uring_setup, libc::SYS_landlock_create_ruleset, 500]
                .map(|number| error(|| probe(number)))
        });
        assert_eq!(errors, [libc::EPERM, libc::EPERM, libc::ENOSYS, libc::ENOSYS, libc::ENOSYS]);
    }

    #[test]
    fn sockets_that_lead_to_the_hypervisor_are_denied_and_others_are_not() {
        use std::net::UdpSocket;
        let (vsock, udp) = installed(&[], || {
            use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};
            let vsock = socket(AddressFamily::Vsock, SockType::Stream, SockFlag::empty(), None);
            (vsock.unwrap_err(), UdpSocket::bind("127.0.0.1:0").is_ok())
        });
        assert_eq!(vsock, nix::Error::EAFNOSUPPORT);
        assert!(udp);
    }

    #[test]
    fn a_capability_lifts_what_it_is_for() {
        let allowed = installed(&capabilities::resolve(&["bpf".to_owned()], &[]).unwrap(), || {
            error(|| crate::sys::seccomp::probe(libc::SYS_bpf))
        });
        assert_ne!(allowed, libc::EPERM);
    }

    /// Not a judgement but a record: printed, with a limit that only something broken passes.
    #[test]
    fn a_filtered_call_costs_little() {
        fn getpid() -> f64 {
            // Many short runs: the least of them was not disturbed.
            const CALLS: u32 = 10_000;
            let best = (0..100).map(|_| {
                let started = Instant::now();
                for _ in 0..CALLS {
                    std::hint::black_box(nix::unistd::getppid());
                }
                started.elapsed().as_nanos() as f64 / f64::from(CALLS)
            });
            best.fold(f64::INFINITY, f64::min)
        }
        let bare = std::thread::spawn(getpid).join().unwrap();
        let filtered = installed(&[], getpid);
        let length = filter(&Seccomp::Default, &[]).unwrap().unwrap().instructions();
        println!("getppid: {bare:.1} ns bare, {filtered:.1} ns filtered by {length} instructions");
        assert!(filtered < bare + 2000.0);
    }
}
