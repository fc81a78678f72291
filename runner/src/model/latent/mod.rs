//! Multi-head latent attention: V3's. The maths and what it remembers.

pub(crate) mod attention;
pub(crate) mod cache;
