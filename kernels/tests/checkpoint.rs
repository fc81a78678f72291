//! Checkpoints: the shipped models load; a table of malformed ones, each with the sentence its user reads; a bounded
//! fuzz of headers.
#![expect(clippy::unwrap_used, reason = "a test stops where its own set-up fails")]

use std::fs;
use std::path::{Path, PathBuf};

use berth_kernels::checkpoint::header::Header;
use berth_kernels::{Checkpoint, CheckpointError, Roots, ScaleType, StoredFormat};
use proptest::prelude::*;
use tempfile::TempDir;

/// One tensor of a file to write: name, dtype, shape, bytes.
type Tensor<'a> = (&'a str, &'a str, &'a [usize], Vec<u8>);

/// A valid file.
fn file(tensors: &[Tensor<'_>]) -> Vec<u8> {
    let (mut entries, mut data) = (Vec::new(), Vec::new());
    for (name, dtype, shape, bytes) in tensors {
        let start = data.len();
        data.extend_from_slice(bytes);
        entries.push(format!(
            r#""{name}":{{"dtype":"{dtype}","shape":{shape:?},"data_offsets":[{start},{}]}}"#,
            data.len()
        ));
    }
    with_header(&format!("{{{}}}", entries.join(",")), &data)
}

fn with_header(json: &str, data: &[u8]) -> Vec<u8> {
    let mut bytes = u64::try_from(json.len()).unwrap().to_le_bytes().to_vec();
    bytes.extend_from_slice(json.as_bytes());
    bytes.extend_from_slice(data);
    bytes
}

fn floats(n: usize) -> Vec<u8> {
    (0..n).flat_map(|i| f32::from(u16::try_from(i).unwrap()).to_le_bytes()).collect()
}

/// A folder with config.json and the given files.
fn folder(files: &[(&str, &[u8])]) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("config.json"), "{}").unwrap();
    for (name, bytes) in files {
        fs::write(dir.path().join(name), bytes).unwrap();
    }
    dir
}

/// The error's sentence with the folder's own path taken out.
fn sentence(dir: &TempDir, error: &CheckpointError) -> String {
    error.to_string().replace(&format!("{}/", dir.path().display()), "").replace(&dir.path().display().to_string(), ".")
}

fn model(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/data/reference/models").join(name)
}

#[test]
fn malformed_files_are_refused_with_file_tensor_and_remedy() {
    let again = "write the file again with a safetensors library";
    let header = |json: &str, data: usize| with_header(json, &vec![0; data]);
    let two = |a: &str, b: &str| {
        format!(
            r#"{{"a":{{"dtype":"F32","shape":[2],"data_offsets":[{a}]}},"b":{{"dtype":"F32","shape":[2],"data_offsets":[{b}]}}}}"#
        )
    };
    let table: Vec<(Vec<u8>, String)> = vec![
        (vec![], "the header's length ends at byte 8, the file has 0: download the file again".into()),
        (vec![1, 2, 3], "the header's length ends at byte 8, the file has 3: download the file again".into()),
        (
            u64::MAX.to_le_bytes().to_vec(),
            format!("the header claims 18446744073709551615 bytes, at most 100000000 are allowed: {again}"),
        ),
        (
            1000u64.to_le_bytes().to_vec(),
            "the header ends at byte 1008, the file has 8: download the file again".into(),
        ),
        (
            header("[]", 0),
            format!(
                "the header is not valid JSON (invalid type: sequence, expected an object of tensors at line 1 column 0): {again}"
            ),
        ),
        (
            header(&two("0,8", "8,16"), 12),
            "tensor b ends at byte 132, the file has 128: download the file again".into(),
        ),
        (header(&two("0,8", "8,16"), 19), format!("3 bytes follow the last tensor: {again}")),
        (
            header(&two("0,8", "4,12"), 12),
            format!("tensor b starts at byte 4, expected 8: it overlaps the tensor before it: {again}"),
        ),
        (
            header(&two("0,8", "12,20"), 20),
            format!("tensor b starts at byte 12, expected 8: it leaves a gap before it: {again}"),
        ),
        (header(&two("0,8", "16,8"), 16), format!("tensor b has bytes 16..8, but F32 [2] is 8 bytes: {again}")),
        (header(&two("0,8", "8,12"), 12), format!("tensor b has bytes 8..12, but F32 [2] is 8 bytes: {again}")),
        (
            header(r#"{"a":{"dtype":"F31","shape":[2],"data_offsets":[0,8]}}"#, 8),
            format!("tensor a has the unknown dtype \"F31\": {again}"),
        ),
        (
            header(r#"{"a":{"dtype":"F32","shape":[9999999999999,9999999999],"data_offsets":[0,8]}}"#, 8),
            format!("tensor a has shape [9999999999999, 9999999999], which overflows: {again}"),
        ),
        (
            header(r#"{"a":{"dtype":"F4","shape":[3],"data_offsets":[0,2]}}"#, 2),
            format!("tensor a of dtype F4 and shape [3] ends within a byte: {again}"),
        ),
    ];
    for (bytes, expected) in table {
        let dir = folder(&[("model.safetensors", &bytes)]);
        let error = Checkpoint::open(dir.path()).unwrap_err();
        assert_eq!(sentence(&dir, &error), format!("model.safetensors: {expected}"));
    }
    let twice = r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}"#;
    for (json, part) in [
        (twice, "tensor a is given twice"),
        (r#"{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}"#, "tensor a: invalid value: integer `-1`"),
        (r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4,8]}}"#, "tensor a: "),
        (r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4],"x":1}}"#, "tensor a: unknown field `x`"),
        (r#"{"a":{"dtype":"F32","shape":[1]}}"#, "tensor a: missing field `data_offsets`"),
        ("\u{0}", "the header is not valid JSON"),
    ] {
        let dir = folder(&[("model.safetensors", &with_header(json, &[0; 4]))]);
        let text = sentence(&dir, &Checkpoint::open(dir.path()).unwrap_err());
        assert!(text.starts_with("model.safetensors: ") && text.contains(part) && text.ends_with(again), "{text}");
    }
}

#[test]
fn missing_parts_of_a_folder_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let open = || sentence(&dir, &Checkpoint::open(dir.path()).unwrap_err());
    assert!(open().starts_with("config.json: opening: No such file"), "{}", open());
    fs::write(dir.path().join("config.json"), "{").unwrap();
    assert!(open().starts_with("config.json: is not valid JSON ("), "{}", open());
    fs::write(dir.path().join("config.json"), "7").unwrap();
    assert!(open().starts_with("config.json: is not a JSON object: "), "{}", open());
    fs::write(dir.path().join("config.json"), "{}").unwrap();
    assert!(open().starts_with("model.safetensors: opening: No such file"), "{}", open());
    fs::create_dir(dir.path().join("model.safetensors")).unwrap();
    assert!(open().starts_with("model.safetensors: this is not a file: "), "{}", open());
}

#[test]
fn an_index_that_does_not_hold_is_refused() {
    let shard = file(&[("a", "F32", &[2], floats(2))]);
    let other = file(&[("b", "F32", &[1], floats(1))]);
    let open = |index: &str| {
        let dir = folder(&[
            ("model.safetensors.index.json", index.as_bytes()),
            ("one.safetensors", &shard),
            ("two.safetensors", &other),
            ("copy.safetensors", &shard),
        ]);
        Checkpoint::open(dir.path())
            .map(|c| c.names().map(str::to_owned).collect::<Vec<_>>())
            .map_err(|e| sentence(&dir, &e))
    };
    let good = r#"{"weight_map":{"a":"one.safetensors","b":"two.safetensors"}}"#;
    assert_eq!(open(good).unwrap(), ["a", "b"]);
    assert_eq!(
        open(r#"{"weight_map":{"a":"one.safetensors","b":"one.safetensors"}}"#).unwrap_err(),
        "model.safetensors.index.json: tensor b is missing: the index promises it in one.safetensors: download both files of the same version"
    );
    assert_eq!(
        open(r#"{"weight_map":{"a":"one.safetensors","c":"copy.safetensors"}}"#).unwrap_err(),
        "one.safetensors: tensor a is in copy.safetensors too: write the file again with a safetensors library"
    );
    let index = |problem: &str| {
        format!("model.safetensors.index.json: {problem}: take the file from the model's publisher again")
    };
    assert_eq!(
        open(r#"{"weight_map":{"a":"../one.safetensors"}}"#).unwrap_err(),
        index(r#"weight_map["a"] is "../one.safetensors", not a plain file name"#)
    );
    assert_eq!(open(r#"{"weight_map":{"a":3}}"#).unwrap_err(), index(r#"weight_map["a"] is not a file name"#));
    assert_eq!(open(r#"{"weight_map":{}}"#).unwrap_err(), index("weight_map is empty"));
    assert_eq!(open("{}").unwrap_err(), index("has no weight_map object"));
    assert!(open(r#"{"weight_map":{"a":"gone.safetensors"}}"#).unwrap_err().starts_with("gone.safetensors: opening: "));
}

#[test]
fn tensors_that_do_not_fit_their_place_are_refused() {
    let dir = folder(&[(
        "model.safetensors",
        &file(&[
            ("plain.weight", "BF16", &[4, 6], vec![0; 48]),
            ("ids", "I32", &[2], vec![1, 0, 0, 0, 255, 255, 255, 255]),
            ("eight.weight", "F8_E4M3", &[4, 6], vec![0; 24]),
            ("eight.weight_scale_inv", "F32", &[3, 3], floats(9)),
            ("bare.weight", "F8_E4M3", &[4, 6], vec![0; 24]),
            ("half.weight", "I8", &[4, 32], vec![0; 128]),
            ("half.scale", "F8_E8M0", &[4, 3], vec![0; 12]),
            ("odd.weight", "I8", &[4, 32], vec![0; 128]),
            ("odd.scale", "I32", &[4, 2], vec![0; 32]),
            ("byte.weight", "I8", &[4, 64], vec![0; 256]),
            ("byte.weight_scale_inv", "F32", &[3], floats(3)),
        ]),
    )]);
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    let refuse = |name: &str, rows, cols| sentence(&dir, &checkpoint.matrix(name, rows, cols).unwrap_err());
    let config = "config.json and weights are not of one model";
    let complete = "use a complete checkpoint with the published tensor names";
    for (got, expected) in [
        (refuse("none.weight", 4, 6), format!(".: tensor none.weight is missing: {complete}")),
        (
            refuse("plain.weight", 6, 4),
            format!("model.safetensors: tensor plain.weight has shape [4, 6], expected [6, 4]: {config}"),
        ),
        (
            refuse("ids", 1, 2),
            "model.safetensors: tensor ids has dtype I32, expected F32, BF16, F16, F8_E4M3, F4 or I8: convert the checkpoint".to_owned(),
        ),
        (
            refuse("eight.weight", 4, 6),
            format!(
                "model.safetensors: tensor eight.weight_scale_inv has shape [3, 3], expected [1, 1] (blocks of 128) or [1, 1] (blocks of 32): {config}"
            ),
        ),
        (
            refuse("bare.weight", 4, 6),
            format!(
                ".: tensor bare.weight_scale_inv (or bare.scale), the scale of bare.weight, is missing: {complete}"
            ),
        ),
        (
            refuse("half.weight", 4, 64),
            format!(
                "model.safetensors: tensor half.scale has shape [4, 3], expected [4, 2] (one per row and 32 columns): {config}"
            ),
        ),
        (
            refuse("half.weight", 4, 65),
            format!(
                "model.safetensors: tensor half.weight has shape [4, 32], expected [4, 33] (two values a byte) or [4, 65]: {config}"
            ),
        ),
        (
            refuse("odd.weight", 4, 64),
            "model.safetensors: tensor odd.scale has dtype I32, expected F8_E8M0 or F32: convert the checkpoint"
                .to_owned(),
        ),
        (
            refuse("byte.weight", 4, 64),
            format!(
                "model.safetensors: tensor byte.weight_scale_inv has shape [3], expected [4] (int8) or [4, 2] (int4): {config}"
            ),
        ),
    ] {
        assert_eq!(got, expected);
    }
    let error = checkpoint.expert(7, 3, 4, 6, None).unwrap_err();
    assert_eq!(
        sentence(&dir, &error),
        format!(
            ".: tensor model.layers.7.mlp.experts.3.gate_proj.weight (or layers.7.ffn.experts.3.w1.weight) is missing: {complete}"
        )
    );
    let error = checkpoint.vector("ids").unwrap_err();
    assert_eq!(
        sentence(&dir, &error),
        "model.safetensors: tensor ids has dtype I32, expected a float type: convert the checkpoint"
    );
    let error = checkpoint.ints("plain.weight").unwrap_err();
    assert_eq!(
        sentence(&dir, &error),
        "model.safetensors: tensor plain.weight has dtype BF16, expected an integer type: convert the checkpoint"
    );
    assert_eq!(checkpoint.ints("ids").unwrap(), [1, -1]);
}

#[test]
fn a_file_that_shrinks_after_opening_is_an_error_not_a_signal() {
    let dir = folder(&[("model.safetensors", &file(&[("a", "F32", &[4], floats(4))]))]);
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    let path = dir.path().join("model.safetensors");
    let size = fs::metadata(&path).unwrap().len();
    fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(size - 5).unwrap();
    let text = sentence(&dir, &checkpoint.vector("a").unwrap_err());
    assert_eq!(
        text,
        format!("model.safetensors: tensor a ends at byte {size}, the file has {}: download the file again", size - 5)
    );
    assert!(checkpoint.digest().starts_with("unreadable:"));
    assert!(checkpoint.identity().unwrap_err().contains("download the file again"));
}

#[test]
fn a_shard_that_links_out_of_the_roots_is_refused() {
    let out = folder(&[("w.safetensors", &file(&[("a", "F32", &[1], floats(1))]))]);
    let dir = folder(&[]);
    std::os::unix::fs::symlink(out.path().join("w.safetensors"), dir.path().join("model.safetensors")).unwrap();
    let roots = Roots::new([dir.path()]).unwrap();
    assert!(matches!(Checkpoint::open_within(dir.path(), &roots), Err(CheckpointError::Outside { .. })));
    assert!(Checkpoint::open(dir.path()).is_ok());
}

#[test]
fn the_digest_is_of_content_and_never_of_the_path() {
    let bytes = file(&[("a", "F32", &[2], floats(2)), ("b", "F32", &[1], floats(1))]);
    let digest =
        |bytes: &[u8]| Checkpoint::open(folder(&[("model.safetensors", bytes)]).path()).unwrap().digest().to_owned();
    let first = digest(&bytes);
    assert!(first.starts_with("sha256:") && first.len() == 71, "{first}");
    assert_eq!(digest(&bytes), first);
    let mut changed = bytes.clone();
    *changed.last_mut().unwrap() ^= 1;
    assert_ne!(digest(&changed), first);
    let renamed = file(&[("a", "F32", &[2], floats(2)), ("c", "F32", &[1], floats(1))]);
    assert_ne!(digest(&renamed), first);
}

#[test]
fn every_float_type_is_widened() {
    let dir = folder(&[(
        "model.safetensors",
        &file(&[
            ("f64", "F64", &[1], 0.5f64.to_le_bytes().to_vec()),
            ("f32", "F32", &[1], 0.5f32.to_le_bytes().to_vec()),
            ("f16", "F16", &[1], vec![0x00, 0x38]),
            ("bf16", "BF16", &[1], vec![0x00, 0x3f]),
            ("e4m3", "F8_E4M3", &[1], vec![0x30]),
            ("e8m0", "F8_E8M0", &[1], vec![126]),
        ]),
    )]);
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    for name in ["f64", "f32", "f16", "bf16", "e4m3", "e8m0"] {
        assert_eq!(checkpoint.vector(name).unwrap(), [0.5], "{name}");
    }
}

#[test]
fn the_shipped_models_load_whole() {
    let v3 = Checkpoint::open(&model("v3-tiny")).unwrap();
    let v4 = Checkpoint::open(&model("v4-tiny")).unwrap();
    for (checkpoint, layer) in [(&v3, 1), (&v4, 3)] {
        let number = |key: &str| usize::try_from(checkpoint.config_json()[key].as_u64().unwrap()).unwrap();
        let (hidden, width) = (number("hidden_size"), number("moe_intermediate_size"));
        for expert in 0..u32::try_from(number("n_routed_experts")).unwrap() {
            let expert = checkpoint.expert(layer, expert, hidden, width, None).unwrap();
            expert.check().unwrap();
        }
        checkpoint.shared_expert(layer, hidden, width * number("n_shared_experts"), None).unwrap();
    }
    let format = v4.expert(3, 0, 0, 0, None).map(|e| e.gate.format());
    assert!(format.is_err(), "a wrong shape must not load");
}

#[test]
fn scale_shapes_tell_blocks_apart() {
    let dir = folder(&[(
        "model.safetensors",
        &file(&[
            ("a.weight", "F8_E4M3", &[130, 40], vec![0; 5200]),
            ("a.weight_scale_inv", "F32", &[2, 1], floats(2)),
            ("b.weight", "F8_E4M3", &[130, 40], vec![0; 5200]),
            ("b.scale", "F8_E8M0", &[5, 2], vec![127; 10]),
            ("c.weight", "I8", &[2, 20], vec![0; 40]),
            ("c.scale", "F8_E8M0", &[2, 2], vec![127; 4]),
        ]),
    )]);
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    let format = |name: &str, rows, cols| checkpoint.matrix(name, rows, cols).unwrap().format();
    assert_eq!(format("a.weight", 130, 40), StoredFormat::Fp8E4m3 { block: [128, 128], scale: ScaleType::F32 });
    assert_eq!(format("b", 130, 40), StoredFormat::Fp8E4m3 { block: [32, 32], scale: ScaleType::E8m0 });
    assert_eq!(format("c.weight", 2, 40), StoredFormat::Mxfp4);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_bytes_are_answered_without_a_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        let _ = Header::parse(&bytes);
    }

    #[test]
    fn a_header_changed_anywhere_is_answered_and_stays_consistent(
        edits in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
        cut in any::<prop::sample::Index>(),
        truncate in any::<bool>(),
    ) {
        let json = br#"{"__metadata__":{"k":"v"},"a":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]},"b":{"dtype":"BF16","shape":[4],"data_offsets":[24,32]}}"#;
        let mut json = json.to_vec();
        for (at, byte) in edits {
            let at = at.index(json.len());
            json[at] = byte;
        }
        if truncate {
            json.truncate(cut.index(json.len()));
        }
        if let Ok(header) = Header::parse(&json) {
            let total: u64 = header.tensors.values().map(|e| u64::try_from(e.len).unwrap()).sum();
            prop_assert_eq!(total, header.data_len);
            for entry in header.tensors.values() {
                let bits: usize = entry.shape.iter().product::<usize>() * entry.dtype.bits();
                prop_assert_eq!(bits, entry.len * 8);
            }
        }
    }

    #[test]
    fn any_tokens_of_json_are_answered(
        parts in prop::collection::vec(prop::sample::select(vec![
            "{", "}", "[", "]", ",", ":", "\"a\"", "\"dtype\"", "\"F32\"", "\"shape\"", "\"data_offsets\"", "0", "4",
            "18446744073709551615", "18446744073709551616", "-1", "1e400", "null", "\"__metadata__\"", "\"\\u0000\"",
        ]), 0..40),
    ) {
        let _ = Header::parse(parts.concat().as_bytes());
    }
}

#[test]
fn hostile_headers_are_answered_in_bounded_time() {
    let start = std::time::Instant::now();
    let deep = "[".repeat(1_000_000);
    assert!(Header::parse(deep.as_bytes()).is_err());
    let many: Vec<String> =
        (0..200_000).map(|i| format!(r#""t{i}":{{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}"#)).collect();
    let header = Header::parse(format!("{{{}}}", many.join(",")).as_bytes()).unwrap();
    assert_eq!((header.tensors.len(), header.data_len), (200_000, 0));
    let dims = format!(r#"{{"a":{{"dtype":"U8","shape":[{}],"data_offsets":[0,1]}}}}"#, vec!["1"; 500_000].join(","));
    assert!(Header::parse(dims.as_bytes()).is_ok());
    assert!(start.elapsed() < std::time::Duration::from_secs(20), "{:?}", start.elapsed());
}
