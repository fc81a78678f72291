//! Writes the CustomResourceDefinitions: `crdgen` prints them, `crdgen DIR` writes one file each to DIR.
//! Writes nothing else and reads nothing.

use std::{
    error::Error,
    fs,
    io::{Write as _, stdout},
    path::PathBuf,
};

use berth_crds::definitions;

fn main() -> Result<(), Box<dyn Error>> {
    let dir = std::env::args_os().nth(1).map(PathBuf::from);
    for definition in definitions::all() {
        let yaml = definitions::yaml(&definition)?;
        match &dir {
            Some(dir) => {
                fs::create_dir_all(dir)?;
                fs::write(dir.join(definitions::file_name(&definition)), yaml)?;
            }
            None => writeln!(stdout(), "---\n{yaml}")?,
        }
    }
    Ok(())
}
