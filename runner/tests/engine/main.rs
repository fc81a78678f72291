//! The runner as its users see it: models, engine, calls to workers, and the whole part.
#![cfg(test)]

mod invariance;
mod part;
mod reference;
mod retry;
mod tiny;
mod worker;
