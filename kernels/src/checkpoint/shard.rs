//! One safetensors file, opened once and read by position.
//!
//! Reads copy into owned memory: a mapped file that shrinks would be a signal, here it is an error. The length is checked
//! when the file is opened, and every read checks again.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use super::error::CheckpointError;
use super::header::{Entry, Header, MAX_HEADER};
use crate::num::u64_of;

/// Bytes hashed at a time.
const HASH_CHUNK: usize = 4 << 20;

/// An open file and its checked header.
#[derive(Debug)]
pub(crate) struct Shard {
    path: PathBuf,
    file: File,
    header: Header,
    data_start: u64,
}

impl Shard {
    pub(crate) fn open(path: &Path) -> Result<Self, CheckpointError> {
        let io = |doing: &str, source| CheckpointError::Io { path: path.to_owned(), doing: doing.to_owned(), source };
        let file = File::open(path).map_err(|e| io("opening", e))?;
        let meta = file.metadata().map_err(|e| io("reading its size", e))?;
        if !meta.is_file() {
            return Err(CheckpointError::Header { path: path.to_owned(), problem: "this is not a file".into() });
        }
        let found = meta.len();
        let short =
            |what: &str, needed| CheckpointError::Short { path: path.to_owned(), what: what.into(), needed, found };
        if found < 8 {
            return Err(short("the header's length", 8));
        }
        let mut size = [0u8; 8];
        file.read_exact_at(&mut size, 0).map_err(|e| io("reading the header's length", e))?;
        let size = u64::from_le_bytes(size);
        let bad = |problem: String| CheckpointError::Header { path: path.to_owned(), problem };
        if size > MAX_HEADER {
            return Err(bad(format!("the header claims {size} bytes, at most {MAX_HEADER} are allowed")));
        }
        if found < 8 + size {
            return Err(short("the header", 8 + size));
        }
        let mut json = vec![0u8; usize::try_from(size).unwrap_or(0)];
        file.read_exact_at(&mut json, 8).map_err(|e| io("reading the header", e))?;
        let header = Header::parse(&json).map_err(bad)?;
        let end = (8 + size).saturating_add(header.data_len);
        if found < end {
            let last = header.tensors.iter().max_by_key(|(_, e)| (e.start, e.len)).map_or("", |(n, _)| n);
            return Err(short(&format!("tensor {last}"), end));
        }
        if found > end {
            return Err(bad(format!("{} bytes follow the last tensor", found - end)));
        }
        Ok(Self { path: path.to_owned(), file, header, data_start: 8 + size })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    pub(crate) fn header(&self) -> &Header {
        &self.header
    }

    /// Copies one tensor's bytes.
    pub(crate) fn read(&self, tensor: &str, entry: &Entry) -> Result<Vec<u8>, CheckpointError> {
        let mut bytes = Vec::new();
        bytes.try_reserve_exact(entry.len).map_err(|_| CheckpointError::Memory {
            path: self.path.clone(),
            tensor: tensor.to_owned(),
            bytes: u64_of(entry.len),
        })?;
        bytes.resize(entry.len, 0);
        self.read_at(&mut bytes, entry.start, &format!("tensor {tensor}"))?;
        Ok(bytes)
    }

    fn read_at(&self, bytes: &mut [u8], start: u64, what: &str) -> Result<(), CheckpointError> {
        self.file.read_exact_at(bytes, self.data_start + start).map_err(|source| {
            if source.kind() == std::io::ErrorKind::UnexpectedEof {
                let found = self.file.metadata().map_or(0, |m| m.len());
                let needed = self.data_start + start + u64_of(bytes.len());
                return CheckpointError::Short { path: self.path.clone(), what: what.to_owned(), needed, found };
            }
            CheckpointError::Io { path: self.path.clone(), doing: format!("reading {what}"), source }
        })
    }

    /// SHA-256 over the checked header (names, dtypes, shapes, offsets, lengths) and the tensors' bytes.
    ///
    /// Reads the whole file once: one to two seconds per gigabyte on one core with SHA instructions,
    /// several without. `read` is told of each part's bytes.
    pub(crate) fn digest(&self, read: &(dyn Fn(u64) + Sync)) -> Result<[u8; 32], CheckpointError> {
        let mut hash = Sha256::new();
        for (name, entry) in &self.header.tensors {
            hash.update(format!("{name}\0{}\0{:?}\0{}\0{}\n", entry.dtype, entry.shape, entry.start, entry.len));
        }
        let mut buffer = vec![0u8; HASH_CHUNK.min(usize::try_from(self.header.data_len).unwrap_or(HASH_CHUNK))];
        let mut at = 0u64;
        while at < self.header.data_len {
            let left = usize::try_from(self.header.data_len - at).unwrap_or(HASH_CHUNK);
            let part = &mut buffer[..HASH_CHUNK.min(left)];
            self.read_at(part, at, "the content")?;
            hash.update(&*part);
            at += u64_of(part.len());
            read(u64_of(part.len()));
        }
        Ok(hash.finalize().into())
    }
}
