//! Users and groups, as the pod's own files name them.

use std::fs;

/// Whom a command runs as.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct User {
    pub(super) uid: u32,
    pub(super) gid: u32,
    pub(super) groups: Vec<u32>,
    pub(super) home: String,
}

/// The user of `USER[:GROUP]`, or root.
pub(super) fn find(wanted: Option<&str>) -> Result<User, String> {
    let read = |path| fs::read(path).map(|b| String::from_utf8_lossy(&b).into_owned()).unwrap_or_default();
    resolve(wanted.unwrap_or("0"), &read("/etc/passwd"), &read("/etc/group"))
}

fn resolve(wanted: &str, passwd: &str, group: &str) -> Result<User, String> {
    let (user, group_wanted) = match wanted.split_once(':') {
        Some((user, group)) => (user, Some(group)),
        None => (wanted, None),
    };
    let entry = passwd.lines().map(fields).find(|f| f.len() >= 6 && (f[0] == user || f[2] == user));
    let (name, uid, mut gid, home) = match &entry {
        Some(f) => (f[0], number(f[2], "user", user)?, number(f[3], "group", f[3])?, f[5]),
        None => ("", number(user, "user", user)?, 0, "/"),
    };
    let mut groups = Vec::new();
    match group_wanted {
        Some(wanted) => {
            let entry = group.lines().map(fields).find(|f| f.len() >= 3 && (f[0] == wanted || f[2] == wanted));
            gid = number(entry.map_or(wanted, |f| f[2]), "group", wanted)?;
        }
        None => {
            let member = |f: &Vec<&str>| f.len() >= 4 && !name.is_empty() && f[3].split(',').any(|m| m == name);
            groups.extend(group.lines().map(fields).filter(member).filter_map(|f| f[2].parse::<u32>().ok()));
        }
    }
    if !groups.contains(&gid) {
        groups.insert(0, gid);
    }
    Ok(User { uid, gid, groups, home: home.to_owned() })
}

fn fields(line: &str) -> Vec<&str> {
    line.split(':').collect()
}

fn number(text: &str, kind: &str, wanted: &str) -> Result<u32, String> {
    text.parse().map_err(|_| format!("there is no {kind} {wanted} in the pod"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD: &str = "root:x:0:0:root:/root:/bin/bash\nwww-data:x:33:33:www:/var/www:/bin/false\n";
    const GROUP: &str = "root:x:0:\nwww-data:x:33:\nssl:x:110:www-data,mail\n";

    #[test]
    fn names_and_numbers_are_found() {
        let www = User { uid: 33, gid: 33, groups: vec![33, 110], home: "/var/www".into() };
        assert_eq!(resolve("www-data", PASSWD, GROUP).unwrap(), www);
        assert_eq!(resolve("33", PASSWD, GROUP).unwrap(), www);
        let named = resolve("www-data:ssl", PASSWD, GROUP).unwrap();
        assert_eq!((named.gid, named.groups), (110, vec![110]));
        let unknown = resolve("1234:77", PASSWD, GROUP).unwrap();
        assert_eq!((unknown.uid, unknown.gid, unknown.home.as_str()), (1234, 77, "/"));
    }

    #[test]
    fn an_unknown_name_is_named() {
        assert!(resolve("nobody-there", PASSWD, GROUP).unwrap_err().contains("nobody-there"));
    }
}
