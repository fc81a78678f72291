//! Flags of the placement maps' store, for every command that reaches it: names and files to a `StoreConfig`.

use std::path::PathBuf;

use anyhow::bail;
use berth_scheduler::store::{Credentials, DEFAULT_PREFIX, EtcdConfig, Identity, StoreConfig, StoreKind, Tls};
use clap::Args;

/// Where placement maps are kept.
#[derive(Debug, Args)]
pub(crate) struct StoreArgs {
    /// Where placement maps are kept: at the API server, or in etcd.
    #[arg(long, env = "BERTH_STORE", default_value = "api", value_parser = ["api", "etcd"], help_heading = "Store")]
    store: String,
    /// Client URLs of etcd's members. With --store api: maps are taken over from there, for the way back.
    #[arg(long, env = "BERTH_ETCD_ENDPOINTS", value_delimiter = ',', help_heading = "Store")]
    etcd_endpoints: Vec<String>,
    /// What every key in etcd begins with; one for each cluster that uses it.
    #[arg(long, env = "BERTH_ETCD_PREFIX", default_value = DEFAULT_PREFIX, help_heading = "Store")]
    etcd_prefix: String,
    /// File with the certificate of etcd's authority, PEM.
    #[arg(long, env = "BERTH_ETCD_CA_FILE", help_heading = "Store")]
    etcd_ca_file: Option<PathBuf>,
    /// File with the client's certificate, PEM.
    #[arg(long, env = "BERTH_ETCD_CERT_FILE", requires = "etcd_key_file", help_heading = "Store")]
    etcd_cert_file: Option<PathBuf>,
    /// File with the key of the client's certificate, PEM.
    #[arg(long, env = "BERTH_ETCD_KEY_FILE", requires = "etcd_cert_file", help_heading = "Store")]
    etcd_key_file: Option<PathBuf>,
    /// File with the name of etcd's user.
    #[arg(long, env = "BERTH_ETCD_USER_FILE", requires = "etcd_password_file", help_heading = "Store")]
    etcd_user_file: Option<PathBuf>,
    /// File with the password of etcd's user.
    #[arg(long, env = "BERTH_ETCD_PASSWORD_FILE", requires = "etcd_user_file", help_heading = "Store")]
    etcd_password_file: Option<PathBuf>,
}

impl StoreArgs {
    /// The config that the flags mean.
    pub(crate) fn config(self) -> anyhow::Result<StoreConfig> {
        let Self {
            store,
            etcd_endpoints,
            etcd_prefix,
            etcd_ca_file,
            etcd_cert_file,
            etcd_key_file,
            etcd_user_file,
            etcd_password_file,
        } = self;
        let kind = if store == "etcd" { StoreKind::Etcd } else { StoreKind::Api };
        let identity = etcd_cert_file.zip(etcd_key_file).map(|(cert, key)| Identity { cert, key });
        if identity.is_some() && etcd_ca_file.is_none() {
            bail!("--etcd-cert-file without --etcd-ca-file: name the authority that signed etcd's own certificate");
        }
        let tls = etcd_ca_file.map(|ca| Tls { ca, identity });
        let credentials = etcd_user_file.zip(etcd_password_file).map(|(user, password)| Credentials { user, password });
        // An unset variable reads as one empty endpoint.
        let endpoints: Vec<String> = etcd_endpoints.into_iter().filter(|endpoint| !endpoint.is_empty()).collect();
        let etcd = (!endpoints.is_empty()).then_some(EtcdConfig { endpoints, prefix: etcd_prefix, tls, credentials });
        let config = StoreConfig { kind, etcd };
        config.validate()?;
        Ok(config)
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        store: StoreArgs,
    }

    fn config(line: &[&str]) -> Result<StoreConfig, String> {
        let line = Line::try_parse_from([&["berth"], line].concat()).map_err(|error| error.to_string())?;
        line.store.config().map_err(|error| error.to_string())
    }

    #[test]
    fn nothing_said_means_the_api_server() {
        let config = config(&[]).unwrap();
        assert!(config.kind == StoreKind::Api && config.etcd.is_none());
    }

    #[test]
    fn etcd_is_reached_as_the_flags_say() {
        let line = ["--store", "etcd", "--etcd-endpoints", "https://a:2379,https://b:2379", "--etcd-ca-file", "/ca"];
        let etcd = config(&line).unwrap().etcd.unwrap();
        assert_eq!((etcd.endpoints.len(), etcd.prefix.as_str()), (2, "/berth"));
        assert!(etcd.tls.is_some_and(|tls| tls.identity.is_none()) && etcd.credentials.is_none());
    }

    #[test]
    fn half_a_setting_is_refused_with_what_to_add() {
        for (line, remedy) in [
            (&["--store", "etcd"][..], "--etcd-endpoints"),
            (&["--etcd-endpoints", "https://a:1"], "--etcd-ca-file"),
            (&["--etcd-endpoints", "https://a:1", "--etcd-cert-file", "/c"], "--etcd-key-file"),
            (&["--etcd-endpoints", "https://a:1", "--etcd-cert-file", "/c", "--etcd-key-file", "/k"], "--etcd-ca-file"),
            (&["--etcd-endpoints", "http://127.0.0.1:1", "--etcd-user-file", "/u"], "--etcd-password-file"),
            (&["--store", "redis"], "etcd"),
        ] {
            let refusal = config(line).unwrap_err();
            assert!(refusal.contains(remedy), "{line:?}: {refusal}");
        }
    }
}
