//! Who has a device in use, as a vendor's driver would know it: a worker or a probe of the agent that this double plays
//! for. A reset of a device in use must be refused, as the real ones are. Looks at processes and ends none.

use std::{ffi::OsStr, fs, os::unix::ffi::OsStrExt as _};

/// Words after the program's name that make a process one that computes on a device.
const COMPUTES: [&[u8]; 2] = [b"worker", b"probe"];

/// Processes of the node whose fault script is `script` that compute on a device whose local name `is_meant`.
#[must_use]
pub fn users(script: &OsStr, is_meant: impl Fn(&str) -> bool) -> Vec<String> {
    let processes = fs::read_dir("/proc").into_iter().flatten().flatten().map(|entry| entry.path());
    let uses = |process: &std::path::Path| {
        let words = fs::read(process.join("cmdline")).ok()?;
        let words: Vec<&[u8]> = words.split(|byte| *byte == 0).collect();
        let device = device(&words).filter(|device| is_meant(device))?;
        let environment = fs::read(process.join("environ")).ok()?;
        let variable = [b"BERTH_DOUBLE_SCRIPT=", script.as_bytes()].concat();
        let ours = environment.split(|byte| *byte == 0).any(|entry| entry == variable.as_slice());
        ours.then(|| format!("{} of {device}", process.display()))
    };
    processes.filter_map(|process| uses(&process)).collect()
}

/// The local name of the device that a command line computes on.
fn device<'a>(words: &[&'a [u8]]) -> Option<&'a str> {
    let computes = words.get(1).is_some_and(|word| COMPUTES.contains(word));
    let at = words.iter().position(|word| *word == b"--device")?;
    let device: &'a [u8] = words.get(at.checked_add(1)?)?;
    let device = std::str::from_utf8(device).ok()?;
    device.split_once('/').map(|(_, local)| local).filter(|_| computes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_computes_on_a_device_uses_it() {
        let words = |line: &'static str| device(&line.split(' ').map(str::as_bytes).collect::<Vec<_>>());
        assert_eq!(words("/bin/berth worker --device gpu-01/0000:3b:00.0 --threads=1"), Some("0000:3b:00.0"));
        assert_eq!(words("/bin/berth probe --device npu-01/0.1"), Some("0.1"));
        assert_eq!(words("/bin/berth agent --device npu-01/0.1"), None);
        assert_eq!(words("/bin/berth worker --device"), None);
        assert_eq!(words("sh"), None);
    }

    #[test]
    fn a_process_of_another_node_uses_nothing_here() {
        let script = OsStr::new("/nonexistent/script.jsonl");
        assert_eq!(users(script, |_| true), Vec::<String>::new());
    }
}
