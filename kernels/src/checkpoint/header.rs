//! The safetensors header: eight bytes of length, then JSON, then the tensors without gaps.
//!
//! Pure: bytes in, a checked table out. Whatever the bytes are, it answers in time linear in their number, allocates
//! nothing on a tensor's word alone, and never panics. Format: github.com/huggingface/safetensors, "Format".

use std::collections::{BTreeMap, HashSet};
use std::fmt;

use serde::de::{Deserialize, Deserializer, MapAccess, Visitor};

use crate::num::{u64_of, usize_of};

/// The longest header accepted: as in the reference implementation.
pub const MAX_HEADER: u64 = 100_000_000;

/// Element types, by their name in the header.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[expect(missing_docs, reason = "each is the format's own name")]
pub enum Dtype {
    Bool,
    U8,
    I8,
    U16,
    I16,
    U32,
    I32,
    U64,
    I64,
    F4,
    F8E4m3,
    F8E5m2,
    F8E8m0,
    F16,
    Bf16,
    F32,
    F64,
}

const NAMES: [(&str, Dtype, u32); 17] = [
    ("BOOL", Dtype::Bool, 8),
    ("U8", Dtype::U8, 8),
    ("I8", Dtype::I8, 8),
    ("U16", Dtype::U16, 16),
    ("I16", Dtype::I16, 16),
    ("U32", Dtype::U32, 32),
    ("I32", Dtype::I32, 32),
    ("U64", Dtype::U64, 64),
    ("I64", Dtype::I64, 64),
    ("F4", Dtype::F4, 4),
    ("F8_E4M3", Dtype::F8E4m3, 8),
    ("F8_E5M2", Dtype::F8E5m2, 8),
    ("F8_E8M0", Dtype::F8E8m0, 8),
    ("F16", Dtype::F16, 16),
    ("BF16", Dtype::Bf16, 16),
    ("F32", Dtype::F32, 32),
    ("F64", Dtype::F64, 64),
];

impl Dtype {
    /// Bits of one element.
    pub fn bits(self) -> usize {
        NAMES.iter().find(|n| n.1 == self).map_or(8, |n| usize_of(n.2))
    }

    fn parse(name: &str) -> Option<Self> {
        NAMES.iter().find(|n| n.0 == name).map(|n| n.1)
    }
}

impl fmt::Display for Dtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(NAMES.iter().find(|n| n.1 == *self).map_or("?", |n| n.0))
    }
}

/// One tensor's entry, checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Element type.
    pub dtype: Dtype,
    /// Elements by dimension; empty for a scalar.
    pub shape: Vec<usize>,
    /// First byte after the header.
    pub start: u64,
    /// Bytes.
    pub len: usize,
}

/// A checked header.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Header {
    /// Tensors by name.
    pub tensors: BTreeMap<String, Entry>,
    /// The `__metadata__` strings.
    pub metadata: BTreeMap<String, String>,
    /// Bytes of all tensors.
    pub data_len: u64,
}

impl Header {
    /// Parses the JSON part.
    ///
    /// # Errors
    /// A sentence that names the tensor: not JSON, a duplicate name, an unknown dtype, a shape that overflows or does not
    /// match its bytes, offsets that overlap or leave a gap.
    pub fn parse(json: &[u8]) -> Result<Self, String> {
        let raw: RawHeader = serde_json::from_slice(json).map_err(|e| format!("the header is not valid JSON ({e})"))?;
        let mut header = Self { metadata: raw.metadata, ..Self::default() };
        let mut spans = Vec::with_capacity(raw.tensors.len());
        for (name, entry) in raw.tensors {
            let checked = check_entry(&name, &entry)?;
            spans.push((checked.start, checked.len, name.clone()));
            header.tensors.insert(name, checked);
        }
        spans.sort();
        let mut end = 0u64;
        for (start, len, name) in spans {
            if start != end {
                let word = if start < end { "overlaps the tensor before it" } else { "leaves a gap before it" };
                return Err(format!("tensor {name} starts at byte {start}, expected {end}: it {word}"));
            }
            end += u64_of(len);
        }
        header.data_len = end;
        Ok(header)
    }
}

fn check_entry(name: &str, raw: &RawEntry) -> Result<Entry, String> {
    let dtype =
        Dtype::parse(&raw.dtype).ok_or_else(|| format!("tensor {name} has the unknown dtype {:?}", raw.dtype))?;
    let [start, end] = raw.data_offsets;
    let shape: Option<Vec<usize>> = raw.shape.iter().map(|&d| usize::try_from(d).ok()).collect();
    let bits = shape.as_ref().and_then(|s| s.iter().try_fold(dtype.bits(), |n, &d| n.checked_mul(d)));
    let (Some(shape), Some(bits)) = (shape, bits) else {
        return Err(format!("tensor {name} has shape {:?}, which overflows", raw.shape));
    };
    if bits % 8 != 0 {
        return Err(format!("tensor {name} of dtype {dtype} and shape {shape:?} ends within a byte"));
    }
    let len = end.checked_sub(start).and_then(|n| usize::try_from(n).ok());
    if len != Some(bits / 8) {
        return Err(format!("tensor {name} has bytes {start}..{end}, but {dtype} {shape:?} is {} bytes", bits / 8));
    }
    Ok(Entry { dtype, shape, start, len: bits / 8 })
}

#[derive(serde::Deserialize)]
#[serde(deny_unknown_fields)]
struct RawEntry {
    dtype: String,
    shape: Vec<u64>,
    data_offsets: [u64; 2],
}

/// The map in file order, so that a name given twice is seen.
struct RawHeader {
    tensors: Vec<(String, RawEntry)>,
    metadata: BTreeMap<String, String>,
}

impl<'de> Deserialize<'de> for RawHeader {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(HeaderVisitor)
    }
}

struct HeaderVisitor;

impl<'de> Visitor<'de> for HeaderVisitor {
    type Value = RawHeader;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object of tensors")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<RawHeader, A::Error> {
        let mut header = RawHeader { tensors: Vec::new(), metadata: BTreeMap::new() };
        let mut seen = HashSet::new();
        while let Some(name) = map.next_key::<String>()? {
            if !seen.insert(name.clone()) {
                return Err(serde::de::Error::custom(format!("tensor {name} is given twice")));
            }
            if name == "__metadata__" {
                header.metadata = map.next_value()?;
            } else {
                let entry = map.next_value().map_err(|e| serde::de::Error::custom(format!("tensor {name}: {e}")))?;
                header.tensors.push((name, entry));
            }
        }
        Ok(header)
    }
}
