//! What people say of repaired devices: an annotation of the AcceleratorNode, `<device>@<time>` for each, separated by
//! commas. A time, not a word that is taken away again: it may be read any number of times, after any restart, and frees
//! a device only of what was so before it.

use jiff::Timestamp;

use crate::health::fact::Local;

/// The annotation.
pub const ANNOTATION: &str = "berth.dev/release";
/// Entries that are kept: one for each device that a node can have.
const LIMIT: usize = 64;

/// A person vouches for a device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Release {
    /// Local part of the device's id.
    pub local: Local,
    /// As of then, milliseconds since 1970.
    pub unix_ms: u64,
}

/// The entries of an annotation that can be understood.
#[must_use]
pub fn parse(text: &str) -> Vec<Release> {
    let entry = |entry: &str| {
        let (local, time) = entry.trim().split_once('@')?;
        let time: Timestamp = time.parse().ok()?;
        let unix_ms = u64::try_from(time.as_millisecond()).ok()?;
        (!local.is_empty()).then(|| Release { local: local.to_owned(), unix_ms })
    };
    text.split(',').filter_map(entry).take(LIMIT).collect()
}

/// The annotation `text` with a device released as of `unix_ms`.
#[must_use]
pub fn with(text: &str, local: &str, unix_ms: u64) -> String {
    let mut releases = parse(text);
    releases.retain(|release| release.local != local);
    releases.push(Release { local: local.to_owned(), unix_ms });
    let first = releases.len().saturating_sub(LIMIT);
    let entry = |Release { local, unix_ms }: &Release| {
        let time = i64::try_from(*unix_ms).ok().and_then(|ms| Timestamp::from_millisecond(ms).ok());
        format!("{local}@{}", time.unwrap_or(Timestamp::UNIX_EPOCH))
    };
    releases.iter().skip(first).map(entry).collect::<Vec<_>>().join(",")
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_device_has_one_entry_its_last() {
        let text = with(&with(&with("", "0000:3b:00.0", 1_000), "3.1", 2_000), "0000:3b:00.0", 3_000);
        assert_eq!(text, "3.1@1970-01-01T00:00:02Z,0000:3b:00.0@1970-01-01T00:00:03Z");
        assert_eq!(parse(&text).iter().map(|release| release.unix_ms).collect::<Vec<_>>(), [2_000, 3_000]);
    }

    #[test]
    fn what_is_no_entry_is_left_out() {
        assert!(parse(",, 3.1, @2026-11-24T12:00:00Z, 3.1@yesterday, 3.1@-0001-01-01T00:00:00Z").is_empty());
    }

    proptest! {
        #[test]
        fn any_text_can_be_added_to(text in ".{0,200}") {
            let mine = Release { local: "3.1".to_owned(), unix_ms: 5 };
            prop_assert!(parse(&with(&text, "3.1", 5)).contains(&mine));
        }
    }
}
