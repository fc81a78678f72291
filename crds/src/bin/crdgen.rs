//! Writes the generated files: `crdgen` prints the CustomResourceDefinitions, `crdgen DIR` writes one file
//! each to DIR, `crdgen DIR PRESETS` the ModelProfiles of published models to PRESETS too.

use std::{
    error::Error,
    fs,
    io::{Write as _, stdout},
    path::PathBuf,
};

use berth_crds::{definitions, presets};

fn main() -> Result<(), Box<dyn Error>> {
    let mut folders = std::env::args_os().skip(1).map(PathBuf::from);
    let dir = folders.next();
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
    if let Some(dir) = folders.next() {
        fs::create_dir_all(&dir)?;
        for profile in presets::all()? {
            let name = profile.metadata.name.clone().unwrap_or_default();
            fs::write(dir.join(format!("{name}.yaml")), presets::yaml(&profile)?)?;
        }
    }
    Ok(())
}
