//! Checkpoints as publishers ship them: safetensors, one file or sharded with an index.
//!
//! Everything is checked when the checkpoint is opened (headers, lengths, that each indexed tensor is where the index
//! says); tensors are then read one at a time into owned memory. Any number of threads may read at once. A checkpoint's
//! identity is its digest, never its path.

mod error;
mod experts;
pub mod header;
mod matrix;
pub mod roots;
mod shard;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use rayon::prelude::*;
use serde_json::Value;
use sha2::{Digest, Sha256};

pub use error::CheckpointError;
pub use header::Dtype;
pub use roots::Roots;

use header::Entry;
use shard::Shard;

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

/// The largest JSON file read: an index of a trillion-parameter model has some 20 MB.
const MAX_JSON: u64 = 200_000_000;

/// An open checkpoint.
#[derive(Debug)]
pub struct Checkpoint {
    path: PathBuf,
    config: Value,
    shards: Vec<Shard>,
    /// Which shard has a tensor.
    places: BTreeMap<String, usize>,
    digest: OnceLock<Result<String, String>>,
}

impl Checkpoint {
    /// Opens a folder with `config.json` and `model.safetensors`, or `model.safetensors.index.json` and its shards.
    ///
    /// # Errors
    /// The first thing that is missing, short or malformed, naming file and tensor.
    pub fn open(dir: &Path) -> Result<Self, CheckpointError> {
        Self::open_within(dir, &Roots::any())
    }

    /// As [`Checkpoint::open`], and every file, with links followed, must lie within `roots`.
    ///
    /// # Errors
    /// As [`Checkpoint::open`], and `Outside`.
    pub fn open_within(dir: &Path, roots: &Roots) -> Result<Self, CheckpointError> {
        let admitted = |file: PathBuf| -> Result<PathBuf, CheckpointError> {
            roots.admit(&roots::canonical(&file, "opening")?)?;
            Ok(file)
        };
        let config_path = admitted(dir.join("config.json"))?;
        let config = read_json(&config_path)?;
        if !config.is_object() {
            return Err(CheckpointError::Json { path: config_path, problem: "is not a JSON object".into() });
        }
        let index_path = dir.join(INDEX);
        if dir.join(SINGLE).exists() || !index_path.exists() {
            let shard = Shard::open(&admitted(dir.join(SINGLE))?)?;
            return Self::from_shards(dir, config, vec![shard], None);
        }
        let index = read_index(&admitted(index_path.clone())?)?;
        let mut files: Vec<&String> = index.values().collect();
        files.sort();
        files.dedup();
        let mut shards = Vec::with_capacity(files.len());
        for file in &files {
            shards.push(Shard::open(&admitted(dir.join(file))?)?);
        }
        let expected = (index_path, index.iter().map(|(name, file)| (name.as_str(), file.as_str())).collect());
        Self::from_shards(dir, config, shards, Some(expected))
    }

    /// Opens one safetensors file without a config, such as a reference case.
    ///
    /// # Errors
    /// If the file is missing, short or malformed.
    pub fn open_file(path: &Path) -> Result<Self, CheckpointError> {
        Self::from_shards(path, Value::Null, vec![Shard::open(path)?], None)
    }

    fn from_shards(
        path: &Path,
        config: Value,
        shards: Vec<Shard>,
        index: Option<(PathBuf, BTreeMap<&str, &str>)>,
    ) -> Result<Self, CheckpointError> {
        let mut places = BTreeMap::new();
        for (i, shard) in shards.iter().enumerate() {
            for name in shard.header().tensors.keys() {
                if let Some(first) = places.insert(name.clone(), i) {
                    let first = shards[first].path().display();
                    let problem = format!("tensor {name} is in {first} too");
                    return Err(CheckpointError::Header { path: shard.path().to_owned(), problem });
                }
            }
        }
        if let Some((index_path, index)) = index {
            for (name, file) in index {
                let there = places.get(name).is_some_and(|&i| shards[i].path().file_name().is_some_and(|f| f == file));
                if !there {
                    return Err(CheckpointError::Missing {
                        path: index_path,
                        tensor: name.to_owned(),
                        remedy: format!("the index promises it in {file}: download both files of the same version"),
                    });
                }
            }
        }
        Ok(Self { path: path.to_owned(), config, shards, places, digest: OnceLock::new() })
    }

    /// The identity: `sha256:` over the header (names, dtypes, shapes, offsets, lengths) and content of every shard.
    ///
    /// Where files lie or how they are called does not enter it. The first call reads every file once (shards in
    /// parallel; one to two seconds per gigabyte and core), later ones are free. If a file cannot be read it is
    /// `unreadable:` and the reason, which equals no digest; see [`Checkpoint::identity`].
    pub fn digest(&self) -> &str {
        match self.hashed(&|_| ()) {
            Ok(digest) | Err(digest) => digest,
        }
    }

    /// As [`Checkpoint::digest`], with failure told apart.
    ///
    /// # Errors
    /// The reason in words, naming the file.
    pub fn identity(&self) -> Result<&str, &str> {
        self.identity_telling(&|_| ())
    }

    /// As [`Checkpoint::identity`]; `read` is told the bytes of each part that is read for it, from several threads,
    /// and nothing when the identity is known already.
    ///
    /// # Errors
    /// The reason in words, naming the file.
    pub fn identity_telling(&self, read: &(dyn Fn(u64) + Sync)) -> Result<&str, &str> {
        self.hashed(read).as_ref().map(String::as_str).map_err(String::as_str)
    }

    fn hashed(&self, read: &(dyn Fn(u64) + Sync)) -> &Result<String, String> {
        self.digest.get_or_init(|| {
            let parts: Result<Vec<_>, _> = self.shards.par_iter().map(|shard| shard.digest(read)).collect();
            let parts = parts.map_err(|e| format!("unreadable:{e}"))?;
            let mut hash = Sha256::new();
            parts.iter().for_each(|part| hash.update(part));
            let hex: String = hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
            Ok(format!("sha256:{hex}"))
        })
    }

    /// `config.json`; null for a single file.
    pub fn config_json(&self) -> &Value {
        &self.config
    }

    /// A string of the first file's `__metadata__`.
    pub fn metadata(&self, key: &str) -> Option<&str> {
        self.shards.first()?.header().metadata.get(key).map(String::as_str)
    }

    /// Every tensor's name, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.places.keys().map(String::as_str)
    }

    /// Whether a tensor is there.
    pub fn has(&self, name: &str) -> bool {
        self.places.contains_key(name)
    }

    /// A tensor's dimensions.
    ///
    /// # Errors
    /// `Missing`.
    pub fn shape(&self, name: &str) -> Result<&[usize], CheckpointError> {
        self.find(name).map(|(_, entry)| entry.shape.as_slice())
    }

    /// A tensor's element type.
    ///
    /// # Errors
    /// `Missing`.
    pub fn dtype(&self, name: &str) -> Result<Dtype, CheckpointError> {
        self.find(name).map(|(_, entry)| entry.dtype)
    }

    fn find(&self, name: &str) -> Result<(&Shard, &Entry), CheckpointError> {
        self.places
            .get(name)
            .and_then(|&i| self.shards.get(i))
            .and_then(|shard| shard.header().tensors.get(name).map(|entry| (shard, entry)))
            .ok_or_else(|| self.missing(name.to_owned()))
    }

    fn missing(&self, tensor: String) -> CheckpointError {
        let remedy = "use a complete checkpoint with the published tensor names".to_owned();
        CheckpointError::Missing { path: self.path.clone(), tensor, remedy }
    }
}

fn read_json(path: &Path) -> Result<Value, CheckpointError> {
    let io = |source| CheckpointError::Io { path: path.to_owned(), doing: "reading".into(), source };
    let size = std::fs::metadata(path).map_err(io)?.len();
    let bad = |problem: String| CheckpointError::Json { path: path.to_owned(), problem };
    if size > MAX_JSON {
        return Err(bad(format!("has {size} bytes, at most {MAX_JSON} are allowed")));
    }
    let bytes = std::fs::read(path).map_err(io)?;
    serde_json::from_slice(&bytes).map_err(|e| bad(format!("is not valid JSON ({e})")))
}

/// Tensor name → file name, each a plain name in the same folder.
fn read_index(path: &Path) -> Result<BTreeMap<String, String>, CheckpointError> {
    let bad = |problem: String| CheckpointError::Json { path: path.to_owned(), problem };
    let json = read_json(path)?;
    let map =
        json.get("weight_map").and_then(Value::as_object).ok_or_else(|| bad("has no weight_map object".into()))?;
    let mut index = BTreeMap::new();
    for (name, file) in map {
        let file = file.as_str().ok_or_else(|| bad(format!("weight_map[{name:?}] is not a file name")))?;
        if file.is_empty() || file == "." || file == ".." || file.contains(['/', '\\', '\0']) {
            return Err(bad(format!("weight_map[{name:?}] is {file:?}, not a plain file name")));
        }
        index.insert(name.clone(), file.to_owned());
    }
    if index.is_empty() {
        return Err(bad("weight_map is empty".into()));
    }
    Ok(index)
}
