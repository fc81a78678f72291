//! How a client finds the leader: the Lease says who holds it and where. It is read when connecting,
//! never watched; a stale answer costs one refused connection and another look.

use std::{fmt, net::SocketAddr, str::FromStr, time::Duration};

use k8s_openapi::api::coordination::v1::Lease;
use kube::{Api, Client, api::GetParams};
use rand::Rng;

use crate::{Clock, clock::Elapsed};

const CALL_LIMIT: Duration = Duration::from_secs(5);

/// A `holderIdentity`: `<pod>@<ip:port>`, where the port is the one that the leader serves on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Holder {
    /// Name of the pod.
    pub pod: String,
    /// Where it listens.
    pub endpoint: SocketAddr,
}

impl fmt::Display for Holder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}@{}", self.pod, self.endpoint)
    }
}

impl FromStr for Holder {
    type Err = DiscoverError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let invalid = || DiscoverError::Invalid { identity: text.to_owned() };
        let (pod, endpoint) = text.rsplit_once('@').filter(|(pod, _)| !pod.is_empty()).ok_or_else(invalid)?;
        Ok(Self { pod: pod.to_owned(), endpoint: endpoint.parse().map_err(|_| invalid())? })
    }
}

/// Why no leader was found. All but `Invalid` are worth another try.
#[derive(Debug, thiserror::Error)]
pub enum DiscoverError {
    /// Nobody holds the Lease, or there is none yet.
    #[error("lease {namespace}/{lease} has no holder: no replica leads yet")]
    NoLeader {
        /// Namespace of the Lease.
        namespace: String,
        /// Name of the Lease.
        lease: String,
    },
    /// Someone else uses the Lease.
    #[error("holderIdentity {identity:?} is not <pod>@<ip:port>: another program holds this lease")]
    Invalid {
        /// What it says.
        identity: String,
    },
    /// The API server did not answer in time.
    #[error("reading the lease: {0}")]
    Elapsed(#[from] Elapsed),
    /// The API server refused, or was not reached.
    #[error("reading the lease: {0}")]
    Api(#[from] kube::Error),
}

/// Reads who leads `namespace/lease`, after a random pause of at most `jitter` that keeps the clients
/// of a failed leader from asking all at once.
///
/// # Errors
/// See [`DiscoverError`].
pub async fn discover(
    client: Client,
    clock: &Clock,
    namespace: &str,
    lease: &str,
    jitter: Duration,
) -> Result<Holder, DiscoverError> {
    let pause = jitter.mul_f64(rand::rng().random());
    clock.sleep(pause).await;
    let api: Api<Lease> = Api::namespaced(client, namespace);
    // From the API server's memory: its store is spared by the clients of a failed leader.
    let found = match clock.timeout(CALL_LIMIT, api.get_with(lease, &GetParams::any())).await? {
        Err(kube::Error::Api(status)) if status.code == 404 => None,
        found => Some(found?),
    };
    let identity = found.and_then(|found| found.spec).and_then(|spec| spec.holder_identity).unwrap_or_default();
    if identity.is_empty() {
        return Err(DiscoverError::NoLeader { namespace: namespace.to_owned(), lease: lease.to_owned() });
    }
    identity.parse()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_identity_names_pod_and_endpoint() {
        for text in ["berth-scheduler-7c9f-x2@10.0.3.7:7400", "pod@[fd00::7]:7400"] {
            let holder: Holder = text.parse().unwrap();
            assert_eq!(holder.to_string(), text);
        }
    }

    #[test]
    fn a_foreign_identity_is_refused() {
        for text in ["", "pod", "@10.0.0.1:7400", "pod@10.0.0.1", "pod@host:7400", "host_6f1c"] {
            let error = text.parse::<Holder>().unwrap_err().to_string();
            assert!(error.contains("<pod>@<ip:port>"), "{error}");
        }
    }
}
