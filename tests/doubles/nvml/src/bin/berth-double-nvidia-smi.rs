//! A double of `nvidia-smi --gpu-reset -i <bus address>`: writes into the script that `BERTH_DOUBLE_SCRIPT` names that the
//! device is well again, and one line into `<script>.resets`. It refuses, as the real one does, when somebody has the device
//! open: a worker or a probe of that node, or while a file `<script>.refuse` exists. It takes as many milliseconds as a file
//! `<script>.hang` says; one that is ended before did nothing.
//! It must never be part of what ships.

use std::{
    env,
    fs::{self, OpenOptions},
    io::{self, Write as _},
    path::{Path, PathBuf},
    process::ExitCode,
    thread,
    time::Duration,
};

use berth_double_stage::users::users;

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
    let in_use = || users(script.as_os_str(), |local| local == device);
    let mut users = in_use();
    let takes = fs::read_to_string(beside("hang")).ok().and_then(|text| text.trim().parse().ok());
    thread::sleep(Duration::from_millis(takes.unwrap_or(0)));
    users.extend(in_use());
    let refused = match (beside("refuse").exists(), users.is_empty()) {
        (true, _) => " refused".to_owned(),
        (false, true) => String::new(),
        (false, false) => format!(" in use by {}", users.join(", ")),
    };
    if let Err(error) = append(&beside("resets"), &format!("{device}{refused}")) {
        return (Err(error.to_string()), 1);
    }
    if !refused.is_empty() {
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
