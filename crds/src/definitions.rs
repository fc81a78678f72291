//! The CustomResourceDefinitions, as files of the chart and as tests install them. The one place that
//! corrects what the schema generator writes for JSON Schema at large and Kubernetes reads differently.

use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::{CustomResourceDefinition, JSONSchemaProps};
use kube::CustomResourceExt;

use crate::{
    AcceleratorNode, CapacityQueue, DemandReport, ExpertPlacement, ModelDeployment, ModelProfile, PlacementMap,
};

/// Every kind of the group, in the order in which a reader meets them.
#[must_use]
pub fn all() -> Vec<CustomResourceDefinition> {
    [
        ModelProfile::crd(),
        ModelDeployment::crd(),
        CapacityQueue::crd(),
        AcceleratorNode::crd(),
        ExpertPlacement::crd(),
        PlacementMap::crd(),
        DemandReport::crd(),
    ]
    .into_iter()
    .map(|mut definition| {
        for version in &mut definition.spec.versions {
            if let Some(schema) = version.schema.as_mut().and_then(|schema| schema.open_api_v3_schema.as_mut()) {
                correct(schema);
                bound_name(schema);
            }
        }
        definition
    })
    .collect()
}

/// The file of `definition` in the chart: its plural, so that a folder listing reads as a list of kinds.
#[must_use]
pub fn file_name(definition: &CustomResourceDefinition) -> String {
    format!("{}.yaml", definition.spec.names.plural)
}

/// The YAML of `definition`.
///
/// # Errors
/// When the definition cannot be written as YAML.
pub fn yaml(definition: &CustomResourceDefinition) -> Result<String, serde_saphyr::ser::Error> {
    serde_saphyr::to_string(definition)
}

/// Says how long a name can be, which every API server enforces, but which the cost of a rule that looks at
/// the name is estimated from.
fn bound_name(root: &mut JSONSchemaProps) {
    let text = |max_length| JSONSchemaProps { type_: Some("string".to_owned()), max_length, ..Default::default() };
    let metadata = JSONSchemaProps {
        type_: Some("object".to_owned()),
        properties: Some([("name".to_owned(), text(Some(253)))].into()),
        ..JSONSchemaProps::default()
    };
    root.properties.get_or_insert_default().insert("metadata".to_owned(), metadata);
}

/// Formats that the API server does not know become those it knows, and no field is nullable: the API
/// server prunes a null then, so that null and absent mean the same to every rule.
fn correct(schema: &mut JSONSchemaProps) {
    schema.nullable = None;
    schema.format = match schema.format.take().as_deref() {
        Some("uint8" | "uint16" | "uint32") => None,
        Some("uint" | "uint64") => Some("int64".to_owned()),
        known => known.map(str::to_owned),
    };
    for child in schema.properties.iter_mut().flat_map(|children| children.values_mut()) {
        correct(child);
    }
    use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::{
        JSONSchemaPropsOrArray as Items, JSONSchemaPropsOrBool as Further,
    };
    match schema.items.as_mut() {
        Some(Items::Schema(item)) => correct(item),
        Some(Items::Schemas(items)) => items.iter_mut().for_each(correct),
        None => {}
    }
    if let Some(Further::Schema(further)) = schema.additional_properties.as_mut() {
        correct(further);
    }
}
