//! XIDs 144 to 150, the scale-up fabric of Blackwell: NVIDIA's decoding rules as data
//! (`data/nvidia_nvlink5_rules.csv`). The line prints a unit, a severity and registers; the rules say from them
//! which end of the link is at fault.

use std::sync::OnceLock;

use super::nvlink::Verdict;

const CSV: &str = include_str!("../../data/nvidia_nvlink5_rules.csv");
/// From this branch on drivers print the second layout of the register.
const SECOND_LAYOUT: u16 = 575;

/// What a line of these XIDs says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Line<'a> {
    unit: &'a str,
    fatal: bool,
    interrupt: u32,
    status: u32,
}

/// One rule.
#[derive(Clone, Debug)]
struct Rule {
    xid: u16,
    /// By layout: the first's and the second's.
    units: [&'static str; 2],
    patterns: [Pattern; 2],
    promoted: [Option<Pattern>; 2],
    /// Empty = any.
    statuses: Vec<u32>,
    action: &'static str,
    promotion: &'static str,
    peer: bool,
}

/// Bits that must be so.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Pattern {
    mask: u32,
    bits: u32,
}

impl Pattern {
    /// 32 characters, bit 31 first; `-` = any.
    fn parse(text: &str) -> Option<Self> {
        let mut pattern = Self { mask: 0, bits: 0 };
        let letters = text.len() == 32;
        for letter in text.bytes() {
            let (mask, bit) = match letter {
                b'0' => (1, 0),
                b'1' => (1, 1),
                b'-' => (0, 0),
                _ => return None,
            };
            pattern = Self { mask: (pattern.mask << 1) | mask, bits: (pattern.bits << 1) | bit };
        }
        letters.then_some(pattern)
    }

    const fn fits(self, value: u32) -> bool {
        value & self.mask == self.bits
    }
}

impl<'a> Line<'a> {
    /// `<UNIT> <Fatal|Nonfatal> XC0 i0 Link 08 (0x004505c6 0x00000000 …)`; `None` = damaged.
    pub(super) fn parse(message: &'a str) -> Option<Self> {
        let (before, rest) = message.rsplit_once('(')?;
        let inside = rest.split_once(')')?.0;
        // From the severity on: a program's name may stand before the unit, and hold anything.
        let words: Vec<&str> = before.split_whitespace().collect();
        let severity = |word: &&str| word.eq_ignore_ascii_case("fatal") || word.eq_ignore_ascii_case("nonfatal");
        let at = words.iter().rposition(severity)?;
        let (unit, severity) = (words.get(at.checked_sub(1)?)?, words.get(at)?);
        let mut registers = inside.split([' ', ',']).filter(|word| !word.is_empty());
        let mut register = || u32::from_str_radix(registers.next()?.strip_prefix("0x")?, 16).ok();
        let (interrupt, status) = (register()?, register()?);
        Some(Self { unit, fatal: severity.eq_ignore_ascii_case("fatal"), interrupt, status })
    }
}

fn rules() -> &'static [Rule] {
    static RULES: OnceLock<Vec<Rule>> = OnceLock::new();
    RULES.get_or_init(|| CSV.lines().filter_map(rule).collect())
}

fn rule(line: &'static str) -> Option<Rule> {
    let mut cells = line.split(',');
    let xid = cells.next()?.parse().ok()?;
    let unit = cells.next()?;
    let (first, second) = (cells.next()?, cells.next()?);
    let status = cells.next()?;
    let action = cells.next()?;
    let promoted = [Pattern::parse(cells.next()?), Pattern::parse(cells.next()?)];
    let (promotion, investigatory) = (cells.next()?, cells.next()?);
    let hex = |text: &str| u32::from_str_radix(text.strip_prefix("0x")?, 16).ok();
    let (one, two) = unit.split_once('/').unwrap_or((unit, unit));
    Some(Rule {
        xid,
        units: [one, two],
        patterns: [Pattern::parse(first)?, Pattern::parse(second)?],
        promoted,
        statuses: status.split('/').filter_map(hex).collect(),
        action,
        promotion,
        peer: investigatory.contains("PEER_DEVICE"),
    })
}

/// Judges an XID of 144 to 150 under a driver of this branch; of an unknown one either layout counts. The
/// first rule in the file's order that fits decides. Without one the line's own word does.
pub(super) fn judge(number: u16, message: &str, branch: Option<u16>) -> Verdict {
    let Some(line) = Line::parse(message) else {
        let says = |severity: &str| message.split_whitespace().any(|word| word == severity);
        return if says("Nonfatal") && !says("Fatal") { Verdict::Lesser } else { Verdict::Ours };
    };
    let layouts: &[usize] = match branch {
        Some(branch) if branch < SECOND_LAYOUT => &[0],
        Some(_) => &[1],
        None => &[0, 1],
    };
    let found = layouts.iter().find_map(|layout| Some((find(number, &line, *layout)?, *layout)));
    match found {
        Some((rule, layout)) => by_rule(rule, layout, &line),
        None if line.fatal => Verdict::Ours,
        None => Verdict::Lesser,
    }
}

fn find(number: u16, line: &Line<'_>, layout: usize) -> Option<&'static Rule> {
    rules().iter().find(|rule| {
        let of = |list: &[&str; 2]| list.get(layout).is_some_and(|unit| *unit == line.unit);
        let patterns = rule.patterns.get(layout).copied();
        // A promoted register differs from the rule's own in its severity bit.
        let promoted = rule.promoted.get(layout).copied().flatten();
        let fits = patterns.into_iter().chain(promoted).any(|pattern| pattern.fits(line.interrupt));
        let status = rule.statuses.is_empty() || rule.statuses.contains(&line.status);
        rule.xid == number && of(&rule.units) && fits && status
    })
}

fn by_rule(rule: &Rule, layout: usize, line: &Line<'_>) -> Verdict {
    let promoted = rule.promoted.get(layout).copied().flatten().is_some_and(|pattern| pattern.fits(line.interrupt));
    let action = if promoted { rule.promotion } else { rule.action };
    match action {
        "RESET_GPU" if rule.peer => Verdict::Peer,
        "RESET_GPU" => Verdict::Ours,
        // The driver's own action, else the program's: it starts again.
        "XID_154_EVAL" => Verdict::Program,
        _ => Verdict::Lesser,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(unit: &str, severity: &str, interrupt: u32, status: u32) -> String {
        format!("{unit}  {severity}   XC0 i0 Link 08 ({interrupt:#010x} {status:#010x} 0x00000000 0x00000000)")
    }

    #[test]
    fn the_rules_are_read_whole_and_each_fits_itself() {
        assert_eq!(rules().len(), 95);
        for rule in rules() {
            for (layout, branch) in [(0, 570), (1, 580)] {
                let (unit, pattern) = (rule.units[layout], rule.patterns[layout]);
                let status = rule.statuses.first().copied().unwrap_or(0);
                let text = line(unit, "Fatal", pattern.bits, status);
                let parsed = Line::parse(&text).unwrap();
                let found = find(rule.xid, &parsed, layout).unwrap();
                // An earlier rule may take the same register; it must then say the same.
                assert_eq!((found.action, found.peer), (rule.action, rule.peer), "{rule:?} {branch}");
            }
        }
    }

    #[test]
    fn the_reason_tells_which_end_is_at_fault() {
        let ours = line("NETIR_LINK_EVT", "Fatal", 0x0045_05c6, 0);
        let peer = line("NETIR_LINK_EVT", "Fatal", 0x0255_25c6, 0);
        assert_eq!(judge(149, &ours, Some(570)), Verdict::Ours);
        assert_eq!(judge(149, &peer, Some(570)), Verdict::Peer);
    }

    #[test]
    fn a_register_of_the_other_layout_fits_no_rule() {
        let lost = line("RLW_SRC_TRACK", "Nonfatal", 0x0408_2907, 8);
        assert_eq!(judge(145, &lost, Some(570)), Verdict::Lesser);
        assert_eq!(judge(145, &lost, Some(575)), Verdict::Program);
        assert_eq!(judge(145, &lost, None), Verdict::Program);
    }

    #[test]
    fn a_program_s_name_hides_no_fault() {
        let text = format!("x, Nonfatal y, {}", line("NETIR_LINK_EVT", "Fatal", 0x0045_05c6, 0));
        assert_eq!(judge(149, &text, Some(570)), Verdict::Ours);
    }

    #[test]
    fn damaged_lines_count_as_they_read() {
        assert_eq!(judge(149, "NETIR_LINK_EVT Fatal XC0 i0 Link 08 (0x00", Some(570)), Verdict::Ours);
        assert_eq!(judge(149, "NETIR Nonfatal", None), Verdict::Lesser);
        assert_eq!(judge(144, "", None), Verdict::Ours);
    }
}
