//! The system call filter of a pod's processes.

use crate::pod::Seccomp;

/// A filter, ready to be installed after a fork: nothing is allocated any more.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Filter(Vec<libc::sock_filter>);

/// What can be wrong with a profile (exit code 2).
#[derive(Debug, thiserror::Error)]
#[error("the seccomp profile: {0}")]
pub struct ProfileError(pub String);

/// The filter of a profile for a pod with these capabilities (by number); `None` for an unconfined one.
pub fn filter(_profile: &Seccomp, _capabilities: &[u32]) -> Result<Option<Filter>, ProfileError> {
    Ok(None)
}

impl Filter {
    /// Installs it in the calling thread, which must have CAP_SYS_ADMIN (so that set-user-ID programs go on working:
    /// no_new_privs is left alone). Makes one system call and nothing else, so it is safe after a fork.
    pub fn install(&self) -> std::io::Result<()> {
        crate::sys::seccomp::install(&self.0)
    }
}
