//! Keys and values in etcd. Pure.
//!
//! ```text
//! <prefix>/leader                                     "<epoch, 20 digits> <holder>": compared by every write
//! <prefix>/maps/<namespace>/<name>/<uid>/<revision>   JSON head: the fence; how many parts, and their digest
//! <prefix>/parts/<namespace>/<name>/<uid>/<revision>/<part>   the map's spec as JSON, cut into pieces of 1 MiB
//! ```
//!
//! A map is cut because etcd takes requests of 1.5 MiB by default, and maps may be larger: this store is there for
//! clusters whose maps the API server cannot take. The digest is that of `status.assignment`.

use berth_crds::{PlacementMap, PlacementMapSpec};
use berth_types::{Bytes, Epoch, PlacementName, Revision};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::store::object;

/// Bytes of a part: with keys and compares below etcd's default limit of 1.5 MiB a request.
pub(super) const PART: usize = 1 << 20;
/// Parts of the largest map.
pub(super) const PARTS: usize = 64;
/// The largest map.
pub(super) const LIMIT: Bytes = Bytes(64 << 20);
/// The way maps are written.
const FORMAT: u32 = 1;

/// The keys below a prefix.
#[derive(Clone, Debug)]
pub(super) struct Keys(String);

/// A revision's place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Place {
    pub(super) name: PlacementName,
    pub(super) uid: String,
    pub(super) revision: Revision,
}

impl Keys {
    pub(super) fn below(prefix: &str) -> Self {
        Self(prefix.to_owned())
    }

    pub(super) fn leader(&self) -> String {
        format!("{}/leader", self.0)
    }

    /// What all heads begin with.
    pub(super) fn heads(&self) -> String {
        format!("{}/maps/", self.0)
    }

    pub(super) fn heads_of(&self, name: &PlacementName, uid: &str) -> String {
        format!("{}/maps/{}/{}/{uid}/", self.0, name.namespace(), name.name())
    }

    pub(super) fn parts_of(&self, name: &PlacementName, uid: &str) -> String {
        format!("{}/parts/{}/{}/{uid}/", self.0, name.namespace(), name.name())
    }

    pub(super) fn head(&self, place: &Place) -> String {
        format!("{}{:020}", self.heads_of(&place.name, &place.uid), place.revision.0)
    }

    /// What the parts of a revision begin with.
    pub(super) fn parts(&self, place: &Place) -> String {
        format!("{}{:020}/", self.parts_of(&place.name, &place.uid), place.revision.0)
    }

    pub(super) fn part(&self, place: &Place, part: usize) -> String {
        format!("{}{part:04}", self.parts(place))
    }

    /// The place that a head's key names.
    pub(super) fn place(&self, key: &str) -> Option<Place> {
        let mut words = key.strip_prefix(&self.heads())?.split('/');
        let (namespace, name, uid, revision) = (words.next()?, words.next()?, words.next()?, words.next()?);
        let (name, revision) = (PlacementName::new(namespace, name).ok()?, Revision(revision.parse().ok()?));
        words.next().is_none().then(|| Place { name, uid: uid.to_owned(), revision })
    }
}

/// What the leader's key holds in a term.
pub(super) fn leader(epoch: Epoch, holder: &str) -> String {
    format!("{:020} {holder}", epoch.0)
}

/// The epoch in a leader's key.
pub(super) fn epoch_of(leader: &str) -> Option<Epoch> {
    leader.split_once(' ')?.0.parse().ok().map(Epoch)
}

/// A head's value.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Head {
    format: u32,
    pub(super) parts: usize,
    bytes: usize,
    digest: String,
}

/// Why a stored map is none.
#[derive(Debug, thiserror::Error)]
pub(super) enum Damage {
    #[error("its parts hold {found} bytes, its head says {said}")]
    Size { found: usize, said: usize },
    #[error("its parts do not have the digest that its head says")]
    Digest,
    #[error("it is written in format {0}, this scheduler knows format {FORMAT}: update it")]
    Format(u32),
    #[error("its revision is {0}, its key says otherwise")]
    Revision(u64),
    #[error("part {0} is missing")]
    Missing(usize),
    #[error(transparent)]
    Json(#[from] serde_json::Error),
}

/// A spec as head and JSON text; the text is cut into parts of [`PART`] bytes.
pub(super) fn write(spec: &PlacementMapSpec) -> Result<(Head, Vec<u8>), serde_json::Error> {
    let text = serde_json::to_vec(spec)?;
    let parts = text.len().div_ceil(PART);
    Ok((Head { format: FORMAT, parts, bytes: text.len(), digest: digest(&text) }, text))
}

/// The head that a value holds.
pub(super) fn read_head(value: &[u8]) -> Result<Head, Damage> {
    let head: Head = serde_json::from_slice(value)?;
    if head.format == FORMAT { Ok(head) } else { Err(Damage::Format(head.format)) }
}

/// The map that head and parts hold.
pub(super) fn read(place: &Place, head: &Head, text: &[u8]) -> Result<PlacementMap, Damage> {
    if text.len() != head.bytes {
        return Err(Damage::Size { found: text.len(), said: head.bytes });
    }
    if digest(text) != head.digest {
        return Err(Damage::Digest);
    }
    let spec: PlacementMapSpec = serde_json::from_slice(text)?;
    if spec.revision != place.revision.0 || spec.placement != place.name.name() {
        return Err(Damage::Revision(spec.revision));
    }
    Ok(object(&place.name, spec))
}

fn digest(text: &[u8]) -> String {
    let hex: String = Sha256::digest(text).iter().map(|byte| format!("{byte:02x}")).collect();
    format!("sha256:{hex}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{commit, store::conformance::Subject};

    fn place(revision: u64) -> Place {
        Place { name: "models/v3-0".parse().unwrap(), uid: "u-1".to_owned(), revision: Revision(revision) }
    }

    fn spec(slots: u32) -> PlacementMapSpec {
        let subject = Subject { name: place(7).name, uid: place(7).uid };
        subject.sized_map(2, 7, 61, slots).unwrap().spec
    }

    #[test]
    fn a_key_tells_its_place_and_no_other() {
        let keys = Keys::below("/berth/east");
        assert_eq!(keys.place(&keys.head(&place(7))), Some(place(7)));
        assert_eq!(keys.head(&place(7)), "/berth/east/maps/models/v3-0/u-1/00000000000000000007");
        assert!(keys.part(&place(7), 3).starts_with(&keys.parts(&place(7))));
        for other in ["/berth/maps/models/v3-0/u-1/7", "/berth/east/maps/models/v3-0/u-1", "/berth/east/maps/a/b/c/x"] {
            assert_eq!(keys.place(other), None, "{other}");
        }
        assert_eq!(keys.place(&keys.part(&place(7), 3)), None);
    }

    #[test]
    fn no_placement_owns_the_keys_of_one_whose_name_begins_alike() {
        let keys = Keys::below("/berth");
        let longer = Place { name: "models/v3-01".parse().unwrap(), ..place(7) };
        assert!(!keys.head(&longer).starts_with(&keys.heads_of(&place(7).name, "u-1")));
        let uid = Place { uid: "u-12".to_owned(), ..place(7) };
        assert!(!keys.part(&uid, 0).starts_with(&keys.parts_of(&place(7).name, "u-1")));
    }

    #[test]
    fn a_map_above_a_request_is_cut_and_read_back() {
        let (head, text) = write(&spec(9_000)).unwrap();
        assert_eq!(head.parts, 2);
        let value = serde_json::to_vec(&head).unwrap();
        let read = read(&place(7), &read_head(&value).unwrap(), &text).unwrap();
        assert_eq!(read.spec, spec(9_000));
        assert_eq!(read.metadata.name.as_deref(), Some("v3-0-7"));
        assert_eq!(head.digest, commit::digest(&place(7).name, &read.spec).unwrap(), "as in status.assignment");
    }

    #[test]
    fn damage_is_told() {
        let (head, text) = write(&spec(10)).unwrap();
        let mut other = text.clone();
        other[20] ^= 1;
        assert!(matches!(read(&place(7), &head, &other), Err(Damage::Digest)));
        assert!(matches!(read(&place(7), &head, &text[1..]), Err(Damage::Size { .. })));
        assert!(matches!(read(&place(8), &head, &text), Err(Damage::Revision(7))));
        let later = br#"{"format":2,"parts":1,"bytes":0,"digest":""}"#;
        assert!(read_head(later).unwrap_err().to_string().contains("update it"));
    }

    #[test]
    fn leaders_are_ordered_by_epoch() {
        assert_eq!(epoch_of(&leader(Epoch(12), "pod-a@127.0.0.1:7400")), Some(Epoch(12)));
        assert_eq!(epoch_of("whatever"), None);
        assert!(leader(Epoch(9), "z") < leader(Epoch(10), "a"));
    }
}
