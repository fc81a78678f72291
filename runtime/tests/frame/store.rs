//! One Lease in memory that obeys resourceVersion as the API server does, and that can be cut off.

use std::sync::{
    Arc, Mutex,
    atomic::{AtomicBool, AtomicUsize, Ordering},
};

use async_trait::async_trait;
use berth_runtime::lease::LeaseStore;
use k8s_openapi::api::coordination::v1::Lease;
use kube::core::Status;

/// The server side; candidates get a [`Line`] to it.
#[derive(Clone, Default)]
pub(crate) struct Store {
    pub(crate) lease: Arc<Mutex<Option<Lease>>>,
    version: Arc<AtomicUsize>,
}

/// One candidate's connection.
#[derive(Clone)]
pub(crate) struct Line {
    store: Store,
    /// Nothing goes through; calls hang.
    pub(crate) cut: Arc<AtomicBool>,
}

impl Store {
    pub(crate) fn line(&self) -> Line {
        Line { store: self.clone(), cut: Arc::default() }
    }

    pub(crate) fn holder(&self) -> Option<String> {
        let lease = self.lease.lock().unwrap();
        lease.as_ref()?.spec.as_ref()?.holder_identity.clone().filter(|holder| !holder.is_empty())
    }

    fn put(&self, mut lease: Lease, expected: Option<String>) -> Result<(), kube::Error> {
        let mut held = self.lease.lock().unwrap();
        if held.as_ref().map(|held| held.metadata.resource_version.clone()) != expected.map(Some) {
            return Err(kube::Error::Api(Box::new(Status { code: 409, ..Status::default() })));
        }
        let version = self.version.fetch_add(1, Ordering::Relaxed);
        lease.metadata.resource_version = Some(version.to_string());
        *held = Some(lease);
        Ok(())
    }
}

impl Line {
    async fn pass(&self) {
        if self.cut.load(Ordering::Relaxed) {
            std::future::pending::<()>().await;
        }
    }
}

#[async_trait]
impl LeaseStore for Line {
    async fn read(&self) -> Result<Option<Lease>, kube::Error> {
        self.pass().await;
        Ok(self.store.lease.lock().unwrap().clone())
    }

    async fn create(&self, lease: &Lease) -> Result<(), kube::Error> {
        self.pass().await;
        self.store.put(lease.clone(), None)
    }

    async fn replace(&self, lease: &Lease) -> Result<(), kube::Error> {
        self.pass().await;
        self.store.put(lease.clone(), lease.metadata.resource_version.clone())
    }
}
