//! What a geometry's numbers must satisfy together, as CEL. `berth_types::Geometry::validate` says the same
//! for geometries that come from files; the type itself lives there and knows no Kubernetes.

use serde_json::{Value, json};

const RULES: [(&str, &str); 6] = [
    ("self.denseLayers < self.layers", "geometry.denseLayers must be below geometry.layers"),
    ("self.topK <= self.experts", "geometry.topK must not be above geometry.experts"),
    ("self.experts % self.groups == 0", "geometry.groups must divide geometry.experts"),
    ("self.groupsKept <= self.groups", "geometry.groupsKept must not be above geometry.groups"),
    (
        "self.topK * self.groups <= self.experts * self.groupsKept",
        "geometry.topK must not be above the experts of the groups kept (experts / groups * groupsKept)",
    ),
    (
        "self.hashLayers <= self.layers - self.denseLayers",
        "geometry.hashLayers must not be above geometry.layers - geometry.denseLayers",
    ),
];

/// The rules as `x-kubernetes-validations` takes them.
pub(crate) fn all() -> Value {
    RULES.iter().map(|(rule, message)| json!({"rule": rule, "message": message})).collect()
}
