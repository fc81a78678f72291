//! Generates the wire types. protoc comes vendored, so nothing has to be installed.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut prost = tonic_prost_build::Config::new();
    prost.protoc_executable(protoc_bin_vendored::protoc_bin_path()?);
    // Activations are large: keep them as reference-counted buffers instead of copying.
    prost.bytes(["."]);
    let files = ["control.proto", "expert.proto", "serve.proto", "worker.proto"].map(|name| format!("proto/{name}"));
    tonic_prost_build::configure().compile_with_config(prost, &files, &["proto".to_owned()])?;
    println!("cargo::rerun-if-changed=proto");
    Ok(())
}
