//! Which folders weights may come from.
//!
//! Paths are canonicalised before they are compared, so neither `..` nor a symbolic link leads out; the files of a
//! checkpoint's folder are held to the same rule.

use std::path::{Path, PathBuf};

use super::error::CheckpointError;

/// Folders that weights may be read from, canonicalised. The empty list allows nothing; [`Roots::any`] allows all.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Roots(Vec<PathBuf>);

impl Roots {
    /// The given folders and what is below them.
    ///
    /// # Errors
    /// A folder that does not exist.
    pub fn new(folders: impl IntoIterator<Item = impl AsRef<Path>>) -> Result<Self, CheckpointError> {
        folders
            .into_iter()
            .map(|folder| canonical(folder.as_ref(), "opening the allowed root"))
            .collect::<Result<_, _>>()
            .map(Self)
    }

    /// Everything: for a person at their own machine.
    pub fn any() -> Self {
        Self(vec![PathBuf::from("/")])
    }

    /// The folders.
    pub fn folders(&self) -> &[PathBuf] {
        &self.0
    }

    /// The real path behind a `file://` URI or a path. If it is a folder, its weights and JSON files must lie within the
    /// roots as well.
    ///
    /// # Errors
    /// `Uri` for other schemes, a remote host or a relative path in a URI; `Io` if there is nothing; `Outside` if it, or a
    /// link in it, leads elsewhere.
    pub fn resolve(&self, uri_or_path: &str) -> Result<PathBuf, CheckpointError> {
        let path = canonical(&local_path(uri_or_path)?, "opening the checkpoint")?;
        self.admit(&path)?;
        if path.is_dir() {
            let io =
                |source| CheckpointError::Io { path: path.clone(), doing: "listing the checkpoint".into(), source };
            for entry in std::fs::read_dir(&path).map_err(io)? {
                let file = entry.map_err(io)?.path();
                if file.extension().is_some_and(|e| e == "safetensors" || e == "json") {
                    self.admit(&canonical(&file, "following the link")?)?;
                }
            }
        }
        Ok(path)
    }

    /// Whether a canonical path is inside.
    pub(crate) fn admit(&self, path: &Path) -> Result<(), CheckpointError> {
        if self.0.iter().any(|root| path.starts_with(root)) {
            return Ok(());
        }
        Err(CheckpointError::Outside { path: path.to_owned(), roots: self.0.clone() })
    }
}

pub(crate) fn canonical(path: &Path, doing: &str) -> Result<PathBuf, CheckpointError> {
    path.canonicalize().map_err(|source| CheckpointError::Io { path: path.to_owned(), doing: doing.to_owned(), source })
}

fn local_path(text: &str) -> Result<PathBuf, CheckpointError> {
    let refuse = |problem: &str| Err(CheckpointError::Uri { uri: text.to_owned(), problem: problem.to_owned() });
    let Some((scheme, rest)) = text.split_once("://") else {
        if text.is_empty() {
            return refuse("is empty");
        }
        return Ok(PathBuf::from(text));
    };
    if scheme != "file" {
        return refuse("this scheme is not supported yet");
    }
    let rest = rest.strip_prefix("localhost").unwrap_or(rest);
    if !rest.starts_with('/') {
        return refuse("names another host or a relative path");
    }
    match unescape(rest) {
        Some(path) => Ok(PathBuf::from(path)),
        None => refuse("has a broken % escape"),
    }
}

/// Percent-decodes; `None` if an escape is broken or the result is not UTF-8.
fn unescape(text: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&first, tail)) = rest.split_first() {
        if first == b'%' {
            let (digits, tail) = tail.split_at_checked(2)?;
            let digits = std::str::from_utf8(digits).ok().filter(|d| d.bytes().all(|b| b.is_ascii_hexdigit()))?;
            bytes.push(u8::from_str_radix(digits, 16).ok()?);
            rest = tail;
        } else {
            bytes.push(first);
            rest = tail;
        }
    }
    String::from_utf8(bytes).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links_and_dots_that_lead_out_are_refused() {
        let temp = tempfile::tempdir().unwrap();
        let base = temp.path().canonicalize().unwrap();
        let (inside, outside) = (base.join("in"), base.join("out"));
        std::fs::create_dir_all(inside.join("model")).unwrap();
        std::fs::create_dir_all(&outside).unwrap();
        std::fs::write(outside.join("w.safetensors"), b"x").unwrap();
        let roots = Roots::new([&inside]).unwrap();
        let text = |p: &Path| p.to_str().unwrap().to_owned();
        assert_eq!(roots.resolve(&text(&inside.join("model"))).unwrap(), inside.join("model"));
        assert_eq!(roots.resolve(&format!("file://{}", text(&inside.join("model")))).unwrap(), inside.join("model"));
        assert!(matches!(roots.resolve(&text(&inside.join("../out"))), Err(CheckpointError::Outside { .. })));
        std::os::unix::fs::symlink(&outside, inside.join("sly")).unwrap();
        assert!(matches!(roots.resolve(&text(&inside.join("sly"))), Err(CheckpointError::Outside { .. })));
        std::os::unix::fs::symlink(outside.join("w.safetensors"), inside.join("model/w.safetensors")).unwrap();
        assert!(matches!(roots.resolve(&text(&inside.join("model"))), Err(CheckpointError::Outside { .. })));
        assert!(Roots::any().resolve(&text(&inside.join("model"))).is_ok());
    }

    #[test]
    fn only_local_files_are_named_by_a_uri() {
        let error = |uri: &str| Roots::any().resolve(uri).unwrap_err().to_string();
        assert_eq!(
            error("s3://bucket/model"),
            "weights uri \"s3://bucket/model\": this scheme is not supported yet: use file:// with an absolute path"
        );
        assert!(error("file://host/model").contains("names another host or a relative path"));
        assert!(error("file:///a%2").contains("has a broken % escape"));
        assert!(error("").contains("is empty"));
        assert!(error("file:///no/such%20folder").starts_with("/no/such folder: opening the checkpoint: "));
    }
}
