//! etcd as store. Every write is a transaction that compares the leader's key, which a leader claims with its
//! epoch before its first write, so that a deposed one can write nothing, whatever it believes. What etcd holds
//! is read as it is; nothing is kept here.

mod keys;
mod link;

use std::sync::atomic::{AtomicBool, Ordering};

use async_trait::async_trait;
use berth_crds::PlacementMap;
use berth_runtime::Clock;
use berth_types::{Bytes, Epoch, PlacementName, Revision};
use etcd_client::{Compare, CompareOp, DeleteOptions, GetOptions, KeyValue, Txn, TxnOp, TxnOpResponse};
use futures::{StreamExt as _, TryStreamExt as _};

use self::{
    keys::{Damage, Head, Keys, PART, PARTS, Place},
    link::Link,
};
use super::{EtcdConfig, Store, StoreError, placement_of};

/// Heads in one answer.
const PAGE: i64 = 500;
/// Maps read at the same time.
const AT_ONCE: usize = 8;
/// Tries to claim the leader's key against others that change it.
const CLAIMS: usize = 3;

/// An etcd, for whoever reads; [`Self::of_term`] is for who writes. Clones share the connection.
#[derive(Clone)]
pub struct Etcd {
    link: Link,
    keys: Keys,
}

impl Etcd {
    /// The etcd that `config` names; it is connected by the first call.
    #[must_use]
    pub fn new(config: EtcdConfig, clock: Clock) -> Self {
        let keys = Keys::below(&config.prefix);
        Self { link: Link::new(config, clock), keys }
    }

    /// The store of a term of `holder`.
    #[must_use]
    pub fn of_term(&self, epoch: Epoch, holder: &str) -> EtcdStore {
        EtcdStore { etcd: self.clone(), epoch, leader: keys::leader(epoch, holder), claimed: AtomicBool::new(false) }
    }

    /// The epoch in the leader's key; 0 if nobody has led.
    ///
    /// # Errors
    /// [`StoreError`] when it cannot be read, or is not ours.
    pub async fn floor(&self) -> Result<Epoch, StoreError> {
        Ok(self.leader("reading the leader of").await?.map_or(Epoch(0), |leader| leader.epoch))
    }

    /// The map of a revision, if there is one.
    ///
    /// # Errors
    /// [`StoreError`] when it cannot be read.
    pub async fn map(
        &self,
        name: &PlacementName,
        uid: &str,
        revision: Revision,
    ) -> Result<Option<PlacementMap>, StoreError> {
        let place = Place { name: name.clone(), uid: uid.to_owned(), revision };
        match self.get("reading", &self.keys.head(&place)).await? {
            Some(head) => self.read(&place, head.value()).await,
            None => Ok(None),
        }
    }

    /// All maps there are, each with the uid of the placement that owns it.
    ///
    /// # Errors
    /// [`StoreError`] when they cannot be read.
    pub async fn maps(&self) -> Result<Vec<(String, PlacementMap)>, StoreError> {
        let heads = self.heads().await?;
        let places = heads.into_iter().filter_map(|head| {
            let (key, value) = head.into_key_value();
            Some((self.keys.place(std::str::from_utf8(&key).ok()?)?, value))
        });
        let read = places.map(|(place, head)| async move {
            let map = self.read(&place, &head).await?;
            Ok(map.map(|map| (place.uid, map)))
        });
        let maps: Vec<Option<_>> = futures::stream::iter(read).buffered(AT_ONCE).try_collect().await?;
        Ok(maps.into_iter().flatten().collect())
    }

    async fn heads(&self) -> Result<Vec<KeyValue>, StoreError> {
        let (mut from, end) = (self.keys.heads().into_bytes(), after(&self.keys.heads()));
        let mut heads = Vec::new();
        loop {
            let options = GetOptions::new().with_range(end.clone()).with_limit(PAGE);
            let mut page = self.link.get("listing", from, options).await?;
            let more = page.more();
            heads.extend(page.take_kvs());
            match heads.last() {
                // The least key above the last one.
                Some(last) if more => from = [last.key(), b"\0"].concat(),
                _ => return Ok(heads),
            }
        }
    }

    /// The map that a head's value speaks of; `None` if it is damaged (said in the log) or gone meanwhile.
    async fn read(&self, place: &Place, head: &[u8]) -> Result<Option<PlacementMap>, StoreError> {
        let map = match keys::read_head(head) {
            Ok(head) => self.assemble(place, &head).await?,
            Err(damage) => Err(damage),
        };
        match map {
            Ok(map) => Ok(Some(map)),
            Err(damage) => {
                if self.get("reading", &self.keys.head(place)).await?.is_some() {
                    let Place { name, uid, revision } = place;
                    tracing::warn!(placement = %name, uid, revision = revision.0, %damage, "stored revision skipped");
                }
                Ok(None)
            }
        }
    }

    async fn assemble(&self, place: &Place, head: &Head) -> Result<Result<PlacementMap, Damage>, StoreError> {
        let mut text = Vec::new();
        for part in 0..head.parts.min(PARTS) {
            match self.get("reading", &self.keys.part(place, part)).await? {
                Some(found) => text.extend_from_slice(found.value()),
                None => return Ok(Err(Damage::Missing(part))),
            }
        }
        Ok(keys::read(place, head, &text))
    }

    async fn get(&self, action: &'static str, key: &str) -> Result<Option<KeyValue>, StoreError> {
        let mut answer = self.link.get(action, key, GetOptions::new()).await?;
        Ok(answer.take_kvs().into_iter().next())
    }

    async fn leader(&self, action: &'static str) -> Result<Option<Leader>, StoreError> {
        let key = self.keys.leader();
        let Some(found) = self.get(action, &key).await? else { return Ok(None) };
        let value = String::from_utf8_lossy(found.value()).into_owned();
        let Some(epoch) = keys::epoch_of(&value) else {
            let foreign = format!("etcd: key {key} holds {value:?}, which is not Berth's: choose another prefix");
            return Err(StoreError::Unavailable { action, source: foreign.into() });
        };
        Ok(Some(Leader { epoch, value, modified: found.mod_revision() }))
    }
}

/// The leader's key as it was read.
struct Leader {
    epoch: Epoch,
    value: String,
    modified: i64,
}

/// etcd for the leader of one term.
pub struct EtcdStore {
    etcd: Etcd,
    epoch: Epoch,
    /// What the leader's key holds while this term writes.
    leader: String,
    claimed: AtomicBool,
}

/// Why a guarded write was not made.
enum Guard {
    /// Nobody holds the leader's key: etcd lost its data, or the key was deleted.
    Vacant,
    /// Somebody else holds it.
    Other(String),
    /// The revision exists.
    Exists,
}

impl EtcdStore {
    /// Puts this term into the leader's key, unless a later one is there.
    async fn claim(&self) -> Result<(), StoreError> {
        const ACTION: &str = "claiming";
        if self.claimed.load(Ordering::Acquire) {
            return Ok(());
        }
        let key = self.etcd.keys.leader();
        for _ in 0..CLAIMS {
            let modified = match self.etcd.leader(ACTION).await? {
                // A claim whose answer was lost.
                Some(seen) if seen.value == self.leader => {
                    self.claimed.store(true, Ordering::Release);
                    return Ok(());
                }
                Some(seen) if seen.epoch >= self.epoch => return Err(self.deposed(ACTION, seen.value)),
                seen => seen.map_or(0, |seen| seen.modified),
            };
            let unchanged = Compare::mod_revision(key.clone(), CompareOp::Equal, modified);
            let put = TxnOp::put(key.clone(), self.leader.clone(), None);
            if self.etcd.link.txn(ACTION, Txn::new().when([unchanged]).and_then([put])).await?.succeeded() {
                self.claimed.store(true, Ordering::Release);
                tracing::info!(epoch = self.epoch.0, "claimed the leader's key in etcd");
                return Ok(());
            }
        }
        Err(StoreError::Unavailable {
            action: ACTION,
            source: "etcd: others write the leader's key all the time".into(),
        })
    }

    /// Does `write` if this term holds the leader's key and `absent`, where given, does not exist.
    async fn write(&self, action: &'static str, absent: Option<&str>, write: Vec<TxnOp>) -> Result<(), Refusal> {
        // Once more where etcd lost the key that was claimed.
        for last in [false, true] {
            self.claim().await?;
            match self.try_write(action, absent, &write).await? {
                Ok(()) => return Ok(()),
                Err(Guard::Exists) => return Err(Refusal::Exists),
                Err(Guard::Vacant) if !last => self.claimed.store(false, Ordering::Release),
                Err(Guard::Vacant) => return Err(self.deposed(action, String::new()).into()),
                Err(Guard::Other(leader)) => return Err(self.deposed(action, leader).into()),
            }
        }
        Ok(())
    }

    async fn try_write(
        &self,
        action: &'static str,
        absent: Option<&str>,
        write: &[TxnOp],
    ) -> Result<Result<(), Guard>, StoreError> {
        let leader = self.etcd.keys.leader();
        let mut guards = vec![Compare::value(leader.clone(), CompareOp::Equal, self.leader.clone())];
        guards.extend(absent.map(|key| Compare::create_revision(key, CompareOp::Equal, 0)));
        let txn = Txn::new().when(guards).and_then(write).or_else([TxnOp::get(leader, None)]);
        let answer = self.etcd.link.txn(action, txn).await?;
        if answer.succeeded() {
            return Ok(Ok(()));
        }
        let seen = answer.op_responses().into_iter().find_map(|response| match response {
            TxnOpResponse::Get(mut found) => found.take_kvs().into_iter().next(),
            _ => None,
        });
        Ok(Err(match seen.map(|seen| String::from_utf8_lossy(seen.value()).into_owned()) {
            None => Guard::Vacant,
            Some(leader) if leader != self.leader => Guard::Other(leader),
            Some(_) => Guard::Exists,
        }))
    }

    fn deposed(&self, action: &'static str, leader: String) -> StoreError {
        StoreError::Deposed { action, epoch: self.epoch, leader }
    }

    async fn delete_all(&self, prefixes: [String; 2]) -> Result<(), StoreError> {
        let operation = |prefix: String| TxnOp::delete(prefix, Some(DeleteOptions::new().with_prefix()));
        match self.write("deleting", None, prefixes.map(operation).into()).await {
            // Nothing had to be absent.
            Ok(()) | Err(Refusal::Exists) => Ok(()),
            Err(Refusal::Error(error)) => Err(error),
        }
    }
}

/// Why a write was refused.
enum Refusal {
    Exists,
    Error(StoreError),
}

impl From<StoreError> for Refusal {
    fn from(error: StoreError) -> Self {
        Self::Error(error)
    }
}

#[async_trait]
impl Store for EtcdStore {
    async fn list(&self) -> Result<Vec<(String, PlacementMap)>, StoreError> {
        match self.claim().await {
            // What is there can be read, and serving goes on; writes will say the same.
            Err(error @ StoreError::Full { .. }) => tracing::warn!(%error, "leading without room in the store"),
            claimed => claimed?,
        }
        self.etcd.maps().await
    }

    async fn create(&self, owner_uid: &str, map: &PlacementMap) -> Result<(), StoreError> {
        const ACTION: &str = "creating";
        let (name, revision) = (placement_of(ACTION, map)?, Revision(map.spec.revision));
        let place = Place { name: name.clone(), uid: owner_uid.to_owned(), revision };
        let encode = |source: serde_json::Error| StoreError::Unavailable { action: ACTION, source: source.into() };
        let (head, text) = keys::write(&map.spec).map_err(encode)?;
        let bytes = Bytes(u64::try_from(text.len()).unwrap_or(u64::MAX));
        let too_large = |limit| StoreError::TooLarge { name: name.clone(), revision, bytes, limit };
        if head.parts > PARTS {
            return Err(too_large(keys::LIMIT));
        }
        let (keys, head) = (&self.etcd.keys, serde_json::to_vec(&head).map_err(encode)?);
        let fence = keys.head(&place);
        let mut parts = text.chunks(PART).enumerate().peekable();
        while let Some((index, part)) = parts.next() {
            let mut write = vec![TxnOp::put(keys.part(&place, index), part, None)];
            if parts.peek().is_none() {
                write.push(TxnOp::put(fence.clone(), head.clone(), None));
            }
            match self.write(ACTION, Some(&fence), write).await {
                Ok(()) => {}
                Err(Refusal::Exists) => return Err(StoreError::Exists { name, revision }),
                Err(Refusal::Error(error)) if link::is_too_large(&error) => {
                    return Err(too_large(Bytes(u64::try_from(part.len()).unwrap_or(u64::MAX))));
                }
                Err(Refusal::Error(error)) => return Err(error),
            }
        }
        Ok(())
    }

    async fn delete(&self, name: &PlacementName, owner_uid: &str, revision: Revision) -> Result<(), StoreError> {
        let place = Place { name: name.clone(), uid: owner_uid.to_owned(), revision };
        self.delete_all([self.etcd.keys.head(&place), self.etcd.keys.parts(&place)]).await
    }

    async fn forget(&self, name: &PlacementName, owner_uid: &str) -> Result<(), StoreError> {
        let keys = &self.etcd.keys;
        self.delete_all([keys.heads_of(name, owner_uid), keys.parts_of(name, owner_uid)]).await
    }
}

/// The end of the range of keys that begin with `prefix`, which ends with a slash.
fn after(prefix: &str) -> Vec<u8> {
    let mut end = prefix.as_bytes().to_vec();
    if let Some(last) = end.last_mut() {
        *last = last.saturating_add(1);
    }
    end
}
