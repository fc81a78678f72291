//! NVIDIA's lines in the kernel log: text of one record in, facts out.
//!
//! Formats: kernel_rc.c, gpu.c, osinit.c and common_nvswitch.h of the open kernel modules. A line that
//! is damaged in its address or number is no line of ours; nothing is guessed from the words in it.

use crate::health::fact::{Fact, PciAddress, Source, What, Xid};

/// How the kernel begins the line of a program that it ended for want of memory, the machine's or its group's.
const OUT_OF_MEMORY: [&str; 2] = ["Out of memory: Killed process ", "Memory cgroup out of memory: Killed process "];

/// Reads lines of one kernel log in their order; one message of the driver spans three records.
#[derive(Clone, Debug, Default)]
pub struct Nvrm {
    /// The device of a message at probe that is not complete yet.
    probing: Option<PciAddress>,
}

impl Nvrm {
    /// Facts in the text of one record.
    pub fn read(&mut self, text: &str) -> Vec<Fact> {
        if let Some(rest) = text.strip_prefix("nvidia-nvswitch") {
            return switch(rest).into_iter().collect();
        }
        if OUT_OF_MEMORY.iter().any(|start| text.starts_with(start)) {
            return vec![Fact::node(What::Killed(text.chars().take(120).collect()))];
        }
        if let Some(slot) = slot_down(text) {
            return vec![Fact::node(What::SlotDown(slot))];
        }
        let Some(rest) = text.strip_prefix("NVRM: ") else { return Vec::new() };
        if rest.starts_with("loading NVIDIA UNIX ") {
            return vec![Fact::node(What::DriverLoaded(rest.chars().take(120).collect()))];
        }
        if let Some(rest) = rest.strip_prefix("Xid (") {
            return xid(rest).into_iter().collect();
        }
        if let Some(address) = rest.strip_prefix("The NVIDIA GPU ") {
            self.probing = address.trim_end().parse().ok();
            return Vec::new();
        }
        if rest.starts_with("fallen off the bus and is not responding") {
            let lost = self.probing.take();
            return lost.map(|address| bus_loss(address, text)).into_iter().collect();
        }
        if let Some((address, said)) = rest.strip_prefix("GPU ").and_then(|rest| rest.split_once(": ")) {
            let fallen = said.starts_with("GPU has fallen off the bus");
            let address = address.strip_prefix("at PCI:").unwrap_or(address).parse().ok();
            return address.filter(|_| fallen).map(|address| bus_loss(address, text)).into_iter().collect();
        }
        Vec::new()
    }
}

/// `pcieport 0000:3a:00.0: pciehp: Slot(2): Link Down`: the port is named, and not what is behind it.
fn slot_down(text: &str) -> Option<String> {
    let down = text.starts_with("pcieport ") && text.contains(": pciehp: Slot(") && text.ends_with(": Link Down");
    down.then(|| text.chars().take(120).collect())
}

fn bus_loss(address: PciAddress, text: &str) -> Fact {
    let line: String = text.trim_start_matches("NVRM: ").chars().take(160).collect();
    Fact::device(address.to_string(), What::BusLoss(line))
}

/// `PCI:0000:3b:00 GPU-I:01 GPU-CI:00): 79, pid=7, name=x, message`.
fn xid(rest: &str) -> Option<Fact> {
    let (attribute, rest) = rest.split_once("): ")?;
    let mut words = attribute.split(' ').filter(|word| !word.is_empty());
    let address = words.next()?;
    let address: PciAddress = address.strip_prefix("PCI:").unwrap_or(address).parse().ok()?;
    // Only a partition may stand behind the address: anything else is a damaged one.
    let mut gpu_instance = None;
    for word in words {
        let (name, number) = word.split_once(':')?;
        let number = number.bytes().all(|byte| byte.is_ascii_digit()).then(|| number.parse().ok())??;
        match name {
            "GPU-I" => gpu_instance = Some(number),
            "GPU-CI" => {}
            _ => return None,
        }
    }
    let (digits, rest) = rest.split_once(',').unwrap_or((rest.trim_end(), ""));
    // A plain decimal: `parse` alone would take a sign.
    let plain = !digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_digit());
    let number: u16 = plain.then(|| digits.parse().ok())??;
    let (pid, process, message) = process(rest.trim_start());
    if number == 154 {
        return Some(Fact::device(address.to_string(), What::Recovery(recovery(message))));
    }
    let xid = Xid {
        number,
        source: Source::KernelLog,
        pid,
        process: process.to_owned(),
        gpu_instance,
        message: message.trim().to_owned(),
    };
    Some(Fact::device(address.to_string(), What::Xid(xid)))
}

/// `pid=7, name=x, message` or only the message. A name may hold anything, commas too; the message then
/// keeps the rest of the name, which no rule reads.
fn process(rest: &str) -> (Option<u32>, &str, &str) {
    let Some(rest) = rest.strip_prefix("pid=") else { return (None, "", rest) };
    let (pid, rest) = rest.split_once(',').unwrap_or((rest, ""));
    let pid = pid.trim_matches('\'').parse().ok();
    let Some(rest) = rest.trim_start().strip_prefix("name=") else { return (pid, "", rest.trim_start()) };
    let (name, message) = rest.split_once(", ").unwrap_or((rest, ""));
    (pid, name, message)
}

/// The value after the last `to` in `… changed from 0x0 (None) to 0x4 (Drain and Reset)`; wider than 32 bits, damaged or
/// absent = `None`. The last, for a program's name stands before it and may hold anything.
fn recovery(message: &str) -> Option<u32> {
    let (_, to) = message.rsplit_once(" to ")?;
    let hex = to.trim_start().strip_prefix("0x")?;
    let hex = hex.split([' ', '(']).next()?;
    let plain = hex.bytes().all(|byte| byte.is_ascii_hexdigit());
    plain.then(|| u32::from_str_radix(hex, 16).ok())?
}

/// `0: SXid (PCI:0000:05:00.0): 20034, Fatal, Link 62 LTSSM Fault Up`. The two records that follow one
/// fault have neither word, and are dropped.
fn switch(rest: &str) -> Option<Fact> {
    let (instance, rest) = rest.split_once(": SXid (PCI:")?;
    let (address, rest) = rest.split_once("): ")?;
    address.parse::<PciAddress>().ok()?;
    let (number, rest) = rest.split_once(", ")?;
    number.parse::<u32>().ok()?;
    let (severity, message) = rest.split_once(", ")?;
    let fatal = match severity {
        "Fatal" => true,
        "Non-fatal" => false,
        _ => return None,
    };
    let message: String = message.chars().take(120).collect();
    let text = format!("SXid {number}, nvswitch {instance}, {severity}, {message}");
    Some(Fact::node(What::Switch { fatal, text }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn one(text: &str) -> Option<Fact> {
        Nvrm::default().read(text).pop()
    }

    fn number(text: &str) -> Option<(String, u16, Option<u32>)> {
        match one(text)? {
            Fact { of: crate::health::fact::Subject::Device(local), what: What::Xid(xid) } => {
                Some((local, xid.number, xid.pid))
            }
            _ => None,
        }
    }

    #[test]
    fn every_form_of_the_line_is_read() {
        let of = |local: &str, number, pid| Some((local.to_owned(), number, pid));
        for (line, expected) in [
            (
                "NVRM: Xid (PCI:0000:3b:00): 79, pid='<unknown>', name=<unknown>, GPU has fallen off the bus.",
                of("0000:3b:00.0", 79, None),
            ),
            (
                "NVRM: Xid (PCI:0000:3b:00): 13, pid=41250, name=python3, Graphics Exception: ESR 0x5=0x1",
                of("0000:3b:00.0", 13, Some(41250)),
            ),
            (
                "NVRM: Xid (PCI:0004:01:00 GPU-I:03 GPU-CI:00): 31, pid=7, name=a: b, c [driver], MMU Fault",
                of("0004:01:00.0", 31, Some(7)),
            ),
            ("NVRM: Xid (0000:91:00.0): 62, 00000a9f 00000a85", of("0000:91:00.0", 62, None)),
            ("NVRM: Xid (PCI:0000:91:00): 48", of("0000:91:00.0", 48, None)),
            (
                "NVRM: Xid (PCI:0008:01:00): 149, NETIR_LINK_EVT  Fatal   XC0 i0 Link 08 (0x004505c6 0x0)",
                of("0008:01:00.0", 149, None),
            ),
        ] {
            assert_eq!(number(line), expected, "{line}");
        }
    }

    #[test]
    fn a_damaged_line_is_no_line() {
        for line in [
            "NVRM: Xid (PCI:0000:3b:00): +79, GPU has fallen off the bus.",
            "NVRM: Xid (PCI:0000:3b:00): 0x4f, text",
            "NVRM: Xid (PCI:0000:3b:00): 70000, text",
            "NVRM: Xid (PCI:0000:zz:00): 79, text",
            "NVRM: Xid (PCI:3b:00): 79, text",
            "kernel: NVRM: Xid (PCI:0000:3b:00): 79, text",
            "python3: NVRM: Xid (PCI:0000:3b:00): 79, text",
            "NVRM: Xid (PCI:0000:3b:00 GARBAGE): 79, text",
            "NVRM: Xid (PCI:0000:3b:00 GPU-I:x1): 79, text",
            "NVRM: Xid (PCI:0000:3b:00 GPU-I:): 79, text",
            "NVRM: Xid (PCI:0000:3b:00",
            "NVRM: Xid (PCI:0000:3b:00): ",
            "NVRM: Xid (PCI:0000:3b:00): , 79",
        ] {
            assert_eq!(one(line), None, "{line}");
        }
    }

    #[test]
    fn the_number_after_to_is_the_recovery_action() {
        let value = |line: &str| one(line).map(|fact| fact.what);
        let line = |tail: &str| {
            format!("NVRM: Xid (PCI:0000:3b:00): 154, GPU recovery action changed from 0x3 (Drain P2P){tail}")
        };
        assert_eq!(value(&line(" to 0x0 (None)")), Some(What::Recovery(Some(0))));
        assert_eq!(value(&line(" to 0x4 (Drain and Reset)")), Some(What::Recovery(Some(4))));
        assert_eq!(value(&line(" to 0x100000000 (?)")), Some(What::Recovery(None)));
        assert_eq!(value(&line(" to 0x4zz (?)")), Some(What::Recovery(None)));
        let named = "NVRM: Xid (PCI:0000:3b:00): 154, pid=7, name=a, back to 0x0 b, GPU recovery action changed from 0x0 (None) to 0x1 (GPU Reset Required)";
        assert_eq!(value(named), Some(What::Recovery(Some(1))), "a program's name is no value");
        assert_eq!(value(&line("")), Some(What::Recovery(None)));
    }

    #[test]
    fn bus_loss_without_a_number_is_read_in_both_forms() {
        let lost = one("NVRM: GPU 0000:91:00.0: GPU has fallen off the bus.").unwrap();
        assert!(matches!(lost.what, What::BusLoss(_)), "{lost:?}");
        assert_eq!(one("NVRM: GPU 0000:91:00.0: GPU serial number is 1653723052734."), None);
        let mut nvrm = Nvrm::default();
        assert!(nvrm.read("NVRM: The NVIDIA GPU 0000:18:00.0").is_empty());
        assert!(nvrm.read("NVRM: (PCI ID: 10de:2901) installed in this system has").is_empty());
        let lost = nvrm.read("NVRM: fallen off the bus and is not responding to commands.");
        assert_eq!(lost[0].of, crate::health::fact::Subject::Device("0000:18:00.0".to_owned()));
        assert!(nvrm.read("NVRM: fallen off the bus and is not responding to commands.").is_empty());
    }

    #[test]
    fn three_records_of_one_switch_fault_are_one_fact() {
        let head = "nvidia-nvswitch0: SXid (PCI:0000:05:00.0): 20034, ";
        assert!(matches!(
            one(&format!("{head}Fatal, Link 62 LTSSM Fault Up")).unwrap().what,
            What::Switch { fatal: true, .. }
        ));
        assert_eq!(one(&format!("{head}Severity 1 Engine instance 62 Sub-engine instance 00")), None);
        assert_eq!(one(&format!("{head}Data {{0x50610002, 0x50610002}}")), None);
    }

    #[test]
    fn programs_that_were_killed_and_drivers_that_were_loaded_are_told() {
        let killed = "Memory cgroup out of memory: Killed process 4711 (python3) total-vm:9kB, anon-rss:8kB";
        assert!(matches!(one(killed).unwrap().what, What::Killed(text) if text.contains("4711")));
        assert_eq!(one("python3 invoked oom-killer: gfp_mask=0x1"), None);
        let loaded = "NVRM: loading NVIDIA UNIX x86_64 Kernel Module  570.133.20  Thu Mar  6 18:54:33 UTC 2025";
        assert!(matches!(one(loaded).unwrap().what, What::DriverLoaded(text) if text.contains("570.133.20")));
        let slot = one("pcieport 0000:3a:00.0: pciehp: Slot(2): Link Down").unwrap();
        assert!(matches!(slot.what, What::SlotDown(text) if text.contains("Slot(2)")));
        assert_eq!(one("pcieport 0000:3a:00.0: pciehp: Slot(2): Link Up"), None);
    }

    proptest! {
        #[test]
        fn any_text_is_read_without_harm(text in ".{0,200}", tail in ".{0,80}") {
            let mut nvrm = Nvrm::default();
            for line in [text.clone(), format!("NVRM: Xid ({text}"), format!("NVRM: Xid (PCI:0000:3b:00): {tail}"),
                format!("NVRM: GPU {text}"), format!("nvidia-nvswitch{text}"), format!("NVRM: The NVIDIA GPU {tail}")] {
                let _ = nvrm.read(&line);
            }
        }
    }
}
