//! Lists of 16-bit numbers as they stand in objects: base64 without padding, little-endian, so that what has one entry for
//! each expert or slot of a large model stays far below the limits of the API server.

use base64::{Engine as _, engine::general_purpose::STANDARD_NO_PAD};
use serde::{Deserialize as _, Deserializer, Serializer, de};

/// `numbers` as text.
fn encode(numbers: &[u16]) -> String {
    STANDARD_NO_PAD.encode(numbers.iter().flat_map(|number| number.to_le_bytes()).collect::<Vec<u8>>())
}

fn decode<E: de::Error>(text: &str) -> Result<Vec<u16>, E> {
    let bytes = STANDARD_NO_PAD
        .decode(text)
        .map_err(|error| E::custom(format!("{error}: write base64 without padding of 16-bit numbers")))?;
    let (pairs, rest) = bytes.as_chunks::<2>();
    if !rest.is_empty() {
        return Err(E::custom("an odd number of bytes: each number has two"));
    }
    Ok(pairs.iter().map(|pair| u16::from_le_bytes(*pair)).collect())
}

pub(crate) fn serialize<S: Serializer>(numbers: &[u16], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(&encode(numbers))
}

pub(crate) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<u16>, D::Error> {
    decode(&String::deserialize(deserializer)?)
}

/// A list that may be absent.
pub(crate) mod optional {
    use serde::{Deserialize as _, Deserializer, Serializer};

    pub(crate) fn serialize<S: Serializer>(numbers: &Option<Vec<u16>>, serializer: S) -> Result<S::Ok, S::Error> {
        super::serialize(numbers.as_deref().unwrap_or_default(), serializer)
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Vec<u16>>, D::Error> {
        Option::<String>::deserialize(deserializer)?.map(|text| super::decode(&text)).transpose()
    }
}
