//! Options that several commands share, and how their values are spelled.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;

use crate::pod::{Bind, Publish, is_name};

/// `NAME` of a pod.
pub(super) fn pod_name(text: &str) -> Result<String, String> {
    match is_name(text) {
        true => Ok(text.to_owned()),
        false => {
            Err("a name is up to 64 letters, digits, `.`, `_` and `-`, and begins with a letter or digit".to_owned())
        }
    }
}

/// `SRC[:DST][:ro]`.
pub(super) fn bind(text: &str) -> Result<Bind, String> {
    let (paths, read_only) = match text.strip_suffix(":ro") {
        Some(paths) => (paths, true),
        None => (text.strip_suffix(":rw").unwrap_or(text), false),
    };
    let (source, target) = paths.split_once(':').unwrap_or((paths, ""));
    let source = std::path::absolute(source).map_err(|e| format!("{source}: {e}"))?;
    if !source.exists() {
        return Err(format!("{} is not there", source.display()));
    }
    let target = if target.is_empty() { source.clone() } else { PathBuf::from(target) };
    if !target.is_absolute() {
        return Err(format!("{} is not an absolute path", target.display()));
    }
    Ok(Bind { source, target, read_only })
}

/// `[ADDR:]HOSTPORT:PODPORT[/udp]`.
pub(super) fn publish(text: &str) -> Result<Publish, String> {
    let (ports, udp) = match text.split_once('/') {
        Some((ports, "udp")) => (ports, true),
        Some((ports, "tcp")) => (ports, false),
        Some((_, other)) => return Err(format!("`{other}` is neither tcp nor udp")),
        None => (text, false),
    };
    let port = |text: &str| match text.parse::<u16>() {
        Ok(port) if port > 0 => Ok(port),
        _ => Err(format!("`{text}` is not a port")),
    };
    let (host, pod) = ports.rsplit_once(':').ok_or("expected [ADDR:]HOSTPORT:PODPORT")?;
    let (address, host_port) = match host.parse::<SocketAddr>() {
        Ok(both) => (Some(both.ip()), both.port()),
        Err(_) if host.contains(':') => return Err(format!("`{host}` is not ADDR:PORT")),
        Err(_) => (None, port(host)?),
    };
    Ok(Publish { address, host_port, pod_port: port(pod)?, udp })
}

/// `ADDR[/LEN]`.
pub(super) fn address(text: &str) -> Result<(Ipv4Addr, Option<u8>), String> {
    let (address, length) = match text.split_once('/') {
        Some((address, length)) => (address, Some(length)),
        None => (text, None),
    };
    let length = length.map(|l| match l.parse() {
        Ok(l) if l <= 32 => Ok(l),
        _ => Err(format!("`{l}` is not the length of a prefix")),
    });
    let address = address.parse().map_err(|_| format!("`{address}` is not an IPv4 address"))?;
    Ok((address, length.transpose()?))
}

/// An address of either kind.
pub(super) fn any_address(text: &str) -> Result<IpAddr, String> {
    let bare = text.split('/').next().unwrap_or(text);
    bare.parse().map_err(|_| format!("`{text}` is not an address"))
}

/// Six bytes in hexadecimal.
pub(super) fn mac(text: &str) -> Result<[u8; 6], String> {
    let bytes: Result<Vec<u8>, _> = text.split([':', '-']).map(|b| u8::from_str_radix(b, 16)).collect();
    bytes.ok().and_then(|b| b.try_into().ok()).ok_or_else(|| format!("`{text}` is not a MAC address"))
}

/// `512m`, `2G`, bytes without a unit.
pub(super) fn size(text: &str) -> Result<u64, String> {
    let lower = text.to_ascii_lowercase();
    let lower = lower.trim_end_matches('b').trim_end_matches('i');
    let (number, shift) = match lower.chars().last() {
        Some('k') => (&lower[..lower.len() - 1], 10),
        Some('m') => (&lower[..lower.len() - 1], 20),
        Some('g') => (&lower[..lower.len() - 1], 30),
        Some('t') => (&lower[..lower.len() - 1], 40),
        _ => (lower, 0),
    };
    let number: u64 = number.parse().map_err(|_| format!("`{text}` is not a size such as 512m or 2g"))?;
    number.checked_mul(1 << shift).filter(|n| *n > 0).ok_or_else(|| format!("`{text}` is out of range"))
}

/// CPUs in thousandths: `1.5`.
pub(super) fn cpus(text: &str) -> Result<u64, String> {
    match text.parse::<f64>() {
        Ok(n) if (0.001..=100_000.0).contains(&n) => Ok((n * 1000.0).round() as u64),
        _ => Err(format!("`{text}` is not a number of CPUs such as 0.5 or 2")),
    }
}

/// `TERM`, `SIGTERM` or `15`.
pub(super) fn signal(text: &str) -> Result<i32, String> {
    if let Ok(number @ 1..=64) = text.parse::<i32>() {
        return Ok(number);
    }
    let upper = text.to_ascii_uppercase();
    let full = if upper.starts_with("SIG") { upper } else { format!("SIG{upper}") };
    full.parse::<nix::sys::signal::Signal>().map(|s| s as i32).map_err(|_| format!("`{text}` is not a signal"))
}

/// `KEY=VALUE`, or `KEY` for the caller's own value; a `KEY` that the caller does not have is left out.
pub(super) fn environment(entries: &[String]) -> Vec<String> {
    let spell = |entry: &String| match entry.contains('=') {
        true => Some(entry.clone()),
        false => std::env::var(entry).ok().map(|value| format!("{entry}={value}")),
    };
    entries.iter().filter_map(spell).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_are_read_as_people_write_them() {
        let tcp = Publish { address: None, host_port: 8080, pod_port: 80, udp: false };
        assert_eq!(publish("8080:80"), Ok(tcp.clone()));
        let udp = Publish { address: Some(IpAddr::from([127, 0, 0, 1])), host_port: 53, pod_port: 5353, udp: true };
        assert_eq!(publish("127.0.0.1:53:5353/udp"), Ok(udp));
        assert!(publish("[::1]:53:53").is_ok());
        for bad in ["80", "0:80", "80:99999", "x:80", "80:80/sctp", "::1:80:80"] {
            assert!(publish(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn sizes_have_units() {
        assert_eq!(size("512m"), Ok(512 << 20));
        assert_eq!(size("2GiB"), Ok(2 << 30));
        assert_eq!(size("4096"), Ok(4096));
        assert!(size("m").is_err() && size("0").is_err() && size("99999999999t").is_err());
    }

    #[test]
    fn names_are_no_paths() {
        assert!(pod_name("web-1.a").is_ok());
        for bad in ["", "..", "a/b", "-x", ".x", "a b"] {
            assert!(pod_name(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn signals_have_names_and_numbers() {
        assert_eq!((signal("term"), signal("SIGKILL"), signal("34")), (Ok(15), Ok(9), Ok(34)));
        assert!(signal("SIGNOPE").is_err() && signal("65").is_err());
    }
}
