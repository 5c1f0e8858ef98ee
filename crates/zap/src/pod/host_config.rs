//! What a host may be told in `STATE/config.toml`.

use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

/// The settings of a host. One state directory is one host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct HostConfig {
    /// Name of the bridge that pods are put on.
    pub bridge: String,
    /// The bridge's own address on the pods' network: their gateway.
    pub address: Subnet,
    /// Where free addresses are taken from; the whole of the network unless told.
    pub pool: Option<Subnet>,
    /// An interface to put into the bridge, so that several hosts share one network.
    pub uplink: Option<String>,
}

/// An IPv4 address with the length of its network's prefix: `198.18.0.1/16`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Subnet {
    /// The address.
    pub address: Ipv4Addr,
    /// The prefix length.
    pub prefix: u8,
}

/// What can be wrong with a host's settings.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file is there but cannot be read.
    #[error("reading {}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the kernel said.
        source: std::io::Error,
    },
    /// It says something that we do not understand.
    #[error("{}: {message}", path.display())]
    Parse {
        /// The file.
        path: PathBuf,
        /// What, and where.
        message: String,
    },
}

impl Default for HostConfig {
    fn default() -> HostConfig {
        HostConfig {
            bridge: "zap0".to_owned(),
            address: Subnet { address: Ipv4Addr::new(198, 18, 0, 1), prefix: 16 },
            pool: None,
            uplink: None,
        }
    }
}

impl HostConfig {
    /// The settings in `state/config.toml`; the defaults where there is no such file.
    pub fn load(state: &Path) -> Result<HostConfig, ConfigError> {
        let path = state.join("config.toml");
        match std::fs::read_to_string(&path) {
            Ok(text) => HostConfig::parse(&text).map_err(|message| ConfigError::Parse { path, message }),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(HostConfig::default()),
            Err(source) => Err(ConfigError::Read { path, source }),
        }
    }

    /// The settings that a text spells out.
    pub fn parse(text: &str) -> Result<HostConfig, String> {
        let config: HostConfig = toml::from_str(text).map_err(|e| e.to_string())?;
        match config.bridge.len() {
            1..=12 if !config.bridge.contains(['/', ' ', '\0']) => Ok(config),
            _ => Err(format!("bridge: `{}` is not a name of 1 to 12 characters", config.bridge)),
        }
    }
}

impl Subnet {
    /// Whether `address` is in the network.
    pub fn contains(&self, address: Ipv4Addr) -> bool {
        address.to_bits() & self.mask() == self.address.to_bits() & self.mask()
    }

    /// Every address of the network that a machine may have.
    pub fn hosts(&self) -> impl Iterator<Item = Ipv4Addr> + use<> {
        (self.first().to_bits().saturating_add(1)..self.last().to_bits()).map(Ipv4Addr::from_bits)
    }

    /// The address of the network itself.
    pub fn first(&self) -> Ipv4Addr {
        Ipv4Addr::from_bits(self.address.to_bits() & self.mask())
    }

    /// The broadcast address.
    pub fn last(&self) -> Ipv4Addr {
        Ipv4Addr::from_bits(self.address.to_bits() | !self.mask())
    }

    /// The bits that the network's addresses have in common.
    pub fn mask(&self) -> u32 {
        u32::MAX.checked_shl(32 - u32::from(self.prefix)).unwrap_or(0)
    }
}

impl std::str::FromStr for Subnet {
    type Err = String;

    fn from_str(text: &str) -> Result<Subnet, String> {
        let wrong = || format!("`{text}` is not ADDRESS/PREFIX");
        let (address, prefix) = text.split_once('/').ok_or_else(wrong)?;
        let address = address.parse().map_err(|_| wrong())?;
        let prefix = prefix.parse().ok().filter(|p| (1..=30).contains(p)).ok_or_else(wrong)?;
        Ok(Subnet { address, prefix })
    }
}

impl TryFrom<String> for Subnet {
    type Error = String;

    fn try_from(text: String) -> Result<Subnet, String> {
        text.parse()
    }
}

impl From<Subnet> for String {
    fn from(subnet: Subnet) -> String {
        subnet.to_string()
    }
}

impl std::fmt::Display for Subnet {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.address, self.prefix)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_empty_file_means_the_defaults() {
        assert_eq!(HostConfig::parse("").unwrap(), HostConfig::default());
    }

    #[test]
    fn every_setting_can_be_told() {
        let config =
            HostConfig::parse("bridge='b'\naddress='10.1.0.1/24'\npool='10.1.0.128/25'\nuplink='eth1'").unwrap();
        assert_eq!(config.address.to_string(), "10.1.0.1/24");
        let pool = config.pool.unwrap();
        assert_eq!(pool.hosts().next().unwrap().to_string(), "10.1.0.129");
        assert_eq!(pool.hosts().last().unwrap().to_string(), "10.1.0.254");
        assert!(config.address.contains(pool.address) && !pool.contains(config.address.address));
    }

    #[test]
    fn nonsense_is_refused() {
        for text in ["bridge=''", "bridge='much-too-long-a-name'", "address='10.1.0.1'", "address='10.1.0.1/33'", "x=1"]
        {
            assert!(HostConfig::parse(text).is_err(), "{text}");
        }
    }
}
