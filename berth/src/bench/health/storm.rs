//! A kernel log that storms: what a busy node's log holds, faults of programs on the noisy devices, devices that are
//! not there, damaged lines, and lines that programs wrote to look like the driver's. None of it decides over a
//! device that is quiet. Pure: chance comes from a seed.

use rand::{Rng, rngs::SmallRng};

use super::faults::Device;

/// Lines that say nothing of devices.
const ORDINARY: [&str; 8] = [
    "audit: type=1400 audit(1764000000.123:4711): apparmor=\"ALLOWED\" operation=\"open\" profile=\"cri\"",
    "TCP: request_sock_TCP: Possible SYN flooding on port 10250. Sending cookies.",
    "veth7f3a2b1c: entered promiscuous mode",
    "EXT4-fs (nvme1n1p1): mounted filesystem with ordered data mode. Quota mode: none.",
    "mlx5_core 0000:c1:00.0: temp_warn:180:(pid 0): High temperature on sensors with bit set 0 1",
    "perf: interrupt took too long (2514 > 2500), lowering kernel.perf_event_max_sample_rate to 79500",
    "NVRM: GPU at PCI:0000:91:00: GPU-b6c3b2be-c55b-d076-fa0e-d464e4c7e08b",
    "nvidia-nvswitch0: open (major=235)",
];
/// Faults of programs.
const PROGRAMS: [(u16, &str); 4] = [
    (13, "Graphics SM Warp Exception on (GPC 1, TPC 3, SM 0): Out Of Range Address"),
    (31, "Ch 00000008, intr 10000000. MMU Fault: ENGINE GRAPHICS GPCCLIENT_T1_3 faulted @ 0x7fab_c0000000."),
    (43, "channel 0x0000000a"),
    (45, "channel 0x0000000b caused by previous Xid 13"),
];

/// Makes lines, one after the other.
#[derive(Debug)]
pub(super) struct Storm {
    noisy: Vec<String>,
    quiet: Vec<String>,
    chance: SmallRng,
    sequence: u64,
}

fn address(device: &Device) -> String {
    device.local.trim_end_matches(".0").to_owned()
}

impl Storm {
    /// A storm in which `noisy` devices show faults of programs, and `quiet` ones only what nobody may believe.
    pub(super) fn new(noisy: &[Device], quiet: &[Device], chance: SmallRng) -> Self {
        let addresses = |devices: &[Device]| devices.iter().map(address).collect();
        Self { noisy: addresses(noisy), quiet: addresses(quiet), chance, sequence: 0 }
    }

    /// The next line, as bytes of the log.
    pub(super) fn line(&mut self) -> Vec<u8> {
        let (priority, text) = match self.chance.random_range(0..100_u32) {
            0..70 => (self.priority(), self.ordinary()),
            70..80 => (4, self.program()),
            80..84 => (4, self.stranger()),
            84..92 => return self.damaged(),
            92..96 => (12, self.forged()),
            _ => return b" SUBSYSTEM=pci\n DEVICE=+pci:0000:91:00.0\n".to_vec(),
        };
        self.record(priority, &text)
    }

    /// A record of the kernel with this text.
    pub(super) fn record(&mut self, priority: u32, text: &str) -> Vec<u8> {
        self.sequence = self.sequence.saturating_add(1);
        let micros = self.sequence.saturating_mul(200);
        format!("{priority},{},{micros},-;{text}\n", self.sequence).into_bytes()
    }

    fn priority(&mut self) -> u32 {
        self.chance.random_range(3..7)
    }

    fn ordinary(&mut self) -> String {
        let at = self.chance.random_range(0..ORDINARY.len());
        ORDINARY.get(at).copied().unwrap_or_default().to_owned()
    }

    fn any(&mut self, quiet: bool) -> String {
        let from = if quiet { &self.quiet } else { &self.noisy };
        let at = self.chance.random_range(0..from.len().max(1));
        from.get(at).cloned().unwrap_or_else(|| "0000:f0:00".to_owned())
    }

    fn xid(&mut self, address: &str) -> String {
        let at = self.chance.random_range(0..PROGRAMS.len());
        let (number, message) = PROGRAMS.get(at).copied().unwrap_or((43, ""));
        let pid: u32 = self.chance.random_range(1_000..60_000);
        format!("NVRM: Xid (PCI:{address}): {number}, pid={pid}, name=python3, {message}")
    }

    fn program(&mut self) -> String {
        let address = self.any(false);
        self.xid(&address)
    }

    /// Of a device that this node has not got.
    fn stranger(&mut self) -> String {
        let bus: u8 = self.chance.random_range(0xE0..0xF8);
        self.xid(&format!("0001:{bus:02x}:00"))
    }

    /// What a program wrote, which is never the driver's word.
    fn forged(&mut self) -> String {
        let address = self.any(true);
        format!("NVRM: Xid (PCI:{address}): 79, pid='<unknown>', name=<unknown>, GPU has fallen off the bus.")
    }

    /// A record that lacks its head, its number or the end of its address, or that is no text.
    fn damaged(&mut self) -> Vec<u8> {
        let address = self.any(true);
        let text = match self.chance.random_range(0..5_u32) {
            0 => format!("NVRM: Xid (PCI:{}", address.get(..7).unwrap_or_default()),
            1 => format!("NVRM: Xid (PCI:{address}): 7x9, pid=1, name=a, GPU has fallen off the bus."),
            2 => format!("\\xff\\xfeNVRM: Xid (PCI:{address}): 79, \\x00\\x01"),
            3 => format!("NVRM: Xid (PCI:{address}): 4294967375, GPU has fallen off the bus."),
            _ => return format!("NVRM: Xid (PCI:{address}): 79, no head\n").into_bytes(),
        };
        self.record(4, &text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::health::faults::{Fleet, Road};
    use berth_agent::health::{fact::Subject, kmsg::Record, nvrm::Nvrm};
    use rand::SeedableRng;

    #[test]
    fn no_line_of_the_storm_says_anything_of_a_quiet_device() {
        let fleet = Fleet::of(Road::Kernel);
        let mut storm = Storm::new(&fleet.noisy, &fleet.failing, SmallRng::seed_from_u64(9));
        let mut nvrm = Nvrm::default();
        let (mut noise, mut refused) = (0, 0);
        for _ in 0..20_000 {
            let line = storm.line();
            let Some(record) = Record::parse(&line) else {
                refused += 1;
                continue;
            };
            if !record.by_kernel() {
                refused += 1;
                continue;
            }
            for fact in nvrm.read(&record.text) {
                noise += 1;
                let quiet = |local: &str| fleet.failing.iter().any(|device| device.local == local);
                assert!(!matches!(&fact.of, Subject::Device(local) if quiet(local)), "{record:?}");
            }
        }
        assert!(noise > 1_000 && refused > 1_000, "{noise} {refused}");
    }
}
