//! A double of libnvidia-ml.so.1: the same symbols, the same layouts, devices that a script describes.
//!
//! An agent under test opens it by path, as it opens the real one. What it answers comes from the first
//! line of the script that `BERTH_DOUBLE_SCRIPT` names; lines appended to that file later change it while
//! the agent runs. The node lab drives it through the `berth_double_*` symbols instead.
//! It must never be part of what ships, and never decides anything: it only answers what it was told.

pub mod ffi;
pub mod script;
pub mod state;
