//! Text to tokens and back, by the model's own `tokenizer.json`.
//!
//! A piece of text is given out only when no later token can change it: a character whose bytes come in several
//! tokens appears with the last of them.

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    path::Path,
};

use tokenizers::Tokenizer;

use crate::error::ModelError;

/// Largest file that is read, in bytes; the published ones have up to 20 MB.
const FILE_LIMIT: u64 = 256 << 20;
/// Tokens whose text is held back for a character that may never be completed.
const HELD_LIMIT: usize = 16;
/// Tokens before a piece that are decoded with it, since some decoders look back.
const CONTEXT: usize = 4;
/// What a decoder writes for bytes that are no character (yet).
const INCOMPLETE: char = '\u{fffd}';

/// The tokenizer of one model.
#[derive(Debug)]
pub(crate) struct Text {
    tokenizer: Box<Tokenizer>,
    bos: Option<u32>,
    vocab: usize,
}

impl Text {
    /// Reads `dir/tokenizer.json`; `bos` is put before every prompt, `vocab` is the number of token ids of the model.
    ///
    /// # Errors
    /// A file that is missing, too large or no tokenizer.
    pub(crate) fn load(dir: &Path, bos: Option<u32>, vocab: usize) -> Result<Self, ModelError> {
        let path = dir.join("tokenizer.json");
        let error = |problem: String| ModelError::Tokenizer { path: path.clone(), problem };
        let size = std::fs::metadata(&path).map_err(|source| error(source.to_string()))?.len();
        if size > FILE_LIMIT {
            return Err(error(format!("{size} bytes are more than the limit of {FILE_LIMIT}")));
        }
        let bytes = std::fs::read(&path).map_err(|source| error(source.to_string()))?;
        Self::parse(&bytes, bos, vocab).map_err(error)
    }

    /// Reads the bytes of a `tokenizer.json`.
    pub(crate) fn parse(bytes: &[u8], bos: Option<u32>, vocab: usize) -> Result<Self, String> {
        let tokenizer = contained(|| Tokenizer::from_bytes(bytes).map_err(|source| source.to_string()))?;
        Ok(Self { tokenizer: Box::new(tokenizer), bos, vocab })
    }

    /// Token ids of a prompt, the model's first token included.
    ///
    /// # Errors
    /// A text that the tokenizer has no tokens for, or tokens that the model does not know.
    pub(crate) fn encode(&self, text: &str) -> Result<Vec<u32>, ModelError> {
        let encode = || self.tokenizer.encode(text, true).map_err(|source| source.to_string());
        let encoding = contained(encode).map_err(|problem| ModelError::Prompt { problem })?;
        let mut ids = Vec::with_capacity(encoding.len() + 1);
        if let Some(bos) = self.bos
            && encoding.get_ids().first() != Some(&bos)
        {
            ids.push(bos);
        }
        ids.extend_from_slice(encoding.get_ids());
        match ids.iter().find(|id| usize::try_from(**id).map_or(true, |id| id >= self.vocab)) {
            None => Ok(ids),
            Some(id) => Err(ModelError::Prompt {
                problem: format!(
                    "tokenizer.json gives token {id}, the model has {}: take both from one checkpoint",
                    self.vocab
                ),
            }),
        }
    }

    /// Text of `ids`, special tokens left out. What cannot be decoded is empty.
    pub(crate) fn decode(&self, ids: &[u32]) -> String {
        contained(|| self.tokenizer.decode(ids, true).map_err(|source| source.to_string())).unwrap_or_default()
    }
}

/// Runs foreign code that may panic on absurd vocabularies, as an error.
fn contained<T>(run: impl FnOnce() -> Result<T, String>) -> Result<T, String> {
    catch_unwind(AssertUnwindSafe(run)).unwrap_or_else(|_| Err("the tokenizer contradicts itself".to_owned()))
}

/// Text of one sequence, piece by piece.
#[derive(Debug, Default)]
pub(crate) struct Pieces {
    /// The last tokens, context first.
    window: Vec<u32>,
    /// Bytes of the window's text that were given out.
    given: usize,
    /// Tokens since the last whole piece.
    held: usize,
}

impl Pieces {
    /// Adds a token and gives out the text that is certain now.
    pub(crate) fn push(&mut self, text: &Text, id: u32) -> String {
        self.window.push(id);
        self.held += 1;
        let whole = text.decode(&self.window);
        let certain = match whole.strip_suffix(INCOMPLETE) {
            Some(certain) if self.held < HELD_LIMIT => certain,
            _ => &whole,
        };
        let piece = certain.get(self.given..).unwrap_or_default().to_owned();
        self.given = self.given.max(certain.len());
        if certain.len() == whole.len() {
            self.slide(text);
        }
        piece
    }

    /// The text that is still held back, at the end of a sequence.
    pub(crate) fn finish(&mut self, text: &Text) -> String {
        let whole = text.decode(&self.window);
        let piece = whole.get(self.given..).unwrap_or_default().to_owned();
        *self = Self::default();
        piece
    }

    fn slide(&mut self, text: &Text) {
        self.held = 0;
        if self.window.len() > 2 * CONTEXT {
            self.window.drain(..self.window.len() - CONTEXT);
        }
        self.given = text.decode(&self.window).len();
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    /// Byte-level, no merges: token `i` is the `i`-th character of the byte alphabet.
    pub(crate) fn byte_level() -> Vec<u8> {
        let printable =
            |byte: u32| (33..=126).contains(&byte) || (161..=172).contains(&byte) || (174..=255).contains(&byte);
        let mut other = 0_u32;
        let mut alphabet: Vec<char> = (0..256_u32)
            .map(|byte| {
                let code = if printable(byte) {
                    byte
                } else {
                    255 + {
                        other += 1;
                        other
                    }
                };
                char::from_u32(code).unwrap()
            })
            .collect();
        alphabet.sort_unstable();
        let vocab: serde_json::Map<_, _> =
            alphabet.iter().enumerate().map(|(id, c)| (c.to_string(), json!(id + 2))).collect();
        let level = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
        let added = |id: u32, content: &str| {
            json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
                "normalized": false, "special": true})
        };
        let mut model = json!({"type": "BPE", "dropout": null, "unk_token": null, "fuse_unk": false, "merges": []});
        model["vocab"] = vocab.into();
        model["vocab"]["<bos>"] = json!(0);
        model["vocab"]["<eos>"] = json!(1);
        let file = json!({"version": "1.0", "truncation": null, "padding": null, "normalizer": null,
            "added_tokens": [added(0, "<bos>"), added(1, "<eos>")],
            "pre_tokenizer": level.clone(), "post_processor": null, "decoder": level, "model": model});
        serde_json::to_vec(&file).unwrap()
    }

    fn text() -> Text {
        Text::parse(&byte_level(), Some(0), 258).unwrap()
    }

    proptest! {
        #[test]
        fn pieces_add_up_to_the_text(sample in ".{0,40}") {
            let text = text();
            let ids = text.encode(&sample).unwrap();
            prop_assert_eq!(ids[0], 0);
            let mut pieces = Pieces::default();
            let mut joined: String = ids.iter().map(|id| pieces.push(&text, *id)).collect();
            joined += &pieces.finish(&text);
            prop_assert_eq!(joined, sample);
        }

        #[test]
        fn pieces_of_any_tokens_add_up_to_their_text(ids in proptest::collection::vec(0_u32..300, 0..60)) {
            let text = text();
            let mut pieces = Pieces::default();
            let mut joined: String = ids.iter().map(|id| pieces.push(&text, *id)).collect();
            joined += &pieces.finish(&text);
            prop_assert_eq!(joined.trim_matches(INCOMPLETE).is_empty(), text.decode(&ids).trim_matches(INCOMPLETE).is_empty());
        }

        #[test]
        fn a_damaged_file_is_refused_or_read_but_never_panics(
            cuts in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6)
        ) {
            let mut bytes = byte_level();
            for (at, value) in cuts {
                let at = at.index(bytes.len());
                bytes[at] = value;
            }
            if let Ok(text) = Text::parse(&bytes, Some(0), 258) {
                let _ = text.encode("try again later").map(|ids| text.decode(&ids));
            }
        }
    }

    #[test]
    fn a_character_appears_with_its_last_byte() {
        let text = text();
        let ids = text.encode("é!").unwrap();
        let mut pieces = Pieces::default();
        let given: Vec<_> = ids.iter().map(|id| pieces.push(&text, *id)).collect();
        assert_eq!(given, ["", "", "é", "!"]);
    }

    #[test]
    fn a_token_that_the_model_does_not_know_is_refused() {
        let text = Text::parse(&byte_level(), Some(0), 30).unwrap();
        let error = text.encode("zebra").unwrap_err().to_string();
        assert!(error.contains("the model has 30") && !error.contains("zebra"), "{error}");
    }

    #[test]
    fn a_missing_or_damaged_file_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let error = Text::load(dir.path(), None, 10).unwrap_err().to_string();
        assert!(error.contains("tokenizer.json"), "{error}");
        std::fs::write(dir.path().join("tokenizer.json"), "{\"model\": 3}").unwrap();
        assert!(Text::load(dir.path(), None, 10).is_err());
    }
}
