//! XIDs of the scale-up fabric: whether this end is at fault. NVLink 4 and older by the register bits of
//! XID 74 (NVIDIA's resolution table), later ones by NVIDIA's rules (`nvlink5`).

use super::{
    fact::{Source, Xid},
    nvlink5,
};

/// Who is to blame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// This device, or its link.
    Ours,
    /// The other end of its link.
    Peer,
    /// This device, and the link still works.
    Lesser,
    /// It follows from another error; alone it is only said.
    Secondary,
    /// A program lost packets and starts again, unless the driver wants more.
    Program,
    /// Nothing to say.
    Ignored,
}

/// (word, bits) that mean nothing by themselves.
const IGNORED: [(usize, u32); 2] = [(0, bits(&[0, 23, 30])), (4, bits(&[20, 23, 26, 29]))];
/// (word, bits) that follow another error. Bit 18 of word 4 does too, and wants a reset all the same: it is
/// none of these.
const SECONDARY: [(usize, u32); 2] = [(0, bits(&[1, 20])), (3, bits(&[16, 17]))];

const fn bits(list: &[u32]) -> u32 {
    let mut mask = 0;
    let mut at = 0;
    while at < list.len() {
        mask |= 1 << list[at];
        at += 1;
    }
    mask
}

/// Whether a line of the kernel log may still tell which end an event blames: events bring a number alone.
#[must_use]
pub fn line_decides(xid: &Xid) -> bool {
    xid.source == Source::Event && matches!(xid.number, 74 | 144..=150)
}

/// Judges any XID under a driver of this branch; one that is not of the fabric is its device's own.
#[must_use]
pub fn judge(xid: &Xid, branch: Option<u16>) -> Verdict {
    match xid.number {
        74 => by_registers(&xid.message),
        144..=150 => nvlink5::judge(xid.number, &xid.message, branch),
        _ => Verdict::Ours,
    }
}

/// `NVLink: fatal error detected on link 14(0x0, 0x0, 0x10000, …)`. Without registers the line's own
/// word counts: fatal.
fn by_registers(message: &str) -> Verdict {
    let inside = message.rsplit_once('(').and_then(|(_, rest)| rest.split_once(')')).map(|(inside, _)| inside);
    let word = |text: &str| text.trim().strip_prefix("0x").and_then(|hex| u32::from_str_radix(hex, 16).ok());
    let words: Option<Vec<u32>> = inside.map(|inside| inside.split(',').map(word).collect()).unwrap_or_default();
    let Some(words) = words.filter(|words| words.iter().any(|word| *word != 0)) else { return Verdict::Ours };
    let masked = |table: &[(usize, u32)], at: usize| {
        table.iter().filter(|(word, _)| *word == at).fold(0, |mask, (_, bits)| mask | bits)
    };
    // Only words 1, 3, 4 and 5 mean anything.
    let left = |ignore: &dyn Fn(usize) -> u32| {
        words.iter().enumerate().filter(|(at, _)| matches!(at, 0 | 2 | 3 | 4)).any(|(at, word)| word & !ignore(at) != 0)
    };
    if !left(&|at| masked(&IGNORED, at)) {
        Verdict::Ignored
    } else if !left(&|at| masked(&IGNORED, at) | masked(&SECONDARY, at)) {
        Verdict::Secondary
    } else {
        Verdict::Ours
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn registers(text: &str) -> Verdict {
        by_registers(&format!("NVLink: fatal error detected on link 14({text})"))
    }

    #[test]
    fn register_bits_tell_cause_from_consequence() {
        assert_eq!(registers("0x0, 0x0, 0x10000, 0x0, 0x0, 0x0, 0x0"), Verdict::Ours);
        assert_eq!(registers("0x100000, 0x0, 0x0, 0x0, 0x0, 0x0, 0x0"), Verdict::Secondary);
        assert_eq!(registers("0x1, 0xff, 0x0, 0x0, 0x100000, 0xff, 0xff"), Verdict::Ignored);
        assert_eq!(registers("0x100100, 0x0, 0x0, 0x0, 0x0, 0x0, 0x0"), Verdict::Ours);
        assert_eq!(registers("0x0, 0x0, 0x0, 0x40000, 0x0, 0x0, 0x0"), Verdict::Ours, "the fabric needs a reset");
    }

    #[test]
    fn a_line_without_registers_counts_as_it_reads() {
        assert_eq!(by_registers(""), Verdict::Ours);
        assert_eq!(registers("0x0, zz"), Verdict::Ours);
    }
}
