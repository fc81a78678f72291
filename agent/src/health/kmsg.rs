//! Records of the kernel log as /dev/kmsg gives them: bytes of one record in, a [`Record`] out. And the
//! door to wherever they come from, a trait of one method.
//!
//! Format: Documentation/ABI/testing/dev-kmsg. A record is never guessed at: what does not parse is
//! counted and dropped.

use std::io;

use berth_runtime::clock::InFlight;

/// Largest record that the kernel gives (PRINTK_MESSAGE_MAX is smaller).
pub const RECORD_LIMIT: usize = 8192;

/// One record.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    /// Facility × 8 + level; the kernel's own facility is 0.
    pub priority: u32,
    /// Number within this boot.
    pub sequence: u64,
    /// Microseconds since boot.
    pub micros: u64,
    /// The text, its escapes undone.
    pub text: String,
}

impl Record {
    /// Reads one record: `<prio>,<seq>,<us>,<flags>[,…];<text>` and optional lines of ` KEY=value`.
    #[must_use]
    pub fn parse(bytes: &[u8]) -> Option<Self> {
        let line = bytes.split(|byte| *byte == b'\n').next()?;
        let at = line.iter().position(|byte| *byte == b';')?;
        let (head, text) = (std::str::from_utf8(line.get(..at)?).ok()?, line.get(at.checked_add(1)?..)?);
        let mut fields = head.split(',');
        let priority = number(fields.next()?)?.try_into().ok()?;
        let (sequence, micros) = (number(fields.next()?)?, number(fields.next()?)?);
        fields.next()?;
        Some(Self { priority, sequence, micros, text: unescape(text) })
    }

    /// Whether the kernel itself wrote it: programs cannot use its facility.
    #[must_use]
    pub fn by_kernel(&self) -> bool {
        self.priority < 8
    }
}

fn number(text: &str) -> Option<u64> {
    let plain = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    plain.then(|| text.parse().ok())?
}

/// Undoes `\xNN`. What is no UTF-8 then becomes the replacement character.
fn unescape(text: &[u8]) -> String {
    let mut out = Vec::with_capacity(text.len());
    let mut rest = text;
    while let Some((byte, tail)) = rest.split_first() {
        let escaped = match rest {
            [b'\\', b'x', high, low, ..] => hex(*high).zip(hex(*low)).map(|(high, low)| high * 16 + low),
            _ => None,
        };
        if let Some(value) = escaped {
            out.push(value);
            rest = rest.get(4..).unwrap_or_default();
        } else {
            out.push(*byte);
            rest = tail;
        }
    }
    String::from_utf8_lossy(&out).into_owned()
}

fn hex(digit: u8) -> Option<u8> {
    char::from(digit).to_digit(16).and_then(|value| u8::try_from(value).ok())
}

/// What a read of the log gives.
#[derive(Debug)]
pub enum Read {
    /// One record, unparsed, and what keeps discrete time still until it is consumed.
    Record(Vec<u8>, Option<InFlight>),
    /// Records were overwritten before they were read.
    Lost(Option<InFlight>),
    /// Everything that was there is read; told once, before the first wait.
    CaughtUp,
    /// The source was told to end.
    Ended,
}

/// Where records come from.
pub trait KernelLog: Send {
    /// The next record; blocks its thread until there is one.
    ///
    /// # Errors
    /// When the log cannot be read any more.
    fn read(&mut self) -> io::Result<Read>;
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_record_gives_number_time_and_plain_text() {
        let record =
            Record::parse(b"4,1234,98765432,-;NVRM: a \\x5c b\\x0a\n SUBSYSTEM=pci\n DEVICE=+pci:0000:3b:00.0\n")
                .unwrap();
        assert_eq!((record.priority, record.sequence, record.micros), (4, 1234, 98_765_432));
        assert_eq!(record.text, "NVRM: a \\ b\n");
        assert!(record.by_kernel());
        assert!(!Record::parse(b"12,1,2,-;x").unwrap().by_kernel());
        assert_eq!(Record::parse(b"6,1,2,c,caller=T1;x;y").unwrap().text, "x;y");
    }

    #[test]
    fn a_damaged_record_is_none() {
        for bytes in [
            &b""[..],
            b"4,1,2",
            b"4,1;x",
            b"-4,1,2,-;x",
            b"4,+1,2,-;x",
            b"a,1,2,-;x",
            b"4,1,99999999999999999999,-;x",
            b"\xff,1,2,-;x",
        ] {
            assert_eq!(Record::parse(bytes), None, "{bytes:?}");
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_a_record_or_none(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = Record::parse(&bytes);
            let with_head = [&b"4,1,2,-;"[..], &bytes].concat();
            prop_assert!(Record::parse(&with_head).is_some());
        }

        #[test]
        fn escaped_text_reads_back(text in "[ -~]{0,80}") {
            let escaped = text.replace('\\', "\\x5c");
            let record = Record::parse(format!("4,1,2,-;{escaped}\n").as_bytes()).unwrap();
            prop_assert_eq!(record.text, text);
        }
    }
}
