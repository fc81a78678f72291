//! Measurements that need a control plane: what a supervisor costs on its node, and what many agents cost the API
//! server. Figures only; whoever reads them judges.

pub mod agents;
pub mod audit;
pub mod fleet;
pub mod process;
pub mod supervisor;

use std::time::Duration;

use berth_crds::definitions;
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::{
    Api, Client,
    api::{Patch, PatchParams},
};

use crate::{Error, Result};

/// A definition is served within this.
const ESTABLISHED_WITHIN: Duration = Duration::from_secs(30);

/// Installs the project's definitions and waits until they are served.
///
/// # Errors
/// When the API server refuses one, or does not serve it in time.
pub async fn install_definitions(client: &Client) -> Result<()> {
    let api: Api<CustomResourceDefinition> = Api::all(client.clone());
    for definition in definitions::all() {
        let name = definition.metadata.name.clone().unwrap_or_default();
        let applied = api.patch(&name, &PatchParams::apply("bench"), &Patch::Apply(&definition)).await;
        applied.map_err(Error::api("install a definition"))?;
        let established = kube::runtime::conditions::is_crd_established();
        let waited = kube::runtime::wait::await_condition(api.clone(), &name, established);
        let state = || Error::Wait { what: name.clone(), waited: ESTABLISHED_WITHIN, state: "not established".into() };
        tokio::time::timeout(ESTABLISHED_WITHIN, waited).await.map_err(|_| state())?.map_err(|error| Error::Wait {
            what: error.to_string(),
            waited: ESTABLISHED_WITHIN,
            state: name.clone(),
        })?;
    }
    Ok(())
}
