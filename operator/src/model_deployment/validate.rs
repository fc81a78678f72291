//! Step 2: what of the spec can be honoured. Pure. What the schema can refuse never gets here; what Berth
//! does not do yet is named, by field, and makes `Accepted` false.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use berth_crds::{
    ModelDeployment, ModelProfile,
    model_deployment::{OnShortage, ServingMode},
};
use serde_json::json;

use crate::{model_deployment::reason::Reason, writes::hash_of};

/// Folders that weights may lie in.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Roots(pub Vec<PathBuf>);

/// A field that is not honoured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Unhonoured {
    /// Its path.
    pub field: &'static str,
    /// What happens instead.
    pub instead: &'static str,
}

/// A spec that instances can be made from.
#[derive(Clone, Debug)]
pub struct Accepted {
    /// What the model is.
    pub profile: Arc<ModelProfile>,
    /// Hash of what an instance serves: model, geometry, formats and weights. An instance of another
    /// template is replaced, so a field joins the hash only if it cannot change under a running instance.
    pub template: String,
}

/// Why no instance can be made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rejection {
    /// For programs.
    pub reason: Reason,
    /// For people.
    pub message: String,
}

/// The outcome.
#[derive(Clone, Debug)]
pub struct Checked {
    /// Fields that are not honoured.
    pub unhonoured: Vec<Unhonoured>,
    /// Whether instances can be made all the same.
    pub outcome: Result<Accepted, Rejection>,
}

/// Looks at the spec and the profile that it names.
#[must_use]
pub fn validate(deployment: &ModelDeployment, profile: Option<Arc<ModelProfile>>, roots: &Roots) -> Checked {
    let unhonoured = unhonoured(deployment);
    let rejection = rejection(deployment, profile.as_deref(), roots);
    let outcome = match (rejection, profile) {
        (None, Some(profile)) => {
            let template = template_of(deployment, &profile);
            Ok(Accepted { profile, template })
        }
        (Some(rejection), _) => Err(rejection),
        (None, None) => Err(no_profile(deployment)),
    };
    Checked { unhonoured, outcome }
}

fn unhonoured(deployment: &ModelDeployment) -> Vec<Unhonoured> {
    let spec = &deployment.spec;
    let mut fields = Vec::new();
    let mut note = |set: bool, field, instead| {
        if set {
            fields.push(Unhonoured { field, instead });
        }
    };
    note(spec.serving.mode == ServingMode::Engine, "spec.serving.mode", "nothing is started: set it to native");
    let local = spec.weights.uri.starts_with("file://");
    note(!local, "spec.weights.uri", "nothing is started: copy the checkpoint to the nodes and use file://");
    note(spec.autoscaling.is_some(), "spec.autoscaling", "spec.replicas says how many instances run");
    note(spec.objective.is_some(), "spec.objective", "it is recorded, and neither measured nor planned for");
    note(!spec.fallback.is_empty(), "spec.fallback", "no request is answered by another deployment");
    note(spec.on_shortage != OnShortage::Queue, "spec.onShortage", "requests wait");
    fields
}

fn rejection(deployment: &ModelDeployment, profile: Option<&ModelProfile>, roots: &Roots) -> Option<Rejection> {
    let spec = &deployment.spec;
    let reject = |reason, message| Some(Rejection { reason, message });
    if spec.serving.mode == ServingMode::Engine {
        let message = "spec.serving.mode engine is not honoured yet: set it to native".to_owned();
        return reject(Reason::FieldNotHonoured, message);
    }
    let Some(path) = spec.weights.uri.strip_prefix("file://") else {
        let scheme = spec.weights.uri.split("://").next().unwrap_or_default();
        let message = format!(
            "spec.weights.uri {scheme}:// is not honoured yet: copy the checkpoint to the nodes and use file://"
        );
        return reject(Reason::FieldNotHonoured, message);
    };
    if !roots.0.iter().any(|root| Path::new(path).starts_with(root)) {
        let allowed: Vec<_> = roots.0.iter().map(|root| root.display().to_string()).collect();
        let message = format!(
            "spec.weights.uri {path} is outside the folders that weights may lie in ({}): move it or allow its folder in the chart's values",
            if allowed.is_empty() { "none".to_owned() } else { allowed.join(", ") }
        );
        return reject(Reason::WeightsNotAllowed, message);
    }
    match profile {
        None => Some(no_profile(deployment)),
        Some(profile) => {
            let sound = profile.spec.geometry.validate().map_err(|error| error.to_string());
            let sound = sound.and_then(|()| profile.spec.validate_expert_loads());
            sound.err().and_then(|error| reject(Reason::ProfileInvalid, format!("profile {}: {error}", spec.model)))
        }
    }
}

fn no_profile(deployment: &ModelDeployment) -> Rejection {
    let model = &deployment.spec.model;
    let message =
        format!("ModelProfile {model} does not exist: apply a preset, or write one with berth profile import");
    Rejection { reason: Reason::ProfileNotFound, message }
}

fn template_of(deployment: &ModelDeployment, profile: &ModelProfile) -> String {
    let served = json!({
        "model": deployment.spec.model,
        "geometry": profile.spec.geometry,
        "vendorFormats": profile.spec.vendor_formats,
        "weights": deployment.spec.weights,
    });
    hash_of(&served).chars().take(8).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model_deployment::fixtures::{found, template};

    fn rejection(more: &serde_json::Value) -> Rejection {
        found(more, 1).1.outcome.unwrap_err()
    }

    #[test]
    fn what_cannot_be_served_is_rejected_by_field() {
        for (more, reason, words) in [
            (json!({"serving": {"mode": "engine"}}), Reason::FieldNotHonoured, "spec.serving.mode engine"),
            (json!({"weights": {"uri": "s3://b/v3"}}), Reason::FieldNotHonoured, "spec.weights.uri s3://"),
            (json!({"weights": {"uri": "file:///modelsX/v3"}}), Reason::WeightsNotAllowed, "/modelsX/v3 is outside"),
        ] {
            let Rejection { reason: found, message } = rejection(&more);
            assert_eq!(found, reason, "{message}");
            assert!(message.contains(words), "{message}");
        }
        let nameless = validate(&found(&json!({}), 1).0.deployment, None, &Roots(vec!["/models".into()]));
        assert_eq!(nameless.outcome.unwrap_err().reason, Reason::ProfileNotFound);
    }

    #[test]
    fn known_loads_of_other_experts_than_the_model_has_are_rejected() {
        use berth_crds::model_profile::LayerShares;
        let deployment = found(&json!({}), 1).0.deployment;
        let outcome = |layer: u32, experts: usize| {
            let mut spec = crate::fleet::tests::profile();
            spec.expert_loads = vec![LayerShares { layer, shares: vec![1; experts] }];
            let profile = Arc::new(ModelProfile::new("v3-tiny", spec));
            validate(&deployment, Some(profile), &Roots(vec!["/models".into()])).outcome
        };
        assert!(outcome(1, 16).is_ok());
        for ((layer, experts), words) in
            [((0, 16), "experts are in layers 1 to 3"), ((1, 9), "9 shares for 16 experts")]
        {
            let Rejection { reason, message } = outcome(layer, experts).unwrap_err();
            assert_eq!(reason, Reason::ProfileInvalid);
            assert!(message.contains(words), "{message}");
        }
    }

    #[test]
    fn what_can_be_served_without_is_named_and_served() {
        let more = json!({"objective": {"ttftMs": 500}, "autoscaling": {"min": 1, "max": 2}, "fallback": ["v2"],
                          "onShortage": "Degrade"});
        let checked = found(&more, 1).1;
        let fields: Vec<_> = checked.unhonoured.iter().map(|field| field.field).collect();
        assert_eq!(fields, ["spec.autoscaling", "spec.objective", "spec.fallback", "spec.onShortage"]);
        assert!(checked.outcome.is_ok());
    }

    #[test]
    fn only_what_an_instance_serves_changes_its_template() {
        let plain = template(&found(&json!({}), 1).1);
        assert_eq!(plain.len(), 8);
        for same in [json!({"replicas": 3}), json!({"paused": true}), json!({"devices": {"perInstance": 4}})] {
            assert_eq!(template(&found(&same, 1).1), plain, "{same}");
        }
        assert_ne!(template(&found(&json!({"weights": {"uri": "file:///models/other"}}), 1).1), plain);
    }
}
