//! One pass over one ModelDeployment: dereference, validate, build, apply, update status. Only `apply` and
//! `update_status` write; a pass that finds everything as it should be calls nobody.

use std::{sync::Arc, time::Duration};

use berth_crds::ModelDeployment;
use kube::runtime::controller::Action;

use crate::{
    Context,
    error::{Category, WriteError},
};

pub mod apply;
pub mod build;
pub mod dereference;
#[cfg(test)]
pub(crate) mod fixtures;
pub mod reason;
mod report;
pub mod rollout;
pub mod update_status;
pub mod validate;

/// A pass that nothing touched is repeated after this time, to mend what no watch told.
pub(crate) const RESYNC: Duration = Duration::from_secs(600);

/// Why a pass did not reach its end.
#[derive(Debug, thiserror::Error)]
pub enum ReconcileError {
    /// Step 4.
    #[error(transparent)]
    Apply(#[from] apply::ApplyError),
    /// Step 5.
    #[error("telling the status: {0}")]
    Status(#[source] WriteError),
}

impl ReconcileError {
    /// What to do about it.
    #[must_use]
    pub fn category(&self) -> Category {
        match self {
            Self::Apply(error) => error.category(),
            Self::Status(error) => error.category(),
        }
    }
}

/// One pass.
///
/// # Errors
/// [`ReconcileError`]; what was done until then stays done.
pub async fn reconcile(deployment: &Arc<ModelDeployment>, context: &Context) -> Result<Action, ReconcileError> {
    if deployment.metadata.deletion_timestamp.is_some() {
        // What it owns is collected by its owner references.
        return Ok(Action::await_change());
    }
    let grants = context.grants.borrow().clone();
    let Some(found) = dereference::dereference(deployment, &context.stores, &grants) else {
        return Ok(Action::await_change());
    };
    let checked = validate::validate(deployment, found.profile.clone(), &context.runner.roots);
    let prepared = build::build(&found, &checked, &context.runner);
    let applied = apply::apply(&found, prepared, &context.writes).await?;
    let now = crate::timestamp(&context.clock);
    let status = update_status::compute(&found, &checked, &applied, now);
    update_status::update_status(deployment, &status, &context.writes).await.map_err(ReconcileError::Status)?;
    Ok(Action::requeue(RESYNC))
}
