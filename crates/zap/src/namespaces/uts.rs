//! Host names.

use std::ffi::OsStr;
use std::io;
use std::os::unix::ffi::{OsStrExt, OsStringExt};

use serde::{Deserialize, Serialize};

use crate::ids::HostPid;
use crate::sys::{clone, nsfs};

/// What a machine calls itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct UtsState {
    /// `gethostname`.
    #[serde(with = "serde_bytes")]
    pub hostname: Vec<u8>,
    /// `getdomainname`.
    #[serde(with = "serde_bytes")]
    pub domain: Vec<u8>,
}

/// The names of the calling thread's namespace.
pub(super) fn capture() -> io::Result<UtsState> {
    let names = nix::sys::utsname::uname()?;
    let bytes = |name: &OsStr| name.to_owned().into_vec();
    Ok(UtsState { hostname: bytes(names.nodename()), domain: bytes(names.domainname()) })
}

impl UtsState {
    /// The names of the namespace of a process.
    pub(crate) fn of(process: HostPid) -> io::Result<UtsState> {
        let namespace = std::fs::File::open(process.proc("ns/uts"))?;
        clone::in_thread(|| {
            nsfs::enter(namespace, libc::CLONE_NEWUTS)?;
            capture()
        })
    }
}

/// Gives the caller's namespace its names.
pub(crate) fn restart(state: &UtsState) -> io::Result<()> {
    nix::unistd::sethostname(OsStr::from_bytes(&state.hostname))?;
    crate::sys::namespace::set_domain(&state.domain)
}
