//! Which store is used and how etcd is reached. Checked before anything is connected; files are read when they
//! are used, so that a Secret may change under a running scheduler.

use std::{fmt, path::PathBuf};

/// Where keys go if nothing else is said.
pub const DEFAULT_PREFIX: &str = "/berth";

/// Where maps are kept.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum StoreKind {
    /// At the API server, as PlacementMap objects.
    #[default]
    Api,
    /// In etcd.
    Etcd,
}

/// The stores.
#[derive(Clone, Debug, Default)]
pub struct StoreConfig {
    /// The one in use.
    pub kind: StoreKind,
    /// How etcd is reached. With [`StoreKind::Api`]: its maps are taken over, for the way back.
    pub etcd: Option<EtcdConfig>,
}

/// How etcd is reached.
#[derive(Clone, Debug)]
pub struct EtcdConfig {
    /// Its members' client URLs, all http:// (loopback only) or all https://.
    pub endpoints: Vec<String>,
    /// Every key begins with it; one for each cluster that uses this etcd. Starts with a slash, ends without.
    pub prefix: String,
    /// Certificates; `None` for http.
    pub tls: Option<Tls>,
    /// Who this is, where etcd asks.
    pub credentials: Option<Credentials>,
}

/// Files for TLS, PEM.
#[derive(Clone, Debug)]
pub struct Tls {
    /// Whom to trust.
    pub ca: PathBuf,
    /// Who this is, where etcd asks for a client certificate.
    pub identity: Option<Identity>,
}

/// A client certificate, PEM.
#[derive(Clone, Debug)]
pub struct Identity {
    /// The certificate.
    pub cert: PathBuf,
    /// Its key.
    pub key: PathBuf,
}

/// Files of a user's name and password; a line break at the end is dropped.
#[derive(Clone, Debug)]
pub struct Credentials {
    /// The name.
    pub user: PathBuf,
    /// The password.
    pub password: PathBuf,
}

/// A config that contradicts itself.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// etcd is to be used, and nobody says where it is.
    #[error("the store is etcd, but no endpoint is given: set --etcd-endpoints (scheduler.store.etcd.endpoints)")]
    NoEndpoints,
    /// An endpoint is no URL of a member.
    #[error("etcd endpoint {endpoint:?}: {why}")]
    Endpoint {
        /// The endpoint.
        endpoint: String,
        /// What is wrong with it and what to write.
        why: &'static str,
    },
    /// The prefix cannot be used.
    #[error("etcd prefix {0:?}: it must start with a slash and not end with one, as in /berth")]
    Prefix(String),
}

impl StoreConfig {
    /// Whether all of it can be meant.
    ///
    /// # Errors
    /// [`ConfigError`] naming the first field that cannot.
    pub fn validate(&self) -> Result<(), ConfigError> {
        match &self.etcd {
            Some(etcd) => etcd.validate(),
            None if self.kind == StoreKind::Etcd => Err(ConfigError::NoEndpoints),
            None => Ok(()),
        }
    }
}

impl EtcdConfig {
    fn validate(&self) -> Result<(), ConfigError> {
        if self.endpoints.is_empty() {
            return Err(ConfigError::NoEndpoints);
        }
        if !self.prefix.starts_with('/') || self.prefix.ends_with('/') {
            return Err(ConfigError::Prefix(self.prefix.clone()));
        }
        let wrong = |endpoint: &String| {
            let why = match (endpoint.split_once("://"), &self.tls) {
                (Some(("https", rest)), Some(_)) if !rest.is_empty() => return None,
                (Some(("https", _)), None) => "https needs the CA's certificate: set --etcd-ca-file",
                (Some(("http", _)), Some(_)) => "with certificates every endpoint must be https://",
                (Some(("http", rest)), None) if is_loopback(rest) => return None,
                (Some(("http", _)), None) => "plain text is for loopback only: use https:// and --etcd-ca-file",
                _ => "write it as https://HOST:PORT",
            };
            Some(ConfigError::Endpoint { endpoint: endpoint.clone(), why })
        };
        self.endpoints.iter().find_map(wrong).map_or(Ok(()), Err)
    }
}

/// Whether `host:port` is on this machine.
fn is_loopback(authority: &str) -> bool {
    let authority = authority.trim_end_matches('/');
    let host = authority.rsplit_once(':').map_or(authority, |(host, _)| host);
    let address = host.trim_start_matches('[').trim_end_matches(']').parse::<std::net::IpAddr>();
    host == "localhost" || address.is_ok_and(|address| address.is_loopback())
}

impl fmt::Display for StoreKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Api => "api",
            Self::Etcd => "etcd",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn etcd(endpoint: &str, tls: bool) -> EtcdConfig {
        let tls = tls.then(|| Tls { ca: PathBuf::from("ca.crt"), identity: None });
        EtcdConfig { endpoints: vec![endpoint.to_owned()], prefix: DEFAULT_PREFIX.to_owned(), tls, credentials: None }
    }

    #[test]
    fn plain_text_stays_on_this_machine() {
        for local in ["http://127.0.0.1:2379", "http://localhost:2379", "http://[::1]:2379/", "http://127.9.9.9:1"] {
            assert_eq!(etcd(local, false).validate(), Ok(()), "{local}");
        }
        for away in ["http://etcd.example:2379", "http://10.0.0.1:2379", "http://127.0.0.1.example:2379"] {
            let refused = etcd(away, false).validate().unwrap_err().to_string();
            assert!(refused.contains(away) && refused.contains("--etcd-ca-file"), "{refused}");
        }
    }

    #[test]
    fn an_endpoint_is_a_url_that_fits_the_certificates() {
        assert_eq!(etcd("https://etcd.example:2379", true).validate(), Ok(()));
        for (endpoint, tls) in [("https://a:1", false), ("http://127.0.0.1:1", true), ("a:1", true), ("ftp://a", false)]
        {
            assert!(matches!(etcd(endpoint, tls).validate(), Err(ConfigError::Endpoint { .. })), "{endpoint}");
        }
    }

    #[test]
    fn etcd_needs_endpoints_and_a_prefix_of_its_own() {
        let config = StoreConfig { kind: StoreKind::Etcd, etcd: None };
        assert_eq!(config.validate(), Err(ConfigError::NoEndpoints));
        for prefix in ["", "/", "berth", "/berth/"] {
            let config = EtcdConfig { prefix: prefix.to_owned(), ..etcd("http://127.0.0.1:1", false) };
            assert_eq!(config.validate(), Err(ConfigError::Prefix(prefix.to_owned())));
        }
        assert_eq!(StoreConfig::default().validate(), Ok(()));
    }
}
