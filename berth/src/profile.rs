//! `berth profile`: ModelProfiles from published presets and from a checkpoint's `config.json`. Computes
//! what the configuration says and measures nothing; figures it cannot know it asks for.

mod loads;
mod v4;

use std::{
    fs,
    io::Write as _,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, bail};
use berth_crds::{ModelProfile, ModelProfileSpec, presets};
use berth_types::{Bytes, Geometry, Vendor, WeightFormat};
use clap::{Args, Subcommand};
use serde_json::Value;

use crate::verdict::Verdict;

/// Write ModelProfiles: from presets, or from a checkpoint.
#[derive(Debug, Args)]
pub(crate) struct ProfileArgs {
    #[command(subcommand)]
    command: ProfileCommand,
}

#[derive(Debug, Subcommand)]
enum ProfileCommand {
    /// Print the profile of a published model, or the names of all.
    Preset {
        /// Its name; without one, all names are printed.
        name: Option<String>,
    },
    /// Print the profile of the checkpoint that a config.json belongs to.
    Import(ImportArgs),
}

#[derive(Debug, Args)]
struct ImportArgs {
    /// The checkpoint's config.json, or its folder.
    config: PathBuf,
    /// Name of the profile (default: the folder's name).
    #[arg(long)]
    name: Option<String>,
    /// Bytes of everything but routed experts (default: the safetensors beside the config less the experts,
    /// else computed from the config's widths).
    #[arg(long)]
    non_expert_bytes: Option<Bytes>,
    /// Cache bytes per token (default: computed from the config).
    #[arg(long)]
    kv_bytes_per_token: Option<Bytes>,
    /// How devices of a vendor hold experts, such as ascend=int8_per_channel; repeatable (default: as stored).
    #[arg(long, value_parser = vendor_format)]
    vendor_format: Vec<(Vendor, WeightFormat)>,
    /// Recorded token counts, little-endian u32 [windows][expert layers][experts]: their sums become expertLoads, where new
    /// instances start from.
    #[arg(long, value_name = "FILE")]
    loads: Option<PathBuf>,
}

fn vendor_format(text: &str) -> Result<(Vendor, WeightFormat), String> {
    let (vendor, format) = text.split_once('=').ok_or("write it as VENDOR=FORMAT")?;
    Ok((vendor.parse().map_err(|error| format!("{error}"))?, format.parse()?))
}

/// Prints what was asked for.
pub(crate) fn run(args: ProfileArgs) -> anyhow::Result<Verdict> {
    let text = match args.command {
        ProfileCommand::Preset { name } => preset(name.as_deref())?,
        ProfileCommand::Import(args) => presets::yaml(&import(&args)?)?,
    };
    std::io::stdout().write_all(text.as_bytes())?;
    Ok(Verdict::Pass)
}

fn preset(name: Option<&str>) -> anyhow::Result<String> {
    let all = presets::all()?;
    let named = |profile: &ModelProfile| profile.metadata.name.clone().unwrap_or_default();
    let Some(name) = name else {
        return Ok(all.iter().map(|profile| named(profile) + "\n").collect());
    };
    match all.iter().find(|profile| named(profile) == name) {
        Some(profile) => Ok(presets::yaml(profile)?),
        None => bail!("preset {name:?} does not exist: berth profile preset lists all"),
    }
}

fn import(args: &ImportArgs) -> anyhow::Result<ModelProfile> {
    let ImportArgs { config, name, non_expert_bytes, kv_bytes_per_token, vendor_format, loads } = args;
    let file = if config.is_dir() { config.join("config.json") } else { config.clone() };
    let text = fs::read_to_string(&file).with_context(|| format!("reading {}", file.display()))?;
    let value: Value = serde_json::from_str(&text).with_context(|| format!("{} is not JSON", file.display()))?;
    let geometry = Geometry::from_config(&value).with_context(|| file.display().to_string())?;
    let fields = Fields { file: &file, value: &value };
    let v4 = if v4::is_v4(&fields) { Some(v4::Attention::read(&fields, &geometry)?) } else { None };
    let folder = file.canonicalize().ok().and_then(|path| path.parent().map(Path::to_owned)).unwrap_or_default();
    let name = match name {
        Some(name) => name.clone(),
        None => object_name(&folder),
    };
    if name.is_empty() {
        bail!("{} has no folder to take a name from: give --name", file.display());
    }
    let mut sources = vec![format!("config.json of {name}")];
    let non_expert_bytes = match (non_expert_bytes, checkpoint_bytes(&folder)?) {
        (Some(bytes), _) => *bytes,
        (None, Some(all)) => {
            sources.push("nonExpertBytes: the checkpoint's safetensors less its experts".to_owned());
            all.minus(expert_bytes(&geometry))
        }
        (None, None) if v4.is_some() => {
            sources.push("nonExpertBytes: computed from the widths and stored formats".to_owned());
            v4.as_ref().map_or(Ok(Bytes::ZERO), |v4| v4.non_expert_bytes(&geometry))?
        }
        (None, None) => {
            sources.push("nonExpertBytes: computed from the widths, two bytes a weight".to_owned());
            fields.non_expert_bytes(&geometry)?
        }
    };
    let (kv_bytes_per_token, kv_fixed_bytes_per_sequence) = match (kv_bytes_per_token, &v4) {
        (Some(bytes), _) => (*bytes, Bytes::ZERO),
        (None, Some(v4)) => {
            sources
                .push("kvBytesPerToken: compressed entries and index keys, bf16; per sequence: the windows".to_owned());
            (v4.kv_bytes_per_token(), v4.kv_fixed_bytes()?)
        }
        (None, None) => (fields.kv_bytes_per_token(&geometry, &mut sources)?, Bytes::ZERO),
    };
    let mut expert_loads = Vec::new();
    if let Some(file) = loads {
        let (shares, windows) = loads::shares(file, &geometry)?;
        expert_loads = shares;
        sources.push(format!("expertLoads: token counts of {windows} recorded windows"));
    }
    let spec = ModelProfileSpec {
        non_expert_bytes,
        kv_bytes_per_token,
        kv_fixed_bytes_per_sequence,
        context: fields.number("max_position_embeddings")?,
        geometry,
        vendor_formats: vendor_format.iter().copied().collect(),
        throughput: Vec::new(),
        expert_loads,
        sources,
    };
    Ok(ModelProfile::new(&name, spec))
}

/// The folder's name as Kubernetes writes names.
fn object_name(folder: &Path) -> String {
    let name = folder.file_name().map(|name| name.to_string_lossy().to_lowercase()).unwrap_or_default();
    let plain = |c: char| if c.is_ascii_alphanumeric() || c == '.' { c } else { '-' };
    name.chars().map(plain).collect::<String>().trim_matches(['-', '.']).to_owned()
}

fn expert_bytes(geometry: &Geometry) -> Bytes {
    let experts = u64::from(geometry.expert_layers()) * u64::from(geometry.experts);
    geometry.expert_bytes(geometry.format).times(experts)
}

/// Bytes of the safetensors files in `folder`; `None` when there is none.
fn checkpoint_bytes(folder: &Path) -> anyhow::Result<Option<Bytes>> {
    let mut all = None;
    for entry in fs::read_dir(folder).with_context(|| format!("listing {}", folder.display()))? {
        let entry = entry.with_context(|| format!("listing {}", folder.display()))?;
        if entry.path().extension().is_some_and(|extension| extension == "safetensors") {
            let size = fs::metadata(entry.path()).with_context(|| entry.path().display().to_string())?.len();
            all = Some(all.unwrap_or(Bytes::ZERO).plus(Bytes(size)));
        }
    }
    Ok(all)
}

/// The fields of a config.json, read with errors that name file and field.
#[derive(Debug)]
struct Fields<'a> {
    file: &'a Path,
    value: &'a Value,
}

impl Fields<'_> {
    fn optional(&self, field: &str) -> anyhow::Result<Option<u64>> {
        match self.value.get(field) {
            None | Some(Value::Null) => Ok(None),
            Some(value) => match value.as_u64().filter(|number| *number <= 1 << 40) {
                Some(number) => Ok(Some(number)),
                None => bail!("{}: field {field} is {value}: it must be a whole number", self.file.display()),
            },
        }
    }

    fn number(&self, field: &str) -> anyhow::Result<u64> {
        let found = self.optional(field)?;
        found.with_context(|| format!("{}: field {field} is missing", self.file.display()))
    }

    /// MLA keeps one latent and one rotary key per token and layer, in bfloat16:
    /// (kv_lora_rank + qk_rope_head_dim) × 2 bytes × layers. Without either, keys and values as they are.
    fn kv_bytes_per_token(&self, geometry: &Geometry, sources: &mut Vec<String>) -> anyhow::Result<Bytes> {
        let layers = u64::from(geometry.layers);
        if let Some(latent) = self.optional("kv_lora_rank")? {
            sources.push("kvBytesPerToken: (kv_lora_rank + qk_rope_head_dim) x 2 bytes x layers".to_owned());
            return Ok(Bytes(latent).plus(Bytes(self.number("qk_rope_head_dim")?)).times(2).times(layers));
        }
        let (Some(heads), Some(width)) = (self.optional("num_key_value_heads")?, self.optional("head_dim")?) else {
            bail!(
                "{}: fields kv_lora_rank, or num_key_value_heads and head_dim, are missing: give --kv-bytes-per-token",
                self.file.display()
            );
        };
        sources.push("kvBytesPerToken: upper bound, num_key_value_heads x head_dim x 2 bytes x layers".to_owned());
        Ok(Bytes(heads).times(width).times(2).times(layers))
    }

    /// Weights of attention (MLA), routers, shared experts, dense layers, norms, embeddings and head, two
    /// bytes each: an upper bound where the checkpoint stores some of them in one byte.
    fn non_expert_bytes(&self, geometry: &Geometry) -> anyhow::Result<Bytes> {
        let latent = self.optional("kv_lora_rank")?.with_context(|| {
            format!(
                "{}: field kv_lora_rank is missing, and there are no safetensors beside it: give --non-expert-bytes",
                self.file.display()
            )
        })?;
        let hidden = u64::from(geometry.hidden);
        let product = |a: u64, b: u64| Bytes(a).times(b);
        let (heads, rope) = (self.number("num_attention_heads")?, self.number("qk_rope_head_dim")?);
        let (nope, value) = (self.number("qk_nope_head_dim")?, self.number("v_head_dim")?);
        let query = match self.optional("q_lora_rank")? {
            Some(rank) => product(hidden, rank).plus(Bytes(rank)).plus(product(rank, heads).times(nope + rope)),
            None => product(hidden, heads).times(nope + rope),
        };
        let keys = product(hidden, latent + rope).plus(Bytes(latent)).plus(product(latent, heads).times(nope + value));
        let attention = query.plus(keys).plus(product(heads, value).times(hidden)).plus(Bytes(2 * hidden));
        let experts = u64::from(geometry.experts);
        let shared = product(3 * hidden, u64::from(geometry.expert_width)).times(u64::from(geometry.shared_experts));
        let router = product(experts, hidden).plus(Bytes(experts));
        let dense = match geometry.dense_layers {
            0 => Bytes::ZERO,
            _ => product(3 * hidden, self.number("intermediate_size")?),
        };
        let tied = self.value.get("tie_word_embeddings") == Some(&Value::Bool(true));
        let embeddings = product(self.number("vocab_size")?, hidden).times(if tied { 1 } else { 2 });
        let weights = attention
            .times(u64::from(geometry.layers))
            .plus(shared.plus(router).times(u64::from(geometry.expert_layers())))
            .plus(dense.times(u64::from(geometry.dense_layers)))
            .plus(embeddings)
            .plus(Bytes(hidden));
        Ok(weights.times(2))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn tiny() -> Value {
        json!({"model_type": "deepseek_v3", "num_hidden_layers": 4, "first_k_dense_replace": 1, "n_routed_experts": 16,
               "n_shared_experts": 1, "num_experts_per_tok": 4, "n_group": 4, "topk_group": 2, "hidden_size": 64,
               "moe_intermediate_size": 32, "intermediate_size": 96, "kv_lora_rank": 32, "q_lora_rank": 48,
               "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16, "num_attention_heads": 4,
               "vocab_size": 258, "max_position_embeddings": 512, "tie_word_embeddings": false})
    }

    fn import_of(config: &Value, files: &[(&str, usize)]) -> anyhow::Result<ModelProfile> {
        let folder = tempfile::tempdir().unwrap();
        let checkpoint = folder.path().join("V3_Tiny");
        fs::create_dir(&checkpoint).unwrap();
        fs::write(checkpoint.join("config.json"), config.to_string()).unwrap();
        for (name, size) in files {
            fs::write(checkpoint.join(name), vec![0; *size]).unwrap();
        }
        import(&ImportArgs {
            config: checkpoint,
            name: None,
            non_expert_bytes: None,
            kv_bytes_per_token: None,
            vendor_format: Vec::new(),
            loads: None,
        })
    }

    #[test]
    fn a_config_alone_gives_computed_figures() {
        let profile = import_of(&tiny(), &[]).unwrap();
        assert_eq!(profile.metadata.name.as_deref(), Some("v3-tiny"));
        // (32 + 16) x 2 bytes x 4 layers.
        assert_eq!(profile.spec.kv_bytes_per_token, Bytes(384));
        // Per layer: query 64x48 + 48 + 48x4x32, keys 64x48 + 32 + 32x4x32, out 4x16x64, norms 128.
        let attention = 3072 + 48 + 6144 + 3072 + 32 + 4096 + 4096 + 128;
        let weights = 4 * attention + 3 * (3 * 64 * 32 + 16 * 64 + 16) + 3 * 64 * 96 + 2 * 258 * 64 + 64;
        assert_eq!(profile.spec.non_expert_bytes, Bytes(2 * weights));
        assert_eq!((profile.spec.context, profile.spec.geometry.experts), (512, 16));
    }

    #[test]
    fn weights_beside_the_config_are_weighed() {
        let experts = 3 * 16 * 3 * 64 * 32 * 2;
        let profile = import_of(&tiny(), &[("model.safetensors", experts + 1000)]).unwrap();
        assert_eq!(profile.spec.non_expert_bytes, Bytes(1000));
    }

    #[test]
    fn a_missing_field_is_named_with_what_to_give_instead() {
        let mut config = tiny();
        config["kv_lora_rank"] = Value::Null;
        let error = format!("{:#}", import_of(&config, &[]).unwrap_err());
        assert!(error.contains("kv_lora_rank") && error.contains("--non-expert-bytes"), "{error}");
        let mut config = tiny();
        config["max_position_embeddings"] = json!(-1);
        let error = format!("{:#}", import_of(&config, &[]).unwrap_err());
        assert!(error.contains("max_position_embeddings"), "{error}");
    }

    #[test]
    fn recorded_loads_become_shares_and_a_torn_file_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let (config, file) = (folder.path().join("config.json"), folder.path().join("a.u32le"));
        fs::write(&config, tiny().to_string()).unwrap();
        // Two windows of three expert layers: expert 3 is asked for twice as often as the others.
        let counts = (0..2 * 3 * 16).flat_map(|at| (if at % 16 == 3 { 20_u32 } else { 10 }).to_le_bytes());
        let bytes: Vec<u8> = counts.collect();
        let import = |bytes: &[u8]| {
            fs::write(&file, bytes).unwrap();
            let loads = Some(file.clone());
            let args = ImportArgs {
                config: config.clone(),
                name: Some("v3-tiny".to_owned()),
                non_expert_bytes: None,
                kv_bytes_per_token: None,
                vendor_format: Vec::new(),
                loads,
            };
            import(&args)
        };
        let spec = import(&bytes).unwrap().spec;
        assert_eq!(spec.expert_loads.iter().map(|layer| layer.layer).collect::<Vec<_>>(), [1, 2, 3]);
        assert_eq!(spec.expert_loads[0].shares[..4], [32_767, 32_767, 32_767, 65_535]);
        assert!(spec.validate_expert_loads().is_ok());
        assert!(spec.sources.iter().any(|source| source.contains("2 recorded windows")), "{:?}", spec.sources);
        let torn = import(&bytes[1..]).unwrap_err().to_string();
        assert!(torn.contains("no whole windows of 3 expert layers x 16 experts"), "{torn}");
    }

    #[test]
    fn presets_are_found_by_name() {
        assert!(preset(None).unwrap().contains("deepseek-v3\n"));
        assert!(preset(Some("deepseek-v3")).unwrap().contains("kind: ModelProfile"));
        assert!(preset(Some("nope")).unwrap_err().to_string().contains("berth profile preset lists all"));
    }
}
