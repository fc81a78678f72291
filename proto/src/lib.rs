//! The wire between the parts of Berth.
