//! What is generated and committed equals what the code says. After a change of a type:
//! `cargo run -p berth-crds --bin crdgen -- charts/berth/files/crds`.

use std::{collections::BTreeSet, fs, path::Path};

use berth_crds::{ModelProfile, definitions, presets};

fn chart() -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../charts/berth/files/crds")
}

#[test]
fn chart_holds_the_definitions_of_the_code() {
    let mut expected = BTreeSet::new();
    for definition in definitions::all() {
        let path = chart().join(definitions::file_name(&definition));
        let file = fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        let code = definitions::yaml(&definition).unwrap();
        assert!(file == code, "{} is stale: run crdgen (see the head of this test)", path.display());
        expected.insert(definitions::file_name(&definition));
    }
    let found: BTreeSet<String> =
        fs::read_dir(chart()).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    assert_eq!(found, expected);
}

#[test]
fn default_columns_are_eight_at_most_and_end_with_age() {
    for definition in definitions::all() {
        for version in &definition.spec.versions {
            let columns = version.additional_printer_columns.as_ref().unwrap();
            let shown: Vec<_> = columns.iter().filter(|column| column.priority.unwrap_or(0) == 0).collect();
            let kind = &definition.spec.names.kind;
            assert!(shown.len() <= 8, "{kind}");
            assert!(columns.iter().any(|column| column.name == "Age"), "{kind}");
        }
    }
}

/// Regenerate with `cargo run -p berth-crds --bin crdgen -- charts/berth/files/crds crds/presets`.
#[test]
fn presets_are_what_the_facts_give() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("presets");
    let mut expected = BTreeSet::new();
    for profile in presets::all().unwrap() {
        let name = format!("{}.yaml", profile.metadata.name.clone().unwrap());
        let path = folder.join(&name);
        let file = fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        assert!(file == presets::yaml(&profile).unwrap(), "{} is stale: run crdgen", path.display());
        let read: ModelProfile = serde_saphyr::from_str(&file).unwrap();
        assert_eq!(read.spec, profile.spec, "{name} does not read back");
        expected.insert(name);
    }
    assert!(expected.contains("deepseek-v3.yaml") && expected.contains("deepseek-v4-flash.yaml"));
    let files = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let found: BTreeSet<String> = files.filter(|name| name.ends_with(".yaml")).collect();
    assert_eq!(found, expected);
}
