//! Keeps expert placements true.
