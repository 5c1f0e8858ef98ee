//! A host's key, and the hosts that it knows: two hosts that speak over a network know each other by key, both ways.
//!
//! A key is shown as the BLAKE3 of the certificate that the host made for itself, in hexadecimal.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{ClientConfig, DigitallySignedStruct, DistinguishedName, ServerConfig, SignatureScheme};

use crate::pod::{PodError, Store};

/// Why keys could not be used.
#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    /// A file could not be read or written.
    #[error("{step} {}: {source}", path.display())]
    File {
        /// What was being done.
        step: &'static str,
        /// To which file.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// The state directory could not be made.
    #[error(transparent)]
    Store(#[from] PodError),
    /// The key cannot be made or used.
    #[error("the key of this host: {0}")]
    Unusable(String),
    /// What was given is not a key.
    #[error("{0} is not a key: keys are 64 hexadecimal digits, as `zap keys` shows them on the other host")]
    NotAKey(String),
}

/// The keys of a host.
pub struct Keys {
    directory: PathBuf,
    certificate: CertificateDer<'static>,
    private: PrivateKeyDer<'static>,
}

/// A host that is known.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Known {
    /// Its key.
    pub key: String,
    /// What it is called here.
    pub name: String,
}

fn at(step: &'static str, path: &Path) -> impl FnOnce(io::Error) -> KeyError {
    move |source| KeyError::File { step, path: path.to_owned(), source }
}

fn unusable(error: impl std::fmt::Display) -> KeyError {
    KeyError::Unusable(error.to_string())
}

impl Keys {
    /// The keys of a host; its own is made if it has none yet.
    pub fn of(store: &Store) -> Result<Keys, KeyError> {
        let directory = store.state().join("keys");
        crate::pod::make_private_directory(&directory)?;
        let (certificate, private) = (directory.join("host.crt"), directory.join("host.key"));
        if !certificate.exists() {
            make(&certificate, &private)?;
        }
        let text = fs::read(&certificate).map_err(at("reading", &certificate))?;
        let secret = fs::read(&private).map_err(at("reading", &private))?;
        Ok(Keys {
            certificate: CertificateDer::from_pem_slice(&text).map_err(unusable)?,
            private: PrivateKeyDer::from_pem_slice(&secret).map_err(unusable)?,
            directory,
        })
    }

    /// The host's own key, as it is shown.
    pub fn own(&self) -> String {
        fingerprint(&self.certificate)
    }

    fn list(&self) -> PathBuf {
        self.directory.join("known")
    }

    /// The hosts that are known.
    pub fn known(&self) -> Result<Vec<Known>, KeyError> {
        let text = match fs::read_to_string(self.list()) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => String::new(),
            other => other.map_err(at("reading", &self.list()))?,
        };
        let parse = |line: &str| {
            let (key, name) = line.split_once(' ').unwrap_or((line, ""));
            Known { key: key.to_owned(), name: name.to_owned() }
        };
        Ok(text.lines().filter(|line| !line.trim().is_empty()).map(parse).collect())
    }

    /// Makes a host known.
    pub fn add(&self, key: &str, name: &str) -> Result<(), KeyError> {
        if key.len() != 64 || !key.bytes().all(|b| b.is_ascii_hexdigit()) {
            return Err(KeyError::NotAKey(key.to_owned()));
        }
        let mut known = self.known()?;
        known.retain(|other| other.key != key.to_ascii_lowercase());
        known.push(Known { key: key.to_ascii_lowercase(), name: name.replace('\n', " ") });
        self.write(&known)
    }

    /// Forgets a host, by key or name; whether it was known.
    pub fn remove(&self, which: &str) -> Result<bool, KeyError> {
        let mut known = self.known()?;
        let before = known.len();
        known.retain(|other| other.key != which && other.name != which);
        self.write(&known).map(|()| known.len() < before)
    }

    fn write(&self, known: &[Known]) -> Result<(), KeyError> {
        let text: String = known.iter().map(|k| format!("{} {}\n", k.key, k.name)).collect();
        let (path, fresh) = (self.list(), self.directory.join("known.new"));
        write_private(&fresh, text.as_bytes()).and_then(|()| fs::rename(&fresh, &path)).map_err(at("writing", &path))
    }

    fn verifier(&self) -> Result<Arc<OnlyKnown>, KeyError> {
        let known = self.known()?.into_iter().map(|known| known.key).collect();
        Ok(Arc::new(OnlyKnown { known, provider: provider() }))
    }

    /// How to speak to a host that listens.
    pub fn client(&self) -> Result<Arc<ClientConfig>, KeyError> {
        let builder = ClientConfig::builder_with_provider(provider());
        let builder = builder.with_protocol_versions(&[&rustls::version::TLS13]).map_err(unusable)?;
        let builder = builder.dangerous().with_custom_certificate_verifier(self.verifier()?);
        let config = builder.with_client_auth_cert(vec![self.certificate.clone()], self.private.clone_key());
        config.map(Arc::new).map_err(unusable)
    }

    /// How to listen.
    pub fn server(&self) -> Result<Arc<ServerConfig>, KeyError> {
        let builder = ServerConfig::builder_with_provider(provider());
        let builder = builder.with_protocol_versions(&[&rustls::version::TLS13]).map_err(unusable)?;
        let builder = builder.with_client_cert_verifier(self.verifier()?);
        let config = builder.with_single_cert(vec![self.certificate.clone()], self.private.clone_key());
        config.map(Arc::new).map_err(unusable)
    }
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

fn fingerprint(certificate: &CertificateDer<'_>) -> String {
    blake3::hash(certificate).to_hex().to_string()
}

/// A key pair, and a certificate that the host signs itself: peers look at its hash alone.
fn make(certificate: &Path, private: &Path) -> Result<(), KeyError> {
    let pair = rcgen::KeyPair::generate().map_err(unusable)?;
    let parameters = rcgen::CertificateParams::new(vec!["zap".to_owned()]).map_err(unusable)?;
    let signed = parameters.self_signed(&pair).map_err(unusable)?;
    write_private(private, pair.serialize_pem().as_bytes()).map_err(at("writing", private))?;
    write_private(certificate, signed.pem().as_bytes()).map_err(at("writing", certificate))
}

fn write_private(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut options = File::options();
    let mut file = options.write(true).create(true).truncate(true).mode(0o600).open(path)?;
    file.write_all(bytes)?;
    file.sync_all()
}

/// Believes those whose certificates are known, and nobody else.
#[derive(Debug)]
struct OnlyKnown {
    known: Vec<String>,
    provider: Arc<CryptoProvider>,
}

impl OnlyKnown {
    fn check(&self, certificate: &CertificateDer<'_>) -> Result<(), rustls::Error> {
        let key = fingerprint(certificate);
        if self.known.contains(&key) {
            return Ok(());
        }
        Err(rustls::Error::General(format!(
            "the other host\'s key is not known here; if it is the right one: zap keys --add {key}"
        )))
    }

    fn schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

impl ServerCertVerifier for OnlyKnown {
    fn verify_server_cert(
        &self,
        certificate: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        self.check(certificate).map(|()| ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(message, certificate, signed, &self.provider.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, certificate, signed, &self.provider.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.schemes()
    }
}

impl ClientCertVerifier for OnlyKnown {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        certificate: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        self.check(certificate).map(|()| ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(message, certificate, signed, &self.provider.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, certificate, signed, &self.provider.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.schemes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_has_one_key_and_knows_whom_it_was_told() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::new(Some(dir.path()));
        let keys = Keys::of(&store).unwrap();
        let own = keys.own();
        assert_eq!(Keys::of(&store).unwrap().own(), own);
        assert_eq!(keys.known().unwrap(), []);
        assert!(matches!(keys.add("nonsense", "x"), Err(KeyError::NotAKey(_))));
        keys.add(&own, "myself").unwrap();
        keys.add(&own, "me").unwrap();
        assert_eq!(keys.known().unwrap(), [Known { key: own.clone(), name: "me".into() }]);
        assert!(keys.remove("me").unwrap() && !keys.remove("me").unwrap());
        assert!(keys.verifier().unwrap().check(&keys.certificate).is_err());
    }
}
