//! The runner as its users see it: models, engine and calls to workers.

mod invariance;
mod part;
mod reference;
mod retry;
mod tiny;
mod worker;
