//! Profiles in the JSON that container engines share.

use std::collections::BTreeMap;

use serde::Deserialize;

use super::program::{Action, Comparison, Condition, Decisions};
use super::{ProfileError, names};

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Profile {
    default_action: String,
    default_errno_ret: Option<u16>,
    #[serde(default)]
    syscalls: Vec<Rule>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Rule {
    #[serde(default)]
    names: Vec<String>,
    /// As older profiles have it.
    name: Option<String>,
    action: String,
    errno_ret: Option<u16>,
    #[serde(default)]
    args: Option<Vec<Argument>>,
    #[serde(default)]
    includes: Scope,
    #[serde(default)]
    excludes: Scope,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Argument {
    index: u32,
    value: u64,
    #[serde(default)]
    value_two: u64,
    op: String,
}

/// Where a rule applies.
#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Scope {
    #[serde(default)]
    caps: Vec<String>,
    #[serde(default)]
    arches: Vec<String>,
    min_kernel: Option<String>,
}

/// What a profile decides for a pod with these capabilities on this kernel (`major.minor…`).
pub(super) fn decisions(text: &str, allowed: impl Fn(&str) -> bool, kernel: &str) -> Result<Decisions, ProfileError> {
    let profile: Profile = serde_json::from_str(text).map_err(|e| ProfileError(e.to_string()))?;
    let otherwise = action(&profile.default_action, profile.default_errno_ret)?;
    let mut decisions = Decisions { by_number: BTreeMap::new(), otherwise };
    for rule in profile.syscalls.iter().filter(|rule| rule.applies(&allowed, kernel)) {
        let action = action(&rule.action, rule.errno_ret)?;
        let conditions = rule.args.iter().flatten().map(Argument::condition).collect::<Result<Vec<_>, _>>()?;
        // Names of calls that other architectures have are in every profile.
        for number in rule.names.iter().chain(&rule.name).filter_map(|name| names::number(name)) {
            decisions.add(number, conditions.clone(), action);
        }
    }
    Ok(decisions)
}

fn action(name: &str, errno: Option<u16>) -> Result<Action, ProfileError> {
    Ok(match name {
        "SCMP_ACT_ALLOW" => Action::Allow,
        "SCMP_ACT_ERRNO" => Action::Fail(errno.unwrap_or(libc::EPERM as u16)),
        "SCMP_ACT_KILL" | "SCMP_ACT_KILL_THREAD" => Action::KillThread,
        "SCMP_ACT_KILL_PROCESS" => Action::KillProcess,
        "SCMP_ACT_TRAP" => Action::Trap,
        "SCMP_ACT_LOG" => Action::Log,
        _ => return Err(ProfileError(format!("the action `{name}` is not known here"))),
    })
}

impl Rule {
    fn applies(&self, allowed: &impl Fn(&str) -> bool, kernel: &str) -> bool {
        let included = self.includes.caps.iter().all(|c| allowed(c))
            && (self.includes.arches.is_empty() || self.includes.is_for_this_architecture())
            && self.includes.min_kernel.as_deref().is_none_or(|least| version(kernel) >= version(least));
        let excluded = self.excludes.caps.iter().any(|c| allowed(c)) || self.excludes.is_for_this_architecture();
        included && !excluded
    }
}

impl Scope {
    fn is_for_this_architecture(&self) -> bool {
        self.arches.iter().any(|a| matches!(a.as_str(), "amd64" | "x86-64" | "x86_64"))
    }
}

/// Major and minor number of a kernel: `6.1.0-18-amd64` is (6, 1).
fn version(text: &str) -> (u32, u32) {
    let mut numbers = text.split(|c: char| !c.is_ascii_digit()).map(|n| n.parse().unwrap_or(0));
    (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0))
}

impl Argument {
    fn condition(&self) -> Result<Condition, ProfileError> {
        let (comparison, value) = match self.op.as_str() {
            "SCMP_CMP_EQ" => (Comparison::Equal, self.value),
            "SCMP_CMP_NE" => (Comparison::NotEqual, self.value),
            "SCMP_CMP_LT" => (Comparison::Less, self.value),
            "SCMP_CMP_LE" => (Comparison::LessOrEqual, self.value),
            "SCMP_CMP_GT" => (Comparison::Greater, self.value),
            "SCMP_CMP_GE" => (Comparison::GreaterOrEqual, self.value),
            "SCMP_CMP_MASKED_EQ" => (Comparison::Masked(self.value), self.value_two),
            other => return Err(ProfileError(format!("the comparison `{other}` is not known here"))),
        };
        match self.index {
            0..6 => Ok(Condition { argument: self.index, comparison, value }),
            other => Err(ProfileError(format!("no system call has an argument {other}"))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PROFILE: &str = r#"{
        "defaultAction": "SCMP_ACT_ERRNO", "defaultErrnoRet": 1,
        "archMap": [{"architecture": "SCMP_ARCH_X86_64", "subArchitectures": []}],
        "syscalls": [
            {"names": ["read", "write", "socketcall"], "action": "SCMP_ACT_ALLOW"},
            {"names": ["clone"], "action": "SCMP_ACT_ALLOW",
             "args": [{"index": 0, "value": 2114060288, "valueTwo": 0, "op": "SCMP_CMP_MASKED_EQ"}],
             "excludes": {"caps": ["CAP_SYS_ADMIN"], "arches": ["s390"]}},
            {"names": ["clone3"], "action": "SCMP_ACT_ERRNO", "errnoRet": 38},
            {"names": ["bpf"], "action": "SCMP_ACT_ALLOW", "includes": {"caps": ["CAP_BPF"]}},
            {"names": ["process_vm_readv"], "action": "SCMP_ACT_ALLOW", "includes": {"minKernel": "4.8"}}
        ]}"#;

    fn decided(allowed: &str, kernel: &str, call: &str) -> Option<Decision> {
        let all = decisions(PROFILE, |c| c == allowed, kernel).unwrap();
        all.by_number.get(&names::number(call).unwrap()).cloned()
    }

    use super::super::program::Decision;

    #[test]
    fn rules_apply_where_they_say() {
        let allow = Decision { rules: vec![(vec![], Action::Allow)] };
        assert_eq!(decided("", "6.1.0-18-amd64", "read"), Some(allow.clone()));
        assert_eq!(decided("", "6.1.0", "bpf"), None);
        assert_eq!(decided("CAP_BPF", "6.1.0", "bpf"), Some(allow.clone()));
        assert_eq!(decided("CAP_SYS_ADMIN", "6.1.0", "clone"), None);
        assert_eq!(decided("", "4.8", "process_vm_readv"), Some(allow));
        assert_eq!(decided("", "4.7.9", "process_vm_readv"), None);
        assert_eq!(decided("", "6.1", "clone3").unwrap().rules[0].1, Action::Fail(38));
    }

    #[test]
    fn what_is_not_understood_is_refused() {
        for text in ["", "{}", r#"{"defaultAction": "SCMP_ACT_DANCE"}"#] {
            assert!(decisions(text, |_| false, "6.1").is_err());
        }
    }
}
