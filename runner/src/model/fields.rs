//! Strict reading of `config.json`: a field is what it must be, or the error names it.

use serde_json::{Map, Value};

use super::ModelError;

/// Largest size that a configuration may name: 2^24. Products of two stay far below the address space.
const LIMIT: u64 = 1 << 24;

/// The fields of one JSON object and the path that leads to it.
#[derive(Clone, Copy)]
pub(crate) struct Fields<'a> {
    path: &'a str,
    map: &'a Map<String, Value>,
}

impl<'a> Fields<'a> {
    /// The top level of a configuration.
    pub(crate) fn new(value: &'a Value) -> Result<Self, ModelError> {
        let map = value.as_object().ok_or_else(|| wrong("config.json", value, "a JSON object"))?;
        Ok(Self { path: "", map })
    }

    /// The object in `field`; `None` if it is absent or null.
    pub(crate) fn object(&self, field: &'a str) -> Result<Option<Fields<'a>>, ModelError> {
        match self.get(field) {
            None => Ok(None),
            Some(Value::Object(map)) => Ok(Some(Fields { path: field, map })),
            Some(other) => Err(wrong(&self.name(field), other, "an object")),
        }
    }

    /// As [`Fields::object`], with the whole path of what is in it.
    pub(crate) fn nested(&self, field: &str, path: &'a str) -> Result<Option<Fields<'a>>, ModelError> {
        match self.get(field) {
            None => Ok(None),
            Some(Value::Object(map)) => Ok(Some(Fields { path, map })),
            Some(other) => Err(wrong(&self.name(field), other, "an object")),
        }
    }

    /// A list of texts; `None` if absent or null.
    pub(crate) fn texts(&self, field: &str) -> Result<Option<Vec<&'a str>>, ModelError> {
        let text = |value: &'a Value| value.as_str().ok_or_else(|| wrong(&self.name(field), value, "a list of texts"));
        match self.get(field) {
            None => Ok(None),
            Some(Value::Array(list)) => list.iter().map(text).collect::<Result<_, _>>().map(Some),
            Some(other) => Err(wrong(&self.name(field), other, "a list of texts")),
        }
    }

    /// A list of sizes from 0 to 2^24; `None` if absent or null.
    pub(crate) fn sizes(&self, field: &str) -> Result<Option<Vec<usize>>, ModelError> {
        let expected = "a list of whole numbers from 0 to 16777216";
        let size = |value: &Value| {
            let size = value.as_u64().filter(|size| *size <= LIMIT).and_then(|size| usize::try_from(size).ok());
            size.ok_or_else(|| wrong(&self.name(field), value, expected))
        };
        match self.get(field) {
            None => Ok(None),
            Some(Value::Array(list)) => list.iter().map(size).collect::<Result<_, _>>().map(Some),
            Some(other) => Err(wrong(&self.name(field), other, expected)),
        }
    }

    /// A size from `least` to 2^24; `None` if absent or null.
    pub(crate) fn size_or_none(&self, field: &str, least: u64) -> Result<Option<usize>, ModelError> {
        let Some(value) = self.get(field) else { return Ok(None) };
        let size = value.as_u64().filter(|size| (least..=LIMIT).contains(size));
        match size.and_then(|size| usize::try_from(size).ok()) {
            Some(size) => Ok(Some(size)),
            None if least == 0 => Err(wrong(&self.name(field), value, "a whole number from 0 to 16777216")),
            None => Err(wrong(&self.name(field), value, "a whole number from 1 to 16777216")),
        }
    }

    /// A size from 1 to 2^24.
    pub(crate) fn size(&self, field: &str) -> Result<usize, ModelError> {
        self.size_or_none(field, 1)?.ok_or_else(|| self.missing(field))
    }

    /// A finite number; `None` if absent or null.
    pub(crate) fn number_or_none(&self, field: &str) -> Result<Option<f64>, ModelError> {
        let Some(value) = self.get(field) else { return Ok(None) };
        match value.as_f64().filter(|number| number.is_finite()) {
            Some(number) => Ok(Some(number)),
            None => Err(wrong(&self.name(field), value, "a finite number")),
        }
    }

    /// A finite number above zero.
    pub(crate) fn positive(&self, field: &str) -> Result<f64, ModelError> {
        let number = self.number_or_none(field)?.ok_or_else(|| self.missing(field))?;
        if number > 0.0 { Ok(number) } else { Err(self.refuse(field, "a number above 0")) }
    }

    /// Yes or no; `default` if absent or null.
    pub(crate) fn flag(&self, field: &str, default: bool) -> Result<bool, ModelError> {
        match self.get(field) {
            None => Ok(default),
            Some(Value::Bool(flag)) => Ok(*flag),
            Some(other) => Err(wrong(&self.name(field), other, "true or false")),
        }
    }

    /// A text; `None` if absent or null.
    pub(crate) fn text(&self, field: &str) -> Result<Option<&'a str>, ModelError> {
        match self.get(field) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(other) => Err(wrong(&self.name(field), other, "a text")),
        }
    }

    /// One token id or a list of them; empty if absent or null.
    pub(crate) fn tokens(&self, field: &str) -> Result<Vec<u32>, ModelError> {
        let id = |value: &Value| {
            let id = value.as_u64().and_then(|id| u32::try_from(id).ok());
            id.ok_or_else(|| wrong(&self.name(field), value, "a token id, or a list of token ids"))
        };
        match self.get(field) {
            None => Ok(Vec::new()),
            Some(Value::Array(list)) => list.iter().map(id).collect(),
            Some(value) => Ok(vec![id(value)?]),
        }
    }

    /// Refuses anything in `field` but the one text that is implemented, if it is there at all.
    pub(crate) fn only(&self, field: &str, supported: &'static str) -> Result<(), ModelError> {
        match self.text(field)? {
            Some(text) if text != supported => Err(self.refuse(field, supported)),
            _ => Ok(()),
        }
    }

    /// An error for a value of `field` that can be read but is not supported.
    pub(crate) fn refuse(&self, field: &str, supported: &'static str) -> ModelError {
        wrong(&self.name(field), self.map.get(field).unwrap_or(&Value::Null), supported)
    }

    /// An error for a field that is not there.
    pub(crate) fn missing(&self, field: &str) -> ModelError {
        ModelError::ConfigMissing { field: self.name(field) }
    }

    fn get(&self, field: &str) -> Option<&'a Value> {
        self.map.get(field).filter(|value| !value.is_null())
    }

    fn name(&self, field: &str) -> String {
        if self.path.is_empty() { field.to_owned() } else { format!("{}.{field}", self.path) }
    }
}

fn wrong(field: &str, value: &Value, supported: &'static str) -> ModelError {
    let value: String = value.to_string().chars().take(80).collect();
    ModelError::Config { field: field.to_owned(), value, supported }
}
