//! Step 4: makes the built objects so, and ends what should not be. Decides nothing.

use std::sync::Arc;

use berth_crds::ExpertPlacement;
use k8s_openapi::api::apps::v1::Deployment;
use kube::ResourceExt;

use super::{
    build::{Ending, Prepared, Wanted},
    dereference::Dereferenced,
};
use crate::{
    error::{Category, WriteError},
    writes::Writes,
};

/// What was being done to the instances when a write failed.
#[derive(Debug, thiserror::Error)]
pub enum ApplyError {
    /// A placement could not be made or changed.
    #[error("placing an instance: {0}")]
    Place(#[source] WriteError),
    /// A runner could not be made or changed.
    #[error("running an instance: {0}")]
    Run(#[source] WriteError),
    /// An instance could not be ended.
    #[error("ending an instance: {0}")]
    End(#[source] WriteError),
}

impl ApplyError {
    /// What to do about it.
    #[must_use]
    pub fn category(&self) -> Category {
        match self {
            Self::Place(error) | Self::Run(error) | Self::End(error) => error.category(),
        }
    }
}

/// What is there after the writes. Only made by [`apply`].
#[derive(Clone, Debug)]
pub struct Applied {
    /// Placements, those that end included, in order of their names.
    pub placements: Vec<Arc<ExpertPlacement>>,
    /// Names of those that end.
    pub ending: Vec<String>,
}

/// Makes it so. Writes nothing that is so already.
///
/// # Errors
/// [`ApplyError`] at the first write that failed; the next pass goes on from there.
pub async fn apply(found: &Dereferenced, prepared: Prepared, writes: &Writes) -> Result<Applied, ApplyError> {
    let Prepared { wanted, left, ending } = prepared;
    let space = found.deployment.namespace().unwrap_or_default();
    let placements = writes.within::<ExpertPlacement>(&space);
    let runners = writes.within::<Deployment>(&space);
    let mut there = Vec::new();
    for Wanted { placement, runner } in &wanted {
        let name = placement.name_any();
        let live = found.placements.iter().find(|live| live.name_any() == name);
        let placed = writes.apply(&placements, placement, live).await.map_err(ApplyError::Place)?;
        there.push(placed);
        writes.apply(&runners, runner, found.runners.get(&name)).await.map_err(ApplyError::Run)?;
    }
    there.extend(found.placements.iter().filter(|live| left.contains(&live.name_any())).cloned());
    let mut ends = Vec::new();
    for Ending { placement, runner, pods } in ending {
        ends.push(placement.name_any());
        match runner {
            Some(runner) if runner.metadata.deletion_timestamp.is_none() => {
                writes.delete(&runners, runner.as_ref()).await.map_err(ApplyError::End)?;
            }
            None if pods == 0 && placement.metadata.deletion_timestamp.is_none() => {
                writes.delete(&placements, placement.as_ref()).await.map_err(ApplyError::End)?;
            }
            _ => {}
        }
        there.push(placement);
    }
    there.sort_by_key(|placement| placement.name_any());
    Ok(Applied { placements: there, ending: ends })
}
