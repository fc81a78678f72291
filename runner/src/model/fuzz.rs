//! Files of a checkpoint, damaged in every way: each is read or refused with an error, and nothing panics.

use std::{fs, path::PathBuf};

use berth_mutate::each;
use serde_json::Value;

use super::{config::V3Config, tokenizer::Text, v4::config::V4Config};

fn file(path: &str) -> Vec<u8> {
    let models = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../tests/data/reference/models");
    fs::read(models.join(path)).unwrap()
}

#[test]
fn a_damaged_config_is_read_or_refused() {
    let (v3, v4) = (file("v3-tiny/config.json"), file("v4-tiny/config.json"));
    each(&[&v3, &v4], 6_000, |bytes| {
        if let Ok(value) = serde_json::from_slice::<Value>(bytes) {
            let _ = (V3Config::read(&value), V4Config::read(&value));
        }
    });
    assert!(V3Config::read(&serde_json::from_slice(&v3).unwrap()).is_ok());
    assert!(V4Config::read(&serde_json::from_slice(&v4).unwrap()).is_ok());
}

#[test]
fn a_damaged_tokenizer_is_read_or_refused_and_never_ends_the_process() {
    let text = file("v3-tiny/tokenizer.json");
    each(&[&text], 400, |bytes| {
        if let Ok(tokenizer) = Text::parse(bytes, Some(0), 512) {
            let _ = tokenizer.encode("The quick brown fox \u{202e}\u{0}");
            let _ = tokenizer.decode(&[0, 1, 511, u32::MAX]);
        }
    });
    assert!(Text::parse(&text, Some(0), 512).is_ok());
}
