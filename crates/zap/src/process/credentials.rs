//! Who a thread is: user and group IDs, supplementary groups, capabilities, securebits.

use serde::{Deserialize, Serialize};

use crate::process::proc_files::Status;
use crate::tracee::{Batch, Call, Results};

/// Credentials of one thread.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CredentialsState {
    /// Real, effective, saved and file system user ID.
    pub uids: [u32; 4],
    /// Real, effective, saved and file system group ID.
    pub gids: [u32; 4],
    /// Supplementary groups.
    pub groups: Vec<u32>,
    /// Inheritable, permitted, effective, bounding, ambient capabilities.
    pub capabilities: [u64; 5],
    /// `PR_GET_SECUREBITS`.
    pub securebits: u32,
    /// `no_new_privs`.
    pub no_new_privs: bool,
}

impl CredentialsState {
    /// The bounding set: capabilities that it could ever have.
    pub fn bounding(&self) -> u64 {
        self.capabilities[3]
    }

    /// Whether it is the same user with the same groups.
    pub fn is_same_user(&self, other: &CredentialsState) -> bool {
        (self.uids, self.gids, &self.groups) == (other.uids, other.gids, &other.groups)
    }
}

const PR_SET_NO_NEW_PRIVS: i32 = libc::PR_SET_NO_NEW_PRIVS;
const KEEP_CAPS: u32 = 1 << 4;
const NO_SETUID_FIXUP: u32 = 1 << 2;

/// Adds the one question that only the thread can answer.
pub fn ask(batch: &mut Batch) -> Call {
    batch.attempt(libc::SYS_prctl, [libc::PR_GET_SECUREBITS.into()])
}

/// Reads the rest from `status`.
pub fn capture(status: &Status, results: &Results, securebits: Call) -> CredentialsState {
    CredentialsState { securebits: results.get(securebits).max(0) as u32, ..of_status(status) }
}

/// What `status` tells: everything but the securebits.
pub fn of_status(status: &Status) -> CredentialsState {
    let four = |label: &str| {
        let numbers = status.numbers(label);
        std::array::from_fn(|i| numbers.get(i).copied().unwrap_or(0))
    };
    CredentialsState {
        uids: four("Uid"),
        gids: four("Gid"),
        groups: status.numbers("Groups"),
        capabilities: ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"].map(|label| status.mask(label)),
        securebits: 0,
        no_new_privs: status.field("NoNewPrivs") == Some("1"),
    }
}

/// Makes it this user, with these groups; it keeps its capabilities.
pub fn identify(state: &CredentialsState, batch: &mut Batch) {
    let keep = (KEEP_CAPS | NO_SETUID_FIXUP) as i32;
    batch.call(libc::SYS_prctl, [libc::PR_SET_SECUREBITS.into(), keep.into()], "preparing securebits");
    let groups: Vec<u8> = state.groups.iter().flat_map(|g| g.to_ne_bytes()).collect();
    let list = batch.bytes(&groups);
    batch.call(libc::SYS_setgroups, [state.groups.len().into(), list], "setting supplementary groups");
    name(state, batch);
}

/// Gives it this user and group.
pub fn name(state: &CredentialsState, batch: &mut Batch) {
    let [real, effective, saved, file] = state.gids.map(|id| u64::from(id).into());
    batch.call(libc::SYS_setresgid, [real, effective, saved], "setting group IDs");
    batch.attempt(libc::SYS_setfsgid, [file]);
    let [real, effective, saved, file] = state.uids.map(|id| u64::from(id).into());
    batch.call(libc::SYS_setresuid, [real, effective, saved], "setting user IDs");
    batch.attempt(libc::SYS_setfsuid, [file]);
}

/// Leaves it no other capabilities than these.
pub fn empower(state: &CredentialsState, batch: &mut Batch) {
    let [inheritable, permitted, effective, _, ambient] = state.capabilities;
    batch.attempt(libc::SYS_prctl, [libc::PR_CAP_AMBIENT.into(), libc::PR_CAP_AMBIENT_CLEAR_ALL.into()]);
    // Securebits need CAP_SETPCAP, which the last step may take away.
    let securebits = state.securebits as i32;
    batch.call(libc::SYS_prctl, [libc::PR_SET_SECUREBITS.into(), securebits.into()], "setting securebits");
    set_capabilities(batch, inheritable, permitted, effective);
    for capability in (0..64).filter(|c| ambient & (1 << c) != 0) {
        let raise = [libc::PR_CAP_AMBIENT.into(), libc::PR_CAP_AMBIENT_RAISE.into(), u64::into(capability)];
        batch.call(libc::SYS_prctl, raise, "raising an ambient capability");
    }
    if state.no_new_privs {
        batch.call(libc::SYS_prctl, [PR_SET_NO_NEW_PRIVS.into(), 1i32.into()], "setting no_new_privs");
    }
}

/// Takes all but these capabilities out of the bounding set: in the leader, after it has forked its children and before it
/// clones its threads, which inherit the result.
pub fn restrict(bounding: u64, batch: &mut Batch) {
    for capability in (0..64).filter(|c| bounding & (1 << c) == 0) {
        // Fails for numbers that this kernel does not know; those are not in its bounding set either.
        batch.attempt(libc::SYS_prctl, [libc::PR_CAPBSET_DROP.into(), u64::into(capability)]);
    }
}

fn set_capabilities(batch: &mut Batch, inheritable: u64, permitted: u64, effective: u64) {
    const VERSION_3: u32 = 0x2008_0522;
    let header: Vec<u8> = [VERSION_3, 0].iter().flat_map(|w| w.to_ne_bytes()).collect();
    let words = [effective, permitted, inheritable, effective >> 32, permitted >> 32, inheritable >> 32];
    let data: Vec<u8> = words.iter().flat_map(|w| (*w as u32).to_ne_bytes()).collect();
    let (header, data) = (batch.bytes(&header), batch.bytes(&data));
    batch.call(libc::SYS_capset, [header, data], "setting capabilities");
}
