//! Damaged inputs for tests: good ones with bits flipped, parts cut, doubled, swapped and mixed, and the words that
//! break parsers put in. Seeded and bounded; it never fails a test itself.

/// What is put into texts: numbers at the edges of every type, words that change meaning, brackets that nest.
const TOKENS: [&[u8]; 28] = [
    b"0",
    b"-1",
    b"255",
    b"256",
    b"65536",
    b"2147483648",
    b"4294967295",
    b"4294967296",
    b"9007199254740993",
    b"9223372036854775808",
    b"18446744073709551615",
    b"18446744073709551616",
    b"1e999",
    b"-0.0",
    b"NaN",
    b"null",
    b"true",
    b"\"\"",
    b"{}",
    b"[]",
    b"[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[",
    b"\\u0000",
    b"\\xff",
    b"\x00",
    b"\xff\xfe",
    b"\r\n",
    b"\xe2\x80\xae",
    b"0x",
];
/// Bytes of an input at most: what is longer is cut.
const LIMIT: usize = 1 << 16;

/// A source of numbers that looks random and never is (xorshift64*).
#[derive(Clone, Debug)]
pub struct Dice(u64);

impl Dice {
    /// Dice that roll the same for the same seed.
    #[must_use]
    pub const fn new(seed: u64) -> Self {
        Self(seed | 1)
    }

    /// The next number.
    pub const fn roll(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// A number below `limit`; 0 when that is 0.
    pub fn below(&mut self, limit: usize) -> usize {
        let limit = u64::try_from(limit).unwrap_or(u64::MAX);
        // The remainder is below a usize, for `limit` was one.
        usize::try_from(self.roll().checked_rem(limit).unwrap_or(0)).unwrap_or(0)
    }
}

/// Hands out `tries` damaged forms of the seeds in turn, and each seed whole first.
pub fn each(seeds: &[&[u8]], tries: usize, mut check: impl FnMut(&[u8])) {
    seeds.iter().for_each(|seed| check(seed));
    let mut dice = Dice::new(0xbe27);
    for turn in 0..tries {
        let Some(seed) = seeds.get(turn.checked_rem(seeds.len()).unwrap_or(0)) else { return };
        check(&damaged(seed, seeds, &mut dice));
    }
}

/// As [`each`], for what reads text: bytes that are no text are given as a reader of files would see them.
pub fn each_text(seeds: &[&str], tries: usize, mut check: impl FnMut(&str)) {
    let seeds: Vec<&[u8]> = seeds.iter().map(|seed| seed.as_bytes()).collect();
    each(&seeds, tries, |bytes| check(&String::from_utf8_lossy(bytes)));
}

/// `seed` with one to four damages.
#[must_use]
pub fn damaged(seed: &[u8], others: &[&[u8]], dice: &mut Dice) -> Vec<u8> {
    let mut bytes = seed.to_vec();
    for _ in 0..=dice.below(4) {
        damage(&mut bytes, others, dice);
        bytes.truncate(LIMIT);
    }
    bytes
}

fn damage(bytes: &mut Vec<u8>, others: &[&[u8]], dice: &mut Dice) {
    let (at, span) = (dice.below(bytes.len()), dice.below(24).saturating_add(1));
    let end = at.saturating_add(span).min(bytes.len());
    match dice.below(9) {
        0 => {
            if let Some(byte) = bytes.get_mut(at) {
                *byte ^= 1 << dice.below(8);
            }
        }
        1 => {
            if let Some(byte) = bytes.get_mut(at) {
                *byte = dice.roll().to_le_bytes()[0];
            }
        }
        2 => bytes.truncate(at),
        3 => drop(bytes.drain(at..end)),
        4 => {
            let part = bytes.get(at..end).unwrap_or_default().to_vec();
            let to = dice.below(bytes.len());
            drop(bytes.splice(to..to, part));
        }
        5 => {
            let other = others.get(dice.below(others.len())).copied().unwrap_or_default();
            let from = dice.below(other.len());
            let part = other.get(from..from.saturating_add(span).min(other.len())).unwrap_or_default().to_vec();
            drop(bytes.splice(at..end, part));
        }
        6 => number(bytes, dice),
        7 => {
            let token = TOKENS.get(dice.below(TOKENS.len())).copied().unwrap_or_default();
            drop(bytes.splice(at..at, token.iter().copied()));
        }
        _ => {
            let other = dice.below(bytes.len());
            if !bytes.is_empty() {
                bytes.swap(at, other);
            }
        }
    }
}

/// Puts another number in the place of one that is there.
fn number(bytes: &mut Vec<u8>, dice: &mut Dice) {
    let from = dice.below(bytes.len());
    let digit = |byte: &u8| byte.is_ascii_digit();
    let Some(start) = bytes.get(from..).and_then(|rest| rest.iter().position(digit)).map(|at| from.saturating_add(at))
    else {
        return;
    };
    let rest = bytes.get(start..).unwrap_or_default();
    let end = start.saturating_add(rest.iter().position(|byte| !digit(byte)).unwrap_or(rest.len()));
    let token = TOKENS.get(dice.below(16)).copied().unwrap_or_default();
    drop(bytes.splice(start..end, token.iter().copied()));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_run_gives_the_same_and_few_are_the_seed() {
        let run = || {
            let mut all = Vec::new();
            each(&[b"{\"a\": 12, \"b\": [1, 2]}", b"x"], 2_000, |bytes| all.push(bytes.to_vec()));
            all
        };
        let all = run();
        assert_eq!(all, run());
        assert_eq!(all.len(), 2_002);
        let distinct: std::collections::BTreeSet<&Vec<u8>> = all.iter().collect();
        assert!(distinct.len() > 1_000, "{}", distinct.len());
    }

    #[test]
    fn nothing_is_damaged_without_harm() {
        each(&[b""], 200, |_| {});
        each(&[], 10, |_| unreachable!("there is nothing to damage"));
        assert_eq!(Dice::new(3).below(0), 0);
    }
}
