//! A reference case, read and checked against its own description.

use std::path::{Path, PathBuf};

use serde::Deserialize;

use super::ConformanceError;
use crate::backend::StoredExpert;
use crate::checkpoint::{Checkpoint, CheckpointError};
use crate::format::StoredMatrix;
use crate::num::f32_near;
use crate::routing::{Router, Scoring};

/// Inputs and expected outputs of one layer.
#[derive(Debug)]
pub struct Case {
    /// Its name.
    pub name: String,
    /// Stored format of the routed experts, in the script's words.
    pub format: String,
    /// Rows.
    pub tokens: usize,
    /// Input and output features.
    pub hidden: usize,
    /// How the layer routes.
    pub router: Router,
    /// Router matrix [E × H].
    pub gate: StoredMatrix,
    /// Added to scores for choosing.
    pub bias: Option<Vec<f32>>,
    /// Experts fixed by a hash table, [T × K].
    pub forced: Option<Vec<u32>>,
    /// The routed experts.
    pub experts: Vec<StoredExpert>,
    /// The shared expert, with its limit.
    pub shared: StoredExpert,
    /// [T × H].
    pub x: Vec<f32>,
    /// Rows whose input is not finite.
    pub bad_rows: Vec<usize>,
    /// [T × K].
    pub topk_ids: Vec<u32>,
    /// [T × K].
    pub topk_weights: Vec<f32>,
    /// [T × K × H], unweighted.
    pub slot_out: Option<Vec<f32>>,
    /// [T × H].
    pub y_routed: Vec<f32>,
    /// [T × H], with the limit.
    pub y_shared: Vec<f32>,
    /// [T × H], without.
    pub y_shared_nolimit: Option<Vec<f32>>,
    /// [T × H], routed + shared.
    pub y: Vec<f32>,
    /// [T × H], activations quantised too.
    pub y_a8: Option<Vec<f32>>,
}

#[derive(Deserialize)]
struct Description {
    name: String,
    family: String,
    fmt: String,
    hidden: usize,
    width: usize,
    experts: usize,
    top_k: usize,
    tokens: usize,
    routed_scaling_factor: f64,
    #[serde(default)]
    swiglu_limit: f64,
    shared_limit: Option<f64>,
    groups: Option<[usize; 2]>,
    #[serde(default)]
    hash: bool,
    layer: u32,
}

impl Case {
    /// Reads one case.
    ///
    /// # Errors
    /// `Case` if the header key `case` is absent or says something unknown; any error of the tensors.
    pub fn read(path: &Path) -> Result<Self, ConformanceError> {
        let reader = Reader { file: Checkpoint::open_file(path)?, path: path.to_owned() };
        let about = reader.describe()?;
        let (layer, hidden, width) = (about.layer, about.hidden, about.width);
        let prefix =
            if about.family == "v3" { format!("model.layers.{layer}.mlp.") } else { format!("layers.{layer}.ffn.") };
        let limit = positive(about.swiglu_limit);
        let shared_limit = about.shared_limit.map_or(limit, positive);
        let count = u32::try_from(about.experts).map_err(|_| reader.bad("experts", "are too many"))?;
        let file = &reader.file;
        let experts = (0..count).map(|e| file.expert(layer, e, hidden, width, limit)).collect::<Result<_, _>>()?;
        let (t, k) = (about.tokens, about.top_k);
        Ok(Self {
            router: router(&about),
            gate: file.matrix(&format!("{prefix}gate.weight"), about.experts, hidden)?,
            bias: reader.bias(&about, &prefix)?,
            forced: reader.forced(&about, &prefix)?,
            experts,
            shared: file.shared_expert(layer, hidden, width, shared_limit)?,
            x: reader.floats("test.x", &[t, hidden])?,
            bad_rows: reader.bad_rows(t)?,
            topk_ids: reader.ids("test.topk_ids", about.experts, &[t, k])?,
            topk_weights: reader.floats("test.topk_weights", &[t, k])?,
            slot_out: reader.maybe("test.slot_out", &[t, k, hidden])?,
            y_routed: reader.floats("test.y_routed", &[t, hidden])?,
            y_shared: reader.floats("test.y_shared", &[t, hidden])?,
            y_shared_nolimit: reader.maybe("test.y_shared_nolimit", &[t, hidden])?,
            y: reader.floats("test.y", &[t, hidden])?,
            y_a8: reader.maybe("test.y_a8", &[t, hidden])?,
            name: about.name,
            format: about.fmt,
            tokens: t,
            hidden,
        })
    }
}

fn positive(limit: f64) -> Option<f32> {
    (limit > 0.0).then(|| f32_near(limit))
}

fn router(about: &Description) -> Router {
    let [groups, groups_kept] = about.groups.unwrap_or([1, 1]);
    Router {
        scoring: if about.family == "v3" { Scoring::Sigmoid } else { Scoring::SqrtSoftplus },
        top_k: about.top_k,
        groups,
        groups_kept,
        renormalise: true,
        scaling: f32_near(about.routed_scaling_factor),
    }
}

struct Reader {
    file: Checkpoint,
    path: PathBuf,
}

impl Reader {
    fn bad(&self, field: &'static str, problem: impl Into<String>) -> ConformanceError {
        ConformanceError::Case { path: self.path.clone(), field, problem: problem.into() }
    }

    fn describe(&self) -> Result<Description, ConformanceError> {
        let text = self.file.metadata("case").ok_or_else(|| self.bad("name", "the header has no key `case`"))?;
        let about: Description = serde_json::from_str(text)
            .map_err(|e| self.bad("name", format!("the key `case` is not understood ({e})")))?;
        if about.family != "v3" && about.family != "v4" {
            return Err(self.bad("family", format!("{:?} is neither v3 nor v4", about.family)));
        }
        if about.hidden == 0 || about.width == 0 || about.experts == 0 {
            return Err(self.bad("hidden", "sizes must not be zero"));
        }
        Ok(about)
    }

    fn floats(&self, name: &str, shape: &[usize]) -> Result<Vec<f32>, ConformanceError> {
        self.shaped(name, shape)?;
        Ok(self.file.vector(name)?)
    }

    fn maybe(&self, name: &str, shape: &[usize]) -> Result<Option<Vec<f32>>, ConformanceError> {
        if self.file.has(name) { self.floats(name, shape).map(Some) } else { Ok(None) }
    }

    fn shaped(&self, name: &str, shape: &[usize]) -> Result<(), ConformanceError> {
        let found = self.file.shape(name)?;
        if found == shape {
            return Ok(());
        }
        let (path, tensor, found) = (self.path.clone(), name.to_owned(), found.to_vec());
        Err(CheckpointError::Shape { path, tensor, found, expected: format!("{shape:?}") }.into())
    }

    fn ids(&self, name: &str, below: usize, shape: &[usize]) -> Result<Vec<u32>, ConformanceError> {
        self.shaped(name, shape)?;
        let values = self.file.ints(name)?;
        let id = |v: i64| u32::try_from(v).ok().filter(|&id| crate::num::usize_of(id) < below);
        values
            .into_iter()
            .map(|v| id(v).ok_or_else(|| self.bad("experts", format!("{name} holds {v}, not below {below}"))))
            .collect()
    }

    fn bias(&self, about: &Description, prefix: &str) -> Result<Option<Vec<f32>>, ConformanceError> {
        let name = if about.family == "v3" { "gate.e_score_correction_bias" } else { "gate.bias" };
        self.maybe(&format!("{prefix}{name}"), &[about.experts])
    }

    /// `tid2eid[input_ids]` of hash-routed layers.
    fn forced(&self, about: &Description, prefix: &str) -> Result<Option<Vec<u32>>, ConformanceError> {
        if !about.hash {
            return Ok(None);
        }
        let name = format!("{prefix}gate.tid2eid");
        let vocabulary = self.file.shape(&name)?.first().copied().unwrap_or(0);
        let table = self.ids(&name, about.experts, &[vocabulary, about.top_k])?;
        let tokens = self.ids("test.input_ids", vocabulary, &[about.tokens])?;
        let row = |&token: &u32| table[crate::num::usize_of(token) * about.top_k..][..about.top_k].iter().copied();
        Ok(Some(tokens.iter().flat_map(row).collect()))
    }

    fn bad_rows(&self, tokens: usize) -> Result<Vec<usize>, ConformanceError> {
        if !self.file.has("test.bad_rows") {
            return Ok(Vec::new());
        }
        let count = self.file.shape("test.bad_rows")?.first().copied().unwrap_or(0);
        Ok(self.ids("test.bad_rows", tokens, &[count])?.into_iter().map(crate::num::usize_of).collect())
    }
}
