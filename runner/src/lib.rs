//! One native model instance: attention, routing, KV cache.

pub mod engine;
pub mod error;
pub mod experts;
pub mod load;
pub mod model;
mod num;
pub mod routes;
mod step;
