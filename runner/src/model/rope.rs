//! Rotary position embedding (RoFormer, arXiv 2104.09864, eq. 34) with YaRN's stretched frequencies
//! (arXiv 2309.00071, eq. 17–22), for the decoupled rotary part of MLA's queries and keys.
//!
//! Pair `i` of `d` features turns by `position · f[i]`, `f[i] = θ^(-2i/d)`. Checkpoints lay pairs out either as
//! neighbours (`2i, 2i+1`; V3, `rope_interleave`) or as halves (`i, i + d/2`). Both are written back as halves:
//! queries and keys are only ever multiplied with each other, so the order within them is free. V4's keys are values
//! too: there pairs stay neighbours (`turn_neighbours`), and outputs are turned back.

use super::{ModelError, fields::Fields};
use crate::num::{f32_near, f32_of, f64_of};

/// How frequencies are made, from `rope_parameters` or `rope_scaling`.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct RopeConfig {
    /// Base `θ`.
    pub(crate) theta: f64,
    /// Rotary features of a head, even.
    pub(crate) width: usize,
    /// Whether a pair is two neighbours.
    pub(crate) interleaved: bool,
    /// YaRN, if the model was stretched.
    pub(crate) yarn: Option<Yarn>,
}

/// YaRN's numbers.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Yarn {
    /// Context stretch `s`.
    pub(crate) factor: f64,
    /// Context that the model was trained on before stretching.
    pub(crate) original_context: f64,
    /// Rotations above which a pair is left alone.
    pub(crate) beta_fast: f64,
    /// Rotations below which a pair is fully interpolated.
    pub(crate) beta_slow: f64,
    /// Multiplies cos and sin; `None`: from `mscale` and `mscale_all_dim`.
    pub(crate) attention_factor: Option<f64>,
    /// Weight of the logarithm for the rotary part.
    pub(crate) mscale: f64,
    /// Weight of the logarithm for all features of a head.
    pub(crate) mscale_all_dim: f64,
    /// Whether the bounds of the ramp are rounded to whole pairs.
    pub(crate) truncate: bool,
}

impl RopeConfig {
    /// Reads `rope_parameters`, else `rope_scaling`, else the plain `rope_theta`.
    ///
    /// # Errors
    /// A rope type other than `default` and `yarn`, or a number out of range, by field.
    pub(crate) fn read(config: &Fields<'_>, width: usize, context: usize) -> Result<Self, ModelError> {
        if !width.is_multiple_of(2) {
            return Err(config.refuse("qk_rope_head_dim", "an even number"));
        }
        let interleaved = config.flag("rope_interleave", true)?;
        let parameters = match config.object("rope_parameters")? {
            Some(parameters) => Some(parameters),
            None => config.object("rope_scaling")?,
        };
        let theta_of = |fields: &Fields<'_>| match fields.number_or_none("rope_theta")? {
            Some(_) => fields.positive("rope_theta").map(Some),
            None => Ok(None),
        };
        let inner = parameters.as_ref().map(theta_of).transpose()?.flatten();
        let theta = inner.map_or_else(|| config.positive("rope_theta"), Ok)?;
        if theta <= 1.0 {
            return Err(config.refuse("rope_theta", "a number above 1"));
        }
        if let Some(fields) = &parameters
            && fields.number_or_none("partial_rotary_factor")?.is_some_and(|share| share != 1.0)
        {
            return Err(fields.refuse("partial_rotary_factor", "1"));
        }
        let yarn = parameters.as_ref().map(|fields| Yarn::read(fields, context)).transpose()?.flatten();
        Ok(Self { theta, width, interleaved, yarn })
    }

    /// What attention scores are multiplied with beyond `1/√d`: `(0.1 · mscale_all_dim · ln s + 1)²`
    /// (published V3 inference code, `MLA.softmax_scale`).
    pub(crate) fn score_scale(&self) -> f64 {
        match &self.yarn {
            Some(yarn) if yarn.mscale_all_dim != 0.0 => magnitude(yarn.factor, yarn.mscale_all_dim).powi(2),
            _ => 1.0,
        }
    }
}

impl Yarn {
    /// Reads YaRN's numbers from `rope_parameters` or `rope_scaling`; `None` for the rope type `default`.
    ///
    /// # Errors
    /// A rope type other than these, or a number out of range, by field.
    pub(crate) fn read(fields: &Fields<'_>, context: usize) -> Result<Option<Self>, ModelError> {
        let (kind, field) = match (fields.text("rope_type")?, fields.text("type")?) {
            (Some(kind), _) => (kind, "rope_type"),
            (None, Some(kind)) => (kind, "type"),
            (None, None) => ("default", "rope_type"),
        };
        if kind == "default" {
            return Ok(None);
        }
        if kind != "yarn" {
            return Err(fields.refuse(field, "default or yarn"));
        }
        let positive = |field: &str, default: f64| match fields.number_or_none(field)? {
            Some(number) if number != 0.0 => fields.positive(field),
            _ => Ok(default),
        };
        let original_context = positive("original_max_position_embeddings", f64_of(context))?;
        Ok(Some(Self {
            factor: positive("factor", f64_of(context) / original_context)?,
            original_context,
            beta_fast: positive("beta_fast", 32.0)?,
            beta_slow: positive("beta_slow", 1.0)?,
            attention_factor: fields.number_or_none("attention_factor")?,
            mscale: positive("mscale", 0.0)?,
            mscale_all_dim: positive("mscale_all_dim", 0.0)?,
            truncate: fields.flag("truncate", true)?,
        }))
    }

    /// Share of the unstretched frequency that pair `i` keeps: 1 for fast pairs, 0 for slow ones, a ramp between
    /// (eq. 18–19).
    fn kept(&self, theta: f64, width: usize, pair: usize) -> f32 {
        let pair_of = |rotations: f64| {
            f64_of(width) * (self.original_context / (rotations * 2.0 * std::f64::consts::PI)).ln() / (2.0 * theta.ln())
        };
        let (mut low, mut high) = (pair_of(self.beta_fast), pair_of(self.beta_slow));
        if self.truncate {
            (low, high) = (low.floor(), high.ceil());
        }
        (low, high) = (low.max(0.0), high.min(f64_of(width) - 1.0));
        if low == high {
            high += 0.001;
        }
        let ramp = (f32_of(pair) - f32_near(low)) / f32_near(high - low);
        1.0 - ramp.clamp(0.0, 1.0)
    }

    /// What cos and sin are multiplied with (eq. 22, with DeepSeek's two weights).
    fn attention(&self) -> f64 {
        match self.attention_factor {
            Some(factor) => factor,
            None if self.mscale != 0.0 && self.mscale_all_dim != 0.0 => {
                magnitude(self.factor, self.mscale) / magnitude(self.factor, self.mscale_all_dim)
            }
            None => magnitude(self.factor, 1.0),
        }
    }
}

fn magnitude(factor: f64, weight: f64) -> f64 {
    if factor <= 1.0 { 1.0 } else { 0.1 * weight * factor.ln() + 1.0 }
}

/// Frequencies, ready to turn rows.
#[derive(Debug)]
pub(crate) struct Rope {
    frequencies: Vec<f32>,
    amplitude: f32,
    interleaved: bool,
}

impl Rope {
    /// Frequencies of `width / 2` pairs, in `f32` as the reference computes them.
    pub(crate) fn new(config: &RopeConfig) -> Self {
        let frequency = |pair: usize| {
            let power = f32_near(config.theta).powf(f32_of(2 * pair) / f32_of(config.width));
            let Some(yarn) = &config.yarn else { return 1.0 / power };
            let kept = yarn.kept(config.theta, config.width, pair);
            let stretched = 1.0 / (f32_near(yarn.factor) * power);
            stretched * (1.0 - kept) + (1.0 / power) * kept
        };
        Self {
            frequencies: (0..config.width / 2).map(frequency).collect(),
            amplitude: config.yarn.as_ref().map_or(1.0, |yarn| f32_near(yarn.attention())),
            interleaved: config.interleaved,
        }
    }

    /// cos and sin of every pair at `position`.
    pub(crate) fn angles(&self, position: usize) -> Angles {
        let turn = |frequency: &f32| {
            let angle = f32_of(position) * frequency;
            (angle.cos() * self.amplitude, angle.sin() * self.amplitude)
        };
        Angles { pairs: self.frequencies.iter().map(turn).collect(), interleaved: self.interleaved }
    }
}

/// One position's rotation.
#[derive(Debug)]
pub(crate) struct Angles {
    pairs: Vec<(f32, f32)>,
    interleaved: bool,
}

impl Angles {
    /// Turns one head's rotary features `x` ([width]) into `out` ([width]), as halves.
    pub(crate) fn turn(&self, x: &[f32], out: &mut [f32]) {
        let half = self.pairs.len();
        for (i, (cos, sin)) in self.pairs.iter().enumerate() {
            let (a, b) = if self.interleaved { (x[2 * i], x[2 * i + 1]) } else { (x[i], x[i + half]) };
            out[i] = a * cos - b * sin;
            out[i + half] = b * cos + a * sin;
        }
    }

    /// Turns the pairs of neighbours at the end of `x` in place; what lies before them stays.
    pub(crate) fn turn_neighbours(&self, x: &mut [f32]) {
        self.turn_tail(x, 1.0);
    }

    /// The same, the other way round.
    pub(crate) fn turn_neighbours_back(&self, x: &mut [f32]) {
        self.turn_tail(x, -1.0);
    }

    fn turn_tail(&self, x: &mut [f32], direction: f32) {
        let first = x.len().saturating_sub(2 * self.pairs.len());
        for (pair, (cos, sin)) in x[first..].as_chunks_mut::<2>().0.iter_mut().zip(&self.pairs) {
            let ([a, b], sin) = (*pair, direction * sin);
            *pair = [a * cos - b * sin, b * cos + a * sin];
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn read(config: &serde_json::Value) -> Result<RopeConfig, ModelError> {
        RopeConfig::read(&Fields::new(config)?, 8, 4096)
    }

    #[test]
    fn scores_depend_on_the_distance_of_positions_only() {
        let config = read(&json!({"rope_theta": 10000.0})).unwrap();
        let rope = Rope::new(&config);
        let (q, k) = ([0.3, -1.0, 0.7, 0.2, 1.1, 0.5, -0.4, 0.9], [1.0, 0.1, -0.6, 0.8, 0.2, -0.9, 0.5, 0.4]);
        let score = |at: usize, other: usize| {
            let (mut a, mut b) = ([0.0; 8], [0.0; 8]);
            rope.angles(at).turn(&q, &mut a);
            rope.angles(other).turn(&k, &mut b);
            super::super::maths::dot(&a, &b)
        };
        assert!((score(7, 3) - score(104, 100)).abs() < 1e-4);
        assert!((score(7, 3) - score(7, 4)).abs() > 1e-3);
    }

    #[test]
    fn both_layouts_turn_the_same_pairs() {
        let halves = read(&json!({"rope_theta": 100.0, "rope_interleave": false})).unwrap();
        let neighbours = read(&json!({"rope_theta": 100.0})).unwrap();
        let (mut a, mut b) = ([0.0; 8], [0.0; 8]);
        Rope::new(&halves).angles(5).turn(&[0.0, 2.0, 4.0, 6.0, 1.0, 3.0, 5.0, 7.0], &mut a);
        Rope::new(&neighbours).angles(5).turn(&[0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0], &mut b);
        assert_eq!(a, b);
    }

    #[test]
    fn turning_back_undoes_turning_and_leaves_the_head_of_a_row_alone() {
        let angles = Rope::new(&read(&json!({"rope_theta": 100.0})).unwrap()).angles(9);
        let row: Vec<f32> = (0..11_u8).map(f32::from).collect();
        let mut turned = row.clone();
        angles.turn_neighbours(&mut turned);
        let mut halves = [0.0; 8];
        angles.turn(&row[3..], &mut halves);
        assert_eq!(turned[..3], row[..3]);
        assert_eq!([turned[3], turned[5], turned[4]], [halves[0], halves[1], halves[4]]);
        angles.turn_neighbours_back(&mut turned);
        assert!(turned.iter().zip(&row).all(|(a, b)| (a - b).abs() < 1e-5));
    }

    #[test]
    fn yarn_leaves_fast_pairs_and_stretches_slow_ones() {
        let config = read(&json!({"rope_theta": 10000.0, "rope_scaling": {"type": "yarn", "factor": 40,
            "original_max_position_embeddings": 4096, "mscale": 1.0, "mscale_all_dim": 1.0}}))
        .unwrap();
        let plain = Rope::new(&RopeConfig { yarn: None, ..config.clone() });
        let yarn = Rope::new(&config);
        assert_eq!(yarn.frequencies[0], plain.frequencies[0]);
        let slowest = plain.frequencies[3] / yarn.frequencies[3];
        assert!(slowest > 1.0 && slowest <= 40.1, "{slowest}");
        assert_eq!(yarn.amplitude, 1.0);
        let expected = (0.1 * 40.0_f64.ln() + 1.0).powi(2);
        assert!((config.score_scale() - expected).abs() < 1e-12);
    }

    #[test]
    fn other_rope_types_and_wild_numbers_are_refused_by_field() {
        for (config, field) in [
            (json!({"rope_theta": 1e4, "rope_parameters": {"rope_type": "llama3"}}), "rope_parameters.rope_type"),
            (json!({"rope_theta": 1e4, "rope_scaling": {"type": "linear"}}), "rope_scaling.type"),
            (json!({"rope_theta": 1e4, "rope_scaling": {"type": "yarn", "factor": -3}}), "rope_scaling.factor"),
            (json!({"rope_theta": 1e4, "rope_parameters": {"partial_rotary_factor": 0.5}}), "partial_rotary_factor"),
            (json!({"rope_theta": 0.5}), "rope_theta"),
            (json!({}), "rope_theta"),
        ] {
            let error = read(&config).unwrap_err().to_string();
            assert!(error.contains(field), "{error}");
        }
    }
}
