//! The way to etcd: a client made when it is needed and made anew when it is of no use any more, a deadline on
//! every call, and what etcd's answers mean. It writes nothing by itself.

use std::{
    error::Error as _,
    path::Path,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use berth_runtime::Clock;
use etcd_client::{
    Certificate, Client, ConnectOptions, Error, GetOptions, GetResponse, Identity, KvClient, TlsOptions, Txn,
    TxnResponse,
};
use tonic::Code;

use crate::store::{EtcdConfig, StoreError};

/// Longest wait for one answer, a new connection and a new login included.
const CALL_LIMIT: Duration = Duration::from_secs(5);
/// Longest wait for a connection.
const CONNECT_LIMIT: Duration = Duration::from_secs(2);
/// Pings on a connection, and the wait for their answers. etcd closes connections that ping more than every 5 s.
const PING: (Duration, Duration) = (Duration::from_secs(10), Duration::from_secs(3));

/// A way to etcd; clones share it.
#[derive(Clone)]
pub(super) struct Link {
    config: Arc<EtcdConfig>,
    clock: Clock,
    client: Arc<Mutex<Option<Client>>>,
}

impl Link {
    pub(super) fn new(config: EtcdConfig, clock: Clock) -> Self {
        Self { config: config.into(), clock, client: Arc::default() }
    }

    /// The keys that `options` name.
    pub(super) async fn get(
        &self,
        action: &'static str,
        key: impl Into<Vec<u8>>,
        options: GetOptions,
    ) -> Result<GetResponse, StoreError> {
        let key = key.into();
        let get = |mut kv: KvClient| {
            let (key, options) = (key.clone(), options.clone());
            async move { kv.get(key, Some(options)).await }
        };
        self.call(action, get).await
    }

    /// A transaction, as a whole or not at all.
    pub(super) async fn txn(&self, action: &'static str, txn: Txn) -> Result<TxnResponse, StoreError> {
        let commit = |mut kv: KvClient| {
            let txn = txn.clone();
            async move { kv.txn(txn).await }
        };
        self.call(action, commit).await
    }

    /// One call. It is made again only after a refused login, which does nothing.
    async fn call<T, F>(&self, action: &'static str, call: impl Fn(KvClient) -> F) -> Result<T, StoreError>
    where
        F: Future<Output = Result<T, Error>>,
    {
        let answer = self.clock.timeout(CALL_LIMIT, async {
            let (client, made) = self.client(action).await?;
            match call(client.kv_client()).await {
                Err(error) if !made && is_login(&error) => {}
                answer => return answer.map_err(|error| translate(action, &error)),
            }
            // The token is over, or the files hold other credentials now.
            self.forget();
            let (client, _) = self.client(action).await?;
            call(client.kv_client()).await.map_err(|error| translate(action, &error))
        });
        let answer = answer.await.unwrap_or(Err(StoreError::Elapsed { action }));
        if matches!(
            answer,
            Err(StoreError::Elapsed { .. } | StoreError::Unavailable { .. } | StoreError::Refused { .. })
        ) {
            // The next call connects anew, with the files as they are then.
            self.forget();
        }
        answer
    }

    /// The client, and whether it was made just now.
    async fn client(&self, action: &'static str) -> Result<(Client, bool), StoreError> {
        if let Some(client) = self.known().as_ref() {
            return Ok((client.clone(), false));
        }
        let options = options(&self.config).await?;
        let client = Client::connect(&self.config.endpoints, Some(options)).await;
        let client = client.map_err(|error| translate(action, &error))?;
        *self.known() = Some(client.clone());
        Ok((client, true))
    }

    fn forget(&self) {
        self.known().take();
    }

    fn known(&self) -> std::sync::MutexGuard<'_, Option<Client>> {
        self.client.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

async fn options(config: &EtcdConfig) -> Result<ConnectOptions, StoreError> {
    let mut options = ConnectOptions::new()
        .with_connect_timeout(CONNECT_LIMIT)
        .with_keep_alive(PING.0, PING.1)
        .with_keep_alive_while_idle(true)
        // A member without a majority says so instead of waiting.
        .with_require_leader(true);
    if let Some(tls) = &config.tls {
        let mut tls_options = TlsOptions::new().ca_certificate(Certificate::from_pem(read(&tls.ca).await?));
        if let Some(own) = &tls.identity {
            tls_options = tls_options.identity(Identity::from_pem(read(&own.cert).await?, read(&own.key).await?));
        }
        options = options.with_tls(tls_options);
    }
    if let Some(credentials) = &config.credentials {
        let (user, password) = (line(&credentials.user).await?, line(&credentials.password).await?);
        options = options.with_user(user, password);
    }
    Ok(options)
}

async fn read(file: &Path) -> Result<Vec<u8>, StoreError> {
    tokio::fs::read(file).await.map_err(|source| StoreError::File { file: file.to_owned(), source })
}

async fn line(file: &Path) -> Result<String, StoreError> {
    let text = tokio::fs::read_to_string(file).await;
    let text = text.map_err(|source| StoreError::File { file: file.to_owned(), source })?;
    Ok(text.trim_end_matches(['\r', '\n']).to_owned())
}

/// Whether etcd did not take the caller for who it says it is.
fn is_login(error: &Error) -> bool {
    let Error::GRpcStatus(status) = error else { return false };
    let said = |words: &str| status.message().contains(words);
    status.code() == Code::Unauthenticated || said("invalid auth token") || said("revision of auth store is old")
}

/// Whether etcd said that a request is larger than it takes.
pub(super) fn is_too_large(error: &StoreError) -> bool {
    matches!(error, StoreError::Unavailable { source, .. } if source.to_string().contains("request is too large"))
}

/// What an answer means. The words are those of etcd's `api/v3rpc/rpctypes/error.go`.
fn translate(action: &'static str, error: &Error) -> StoreError {
    let unavailable = |reason: String| StoreError::Unavailable { action, source: reason.into() };
    let Error::GRpcStatus(status) = error else { return unavailable(error.to_string()) };
    let said = |words: &str| status.message().contains(words);
    // The status says what was not done; what it came from says why.
    let mut reason = status.message().to_owned();
    let mut cause = status.source();
    while let Some(deeper) = cause {
        let text = deeper.to_string();
        if !reason.contains(&text) {
            reason = format!("{reason}: {text}");
        }
        cause = deeper.source();
    }
    if said("database space exceeded") {
        return StoreError::Full { action };
    }
    let login = ["authentication failed", "user name is empty", "authentication is not enabled", "permission denied"];
    if is_login(error) || status.code() == Code::PermissionDenied || login.iter().any(|words| said(words)) {
        return StoreError::Refused { action, reason };
    }
    unavailable(format!("etcd: {reason}"))
}

#[cfg(test)]
mod tests {
    use tonic::Status;

    use super::*;

    fn meaning(status: Status) -> StoreError {
        translate("creating", &Error::GRpcStatus(status))
    }

    #[test]
    fn every_answer_of_etcd_has_its_meaning() {
        let full = Status::resource_exhausted("etcdserver: mvcc: database space exceeded");
        assert!(meaning(full).to_string().contains("alarm NOSPACE"));
        let busy = Status::resource_exhausted("etcdserver: too many requests");
        assert!(matches!(meaning(busy), StoreError::Unavailable { .. }), "busy is not full");
        for refused in [
            Status::unauthenticated("etcdserver: invalid auth token"),
            Status::permission_denied("etcdserver: permission denied"),
            Status::invalid_argument("etcdserver: authentication failed, invalid user ID or password"),
            Status::invalid_argument("etcdserver: user name is empty"),
            Status::failed_precondition("etcdserver: authentication is not enabled"),
        ] {
            let text = meaning(refused).to_string();
            assert!(text.contains("credentialsSecret"), "{text}");
        }
        let large = meaning(Status::invalid_argument("etcdserver: request is too large"));
        assert!(is_too_large(&large), "{large}");
        assert!(!is_too_large(&meaning(Status::unavailable("etcdserver: no leader"))));
    }

    #[tokio::test]
    async fn a_missing_file_is_named() {
        let tls = crate::store::Tls { ca: "/nonexistent/ca.crt".into(), identity: None };
        let config = EtcdConfig {
            endpoints: vec!["https://127.0.0.1:1".to_owned()],
            prefix: crate::store::DEFAULT_PREFIX.to_owned(),
            tls: Some(tls),
            credentials: None,
        };
        let link = Link::new(config, Clock::real());
        let error = link.get("listing", "a", GetOptions::new()).await.unwrap_err().to_string();
        assert!(error.contains("/nonexistent/ca.crt") && error.contains("mount the Secret"), "{error}");
    }
}
