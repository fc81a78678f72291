//! What an agent knows in a file of its node, so that its end is no amnesty: counters, open conditions, probations and
//! the last incidents. Written whole or not at all, bounded, versioned.
//!
//! The file is outside input like any other. One that is damaged, of another node or from another version is put aside
//! with a clear word, and the agent begins anew by reading every device. Nothing in it can make a device look better than
//! its own readings do (`health/memory`).

use std::{
    fs::{self, File},
    io::{self, Read as _, Write as _},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use serde::{Deserialize, Serialize};
use serde_json::Value;
use tokio::sync::watch;

use crate::{
    health::{device::Settings, incidents::Incidents, ledger::Ledger, memory::Unusable},
    metrics::Metrics,
};

/// Name of the file in its folder.
pub const NAME: &str = "agent-state.json";
/// The first word of a file.
const MAGIC: &str = "berth-agent-state";
/// What this build writes, and all it reads.
const VERSION: u32 = 1;
/// Bytes of a file at most: about 64 devices that never were well.
const LIMIT: u64 = 8 << 20;

/// Why a file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// It cannot be read.
    #[error("reading it: {0}")]
    Io(#[from] io::Error),
    /// It is larger than any agent writes.
    #[error("it has more than {LIMIT} bytes")]
    Large,
    /// Its first line is not one of ours.
    #[error("its first line is not `{MAGIC} VERSION CHECKSUM`")]
    Head,
    /// Another version wrote it.
    #[error("it has version {found}, this agent reads {VERSION}")]
    Version {
        /// Its version.
        found: u32,
    },
    /// It was cut short or changed.
    #[error("its checksum does not fit: it was cut short or changed")]
    Checksum,
    /// A field is not what it must be.
    #[error("its fields cannot be read: {0}")]
    Fields(#[from] serde_json::Error),
    /// It is about another node.
    #[error("it is about node {found:?}")]
    Node {
        /// That node.
        found: String,
    },
    /// It was written later than now.
    #[error("it was written {seconds} s of this boot's uptime from now")]
    Future {
        /// How far ahead.
        seconds: u64,
    },
    /// Its ledger is of no use.
    #[error(transparent)]
    Ledger(#[from] Unusable),
}

/// Where and when an agent runs.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Here {
    /// Its node.
    pub node: String,
    /// Boot of the node.
    pub boot_id: String,
    /// Since that boot.
    pub uptime: Duration,
    /// Since 1970, by the node's clock.
    pub unix: Duration,
}

/// What is written, but for the ledger.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
struct Written<L> {
    node: String,
    boot_id: String,
    /// On the ledger's timeline.
    at: Duration,
    /// Since the node's boot, at the same moment.
    uptime: Duration,
    /// Last record of the kernel log that was taken in.
    log_sequence: Option<u64>,
    incidents: Incidents,
    ledger: L,
}

/// What is known when an agent begins.
#[derive(Debug, Default)]
pub struct Resumed {
    /// What its clock shows now: times in the ledger lie before.
    pub base: Duration,
    /// The ledger; `None` = a new one.
    pub ledger: Option<Ledger>,
    /// Last record of this boot's kernel log that was taken in.
    pub log_sequence: Option<u64>,
    /// The last incidents.
    pub incidents: Incidents,
}

/// What goes into a file.
#[derive(Debug)]
pub struct Kept<'a> {
    /// The ledger.
    pub ledger: &'a Ledger,
    /// The last incidents.
    pub incidents: &'a Incidents,
    /// Last record of the kernel log that was taken in.
    pub log_sequence: Option<u64>,
}

/// The text of a file: `kept` as it is at `at` on the ledger's timeline, `here`.
///
/// # Errors
/// When a field cannot be written as JSON.
pub fn write_text(kept: &Kept<'_>, at: Duration, here: &Here) -> Result<Vec<u8>, serde_json::Error> {
    let Kept { ledger, incidents, log_sequence } = kept;
    let written = Written {
        node: here.node.clone(),
        boot_id: here.boot_id.clone(),
        at,
        uptime: here.uptime,
        log_sequence: *log_sequence,
        incidents: (*incidents).clone(),
        ledger: *ledger,
    };
    let body = serde_json::to_vec(&written)?;
    let mut text = format!("{MAGIC} {VERSION} {:016x}\n", checksum(&body)).into_bytes();
    text.extend_from_slice(&body);
    Ok(text)
}

/// Reads the text of a file.
///
/// # Errors
/// [`StateError`].
fn read_text(text: &[u8]) -> Result<Written<Value>, StateError> {
    let end = text.iter().position(|byte| *byte == b'\n').ok_or(StateError::Head)?;
    let (head, rest) = text.split_at_checked(end).ok_or(StateError::Head)?;
    let head = std::str::from_utf8(head).map_err(|_| StateError::Head)?;
    let mut words = head.split(' ');
    let (magic, version, sum) = (words.next(), words.next(), words.next());
    let version: u32 = version.and_then(|version| version.parse().ok()).ok_or(StateError::Head)?;
    if magic != Some(MAGIC) {
        return Err(StateError::Head);
    }
    if version != VERSION {
        return Err(StateError::Version { found: version });
    }
    let body = rest.get(1..).unwrap_or_default();
    let sum = sum.and_then(|sum| u64::from_str_radix(sum, 16).ok()).ok_or(StateError::Head)?;
    if sum != checksum(body) {
        return Err(StateError::Checksum);
    }
    let mut written: Written<Value> = serde_json::from_slice(body)?;
    written.incidents.bound();
    Ok(written)
}

/// FNV-1a: enough to tell a torn or garbled file, which is all it is for.
fn checksum(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |sum, byte| (sum ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3))
}

/// Goes on from the text of a file.
///
/// # Errors
/// [`StateError`]; then the agent begins anew.
pub fn resume(text: &[u8], here: &Here, settings: Settings) -> Result<Resumed, StateError> {
    let Written { node, boot_id, at, uptime, log_sequence, incidents, ledger } = read_text(text)?;
    if node != here.node {
        return Err(StateError::Node { found: node });
    }
    let rebooted = boot_id != here.boot_id;
    // Within one boot by its uptime, which nobody can set. Over a reboot by the wall clock, and never backwards: an age
    // that cannot be known counts as none.
    let base = if rebooted {
        here.unix.max(at)
    } else {
        let away = here.uptime.checked_sub(uptime);
        let seconds = uptime.saturating_sub(here.uptime).as_secs();
        at.saturating_add(away.ok_or(StateError::Future { seconds })?)
    };
    let ledger = Some(Ledger::resumed(settings, ledger, at, base, rebooted)?);
    Ok(Resumed { base, ledger, log_sequence: log_sequence.filter(|_| !rebooted), incidents })
}

/// What the agent of `here` goes on from: the file in `folder`, or nothing. A file that cannot be used is said and put
/// aside.
#[must_use]
pub fn open(folder: &Path, here: &Here, settings: Settings) -> Resumed {
    let path = folder.join(NAME);
    let anew = || Resumed { base: here.unix, ..Resumed::default() };
    let resumed = match read_bytes(&path) {
        Err(StateError::Io(error)) if error.kind() == io::ErrorKind::NotFound => {
            tracing::info!(path = %path.display(), "no state of an earlier agent: begun anew");
            return anew();
        }
        Err(error) => Err(error),
        Ok(text) => resume(&text, here, settings),
    };
    match resumed {
        Ok(resumed) => {
            let incidents = resumed.incidents.iter().count();
            tracing::info!(path = %path.display(), incidents, "goes on from the state of the agent before");
            resumed
        }
        Err(error) => {
            let aside = path.with_extension("damaged");
            let kept = fs::rename(&path, &aside).is_ok();
            tracing::error!(
                %error, kept, path = %path.display(), aside = %aside.display(),
                "the state of the agent before cannot be used: begun anew, every device is read"
            );
            anew()
        }
    }
}

/// The incidents in the file at `path`.
///
/// # Errors
/// [`StateError`].
pub fn incidents(path: &Path) -> Result<(String, Incidents), StateError> {
    let Written { node, incidents, .. } = read_text(&read_bytes(path)?)?;
    Ok((node, incidents))
}

fn read_bytes(path: &Path) -> Result<Vec<u8>, StateError> {
    let mut text = Vec::new();
    File::open(path)?.take(LIMIT.saturating_add(1)).read_to_end(&mut text)?;
    if u64::try_from(text.len()).unwrap_or(u64::MAX) > LIMIT { Err(StateError::Large) } else { Ok(text) }
}

/// Writes `text` to `path` so that a reader finds the old or the new one, whole, whenever the power fails.
fn replace(path: &Path, text: &[u8]) -> io::Result<()> {
    let folder = path.parent().unwrap_or(Path::new("."));
    let fresh = path.with_extension("new");
    let mut file = File::create(&fresh)?;
    file.write_all(text)?;
    file.sync_all()?;
    fs::rename(&fresh, path)?;
    // The rename itself, where a folder can be synced.
    File::open(folder)?.sync_all()
}

/// Writes what it is given to the file in `folder`, until nobody can give any more; what came last is written.
pub async fn keep(folder: PathBuf, mut texts: watch::Receiver<Arc<Vec<u8>>>, metrics: Metrics) {
    let mut said = false;
    while texts.changed().await.is_ok() {
        let text = Arc::clone(&texts.borrow_and_update());
        let path = folder.join(NAME);
        let written = tokio::task::spawn_blocking(move || replace(&path, &text)).await;
        let written = written.unwrap_or_else(|error| Err(io::Error::other(error)));
        let outcome = if written.is_ok() { "written" } else { "failed" };
        metrics.state_writes.get_or_create(&vec![("outcome", outcome.to_owned())]).inc();
        match written {
            Ok(()) => said = false,
            // The same trouble is told once.
            Err(error) if !said => {
                said = true;
                tracing::error!(%error, folder = %folder.display(), "the agent's state cannot be kept: a restart forgets");
            }
            Err(_) => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn here(boot: &str, uptime: u64, unix: u64) -> Here {
        let (uptime, unix) = (Duration::from_secs(uptime), Duration::from_secs(unix));
        Here { node: "gpu-07".to_owned(), boot_id: boot.to_owned(), uptime, unix }
    }

    fn text(at: u64, here: &Here) -> Vec<u8> {
        let (ledger, incidents) = (Ledger::new(Settings::default()), Incidents::default());
        let kept = Kept { ledger: &ledger, incidents: &incidents, log_sequence: Some(7) };
        write_text(&kept, Duration::from_secs(at), here).unwrap()
    }

    fn read(text: &[u8], here: &Here) -> Result<Resumed, StateError> {
        resume(text, here, Settings::default())
    }

    #[test]
    fn within_a_boot_time_goes_on_by_uptime_and_over_a_reboot_by_the_wall_clock() {
        let text = text(1_000_000, &here("a", 500, 1_000_000));
        // Somebody set the wall clock back by a day: within the boot it does not matter.
        let same = read(&text, &here("a", 560, 913_600)).unwrap();
        assert_eq!((same.base.as_secs(), same.log_sequence), (1_000_060, Some(7)));
        let later = read(&text, &here("b", 10, 1_000_600)).unwrap();
        assert_eq!((later.base.as_secs(), later.log_sequence), (1_000_600, None));
        let back = read(&text, &here("b", 10, 5)).unwrap();
        assert_eq!(back.base.as_secs(), 1_000_000, "time never falls");
    }

    #[test]
    fn what_cannot_be_used_is_refused_in_words() {
        let now = here("a", 500, 1_000);
        let good = text(1_000, &now);
        let replaced =
            |from: &str, to: &str| String::from_utf8(good.clone()).unwrap().replacen(from, to, 1).into_bytes();
        for (text, here, words) in [
            (replaced("state 1 ", "state 2 "), now.clone(), "version 2"),
            (replaced("gpu-07", "gpu-08"), now.clone(), "checksum"),
            (good[..good.len() - 1].to_vec(), now.clone(), "checksum"),
            (b"{}".to_vec(), now.clone(), "first line"),
            (Vec::new(), now.clone(), "first line"),
            (good.clone(), Here { node: "other".to_owned(), ..now.clone() }, "gpu-07"),
            (good.clone(), here("a", 400, 1_000), "100 s"),
        ] {
            let error = read(&text, &here).unwrap_err().to_string();
            assert!(error.contains(words), "{error} lacks {words}");
        }
        assert!(read(&good, &now).is_ok());
    }

    #[test]
    fn a_damaged_file_is_put_aside_and_the_agent_begins_anew() {
        let folder = tempfile::tempdir().unwrap();
        let now = here("a", 500, 1_000);
        assert!(open(folder.path(), &now, Settings::default()).ledger.is_none());
        fs::write(folder.path().join(NAME), b"garbage\nmore").unwrap();
        let anew = open(folder.path(), &now, Settings::default());
        assert!(anew.ledger.is_none() && anew.base == now.unix);
        assert!(folder.path().join("agent-state.damaged").exists() && !folder.path().join(NAME).exists());
        replace(&folder.path().join(NAME), &text(900, &now)).unwrap();
        assert!(open(folder.path(), &now, Settings::default()).ledger.is_some());
    }

    #[tokio::test]
    async fn what_came_last_is_written_when_nobody_gives_any_more() {
        let folder = tempfile::tempdir().unwrap();
        let (give, texts) = watch::channel(Arc::default());
        give.send_replace(Arc::new(b"first".to_vec()));
        give.send_replace(Arc::new(b"last".to_vec()));
        drop(give);
        keep(folder.path().to_owned(), texts, Metrics::default()).await;
        assert_eq!(fs::read(folder.path().join(NAME)).unwrap(), b"last");
    }

    proptest! {
        #[test]
        fn any_bytes_and_any_change_of_a_file_are_refused_or_read(
            bytes in proptest::collection::vec(any::<u8>(), 0..300),
            at in any::<prop::sample::Index>(),
            with in any::<u8>(),
        ) {
            let now = here("a", 500, 1_000);
            prop_assert!(read(&bytes, &now).is_err());
            let mut changed = text(1_000, &now);
            let at = at.index(changed.len());
            let same = changed[at] == with;
            changed[at] = with;
            prop_assert!(same || read(&changed, &now).is_err() || at < 40, "a change at {at} went unseen");
            let body = [format!("{MAGIC} {VERSION} {:016x}\n", checksum(&bytes)).as_bytes(), &bytes].concat();
            prop_assert!(read(&body, &now).is_err());
        }
    }
}
