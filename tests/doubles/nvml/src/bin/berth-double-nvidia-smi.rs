//! A double of `nvidia-smi --gpu-reset -i <bus address>`: writes into the script that `BERTH_DOUBLE_SCRIPT` names that the
//! device is well again, and one line into `<script>.resets`. While a file `<script>.refuse` exists it refuses as the real
//! one does when somebody has the device open.
//! It must never be part of what ships.

use std::{
    env,
    fs::OpenOptions,
    io::{self, Write as _},
    path::{Path, PathBuf},
    process::ExitCode,
};

fn main() -> ExitCode {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let script = env::var_os("BERTH_DOUBLE_SCRIPT").map(PathBuf::from);
    let (outcome, code) = match (arguments.iter().map(String::as_str).collect::<Vec<_>>().as_slice(), script) {
        (["--gpu-reset", "-i", device], Some(script)) => reset(device, &script),
        _ => (Err("usage: nvidia-smi --gpu-reset -i <bus address>".to_owned()), 2),
    };
    let said = match &outcome {
        Ok(said) => writeln!(io::stdout(), "{said}"),
        Err(said) => writeln!(io::stderr(), "{said}"),
    };
    if said.is_err() { ExitCode::FAILURE } else { ExitCode::from(code) }
}

fn reset(device: &str, script: &Path) -> (Result<String, String>, u8) {
    let beside = |ending: &str| PathBuf::from(format!("{}.{ending}", script.display()));
    let append = |path: &Path, line: &str| {
        let file = OpenOptions::new().create(true).append(true).open(path);
        file.and_then(|mut file| file.write_all(format!("{line}\n").as_bytes()))
    };
    let refuses = beside("refuse").exists();
    if let Err(error) = append(&beside("resets"), &format!("{device}{}", if refuses { " refused" } else { "" })) {
        return (Err(error.to_string()), 1);
    }
    if refuses {
        let words = format!("GPU {device} is in use by one or more applications: it was not reset");
        return (Err(words), 3);
    }
    let well = format!(
        r#"{{"nvml":"{device}","set":{{"lost":false,"fields":{{"230":0}},"ecc_uncorrected":0,"remapped":{{}},"return":{{}}}}}}"#
    );
    match append(script, &well) {
        Ok(()) => (Ok(format!("GPU {device} was successfully reset.")), 0),
        Err(error) => (Err(error.to_string()), 1),
    }
}
