//! Which capabilities the pod's processes may have.

/// Every capability by its name without `CAP_`, in order of its number.
pub const NAMES: [&str; 41] = [
    "CHOWN",
    "DAC_OVERRIDE",
    "DAC_READ_SEARCH",
    "FOWNER",
    "FSETID",
    "KILL",
    "SETGID",
    "SETUID",
    "SETPCAP",
    "LINUX_IMMUTABLE",
    "NET_BIND_SERVICE",
    "NET_BROADCAST",
    "NET_ADMIN",
    "NET_RAW",
    "IPC_LOCK",
    "IPC_OWNER",
    "SYS_MODULE",
    "SYS_RAWIO",
    "SYS_CHROOT",
    "SYS_PTRACE",
    "SYS_PACCT",
    "SYS_ADMIN",
    "SYS_BOOT",
    "SYS_NICE",
    "SYS_RESOURCE",
    "SYS_TIME",
    "SYS_TTY_CONFIG",
    "MKNOD",
    "LEASE",
    "AUDIT_WRITE",
    "AUDIT_CONTROL",
    "SETFCAP",
    "MAC_OVERRIDE",
    "MAC_ADMIN",
    "SYSLOG",
    "WAKE_ALARM",
    "BLOCK_SUSPEND",
    "AUDIT_READ",
    "PERFMON",
    "BPF",
    "CHECKPOINT_RESTORE",
];

/// What a pod gets unless told: the set that users of containers know.
const DEFAULT: [&str; 14] = [
    "CHOWN",
    "DAC_OVERRIDE",
    "FSETID",
    "FOWNER",
    "MKNOD",
    "NET_RAW",
    "SETGID",
    "SETUID",
    "SETFCAP",
    "SETPCAP",
    "NET_BIND_SERVICE",
    "SYS_CHROOT",
    "KILL",
    "AUDIT_WRITE",
];

/// A name that is no capability's.
#[derive(Debug, thiserror::Error)]
#[error("`{0}` is not a capability; try `all` or a name such as NET_ADMIN")]
pub struct UnknownCapability(pub String);

/// The set that `--cap-add` and `--cap-drop` make of the default, as sorted numbers. `drop` goes first when it says `all`,
/// last otherwise; names are taken with or without `CAP_`, in any case.
pub fn resolve(add: &[String], drop: &[String]) -> Result<Vec<u32>, UnknownCapability> {
    let add = Wanted::parse(add)?;
    let drop = Wanted::parse(drop)?;
    let mut set = if drop.all { 0 } else { mask(&DEFAULT) };
    set |= if add.all { u64::MAX >> (64 - NAMES.len()) } else { add.named };
    set &= !drop.named;
    Ok((0..NAMES.len() as u32).filter(|n| set & (1 << n) != 0).collect())
}

/// Whether a set of them, by number, has the one of that name (without `CAP_`).
pub fn includes(set: &[u32], name: &str) -> bool {
    set.iter().any(|number| NAMES.get(*number as usize) == Some(&name))
}

/// The name of a capability as programs print it: `CAP_NET_RAW`.
pub fn name(number: u32) -> String {
    NAMES.get(number as usize).map_or_else(|| format!("CAP_{number}"), |n| format!("CAP_{n}"))
}

struct Wanted {
    all: bool,
    named: u64,
}

impl Wanted {
    fn parse(names: &[String]) -> Result<Wanted, UnknownCapability> {
        let mut wanted = Wanted { all: false, named: 0 };
        for name in names {
            let upper = name.to_ascii_uppercase();
            match upper.strip_prefix("CAP_").unwrap_or(&upper) {
                "ALL" => wanted.all = true,
                short => wanted.named |= bit(short).ok_or_else(|| UnknownCapability(name.clone()))?,
            }
        }
        Ok(wanted)
    }
}

fn bit(short: &str) -> Option<u64> {
    NAMES.iter().position(|n| *n == short).map(|n| 1 << n)
}

fn mask(names: &[&str]) -> u64 {
    names.iter().filter_map(|n| bit(n)).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn resolved(add: &[&str], drop: &[&str]) -> Vec<String> {
        let owned = |names: &[&str]| names.iter().map(|n| n.to_string()).collect::<Vec<_>>();
        resolve(&owned(add), &owned(drop)).unwrap().into_iter().map(name).collect()
    }

    #[test]
    fn the_default_is_what_container_users_know() {
        let numbers = resolve(&[], &[]).unwrap();
        assert_eq!(numbers.iter().map(|n| 1u64 << n).sum::<u64>(), 0xa804_25fb);
    }

    #[test]
    fn names_are_taken_as_people_write_them() {
        assert!(resolved(&["cap_net_admin"], &[]).contains(&"CAP_NET_ADMIN".to_owned()));
        assert_eq!(resolved(&["SYS_TIME"], &["all"]), ["CAP_SYS_TIME"]);
        assert_eq!(resolved(&["ALL"], &["kill"]).len(), 40);
    }

    #[test]
    fn an_unknown_name_is_named() {
        let error = resolve(&["FLY".to_owned()], &[]).unwrap_err();
        assert!(error.to_string().contains("`FLY`"));
    }
}
