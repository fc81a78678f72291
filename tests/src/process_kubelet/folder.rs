//! A volume's directory whose files all change in one step, laid out as a kubelet does: the files are links
//! through `..data`, a link to a directory that is replaced as a whole. A reader never sees half an update, and
//! no path of an object may leave the directory.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Component, Path, PathBuf};

use super::payload::Payload;

/// One such directory and what it holds.
#[derive(Debug)]
pub(super) struct Folder {
    dir: PathBuf,
    written: Option<Payload>,
    version: u64,
}

impl Folder {
    pub(super) fn new(dir: PathBuf) -> Self {
        Self { dir, written: None, version: 0 }
    }

    /// Makes the directory hold exactly `payload`.
    pub(super) fn write(&mut self, payload: Payload) -> Result<(), String> {
        if self.written.as_ref() == Some(&payload) {
            return Ok(());
        }
        if let Some(path) = payload.keys().find(|path| !is_inside(path)) {
            return Err(format!("path {path:?} leaves the volume"));
        }
        self.replace(&payload).map_err(|e| format!("write volume {}: {e}", self.dir.display()))?;
        self.written = Some(payload);
        Ok(())
    }

    fn replace(&mut self, payload: &Payload) -> std::io::Result<()> {
        let old = format!("..{}", self.version);
        self.version += 1;
        let new = format!("..{}", self.version);
        let data = self.dir.join(&new);
        fs::create_dir_all(&data)?;
        for (path, content) in payload {
            let file = data.join(path);
            fs::create_dir_all(file.parent().unwrap_or(&data))?;
            fs::write(file, content)?;
        }
        let part = self.dir.join("..data.part");
        symlink(&new, &part)?;
        fs::rename(&part, self.dir.join("..data"))?;
        let tops = |payload: &Payload| -> Vec<String> {
            payload.keys().filter_map(|p| p.split('/').next()).map(Into::into).collect()
        };
        let (kept, before) = (tops(payload), self.written.as_ref().map(tops).unwrap_or_default());
        for name in kept.iter().filter(|name| !before.contains(name)) {
            let link = self.dir.join(name);
            if fs::symlink_metadata(&link).is_err() {
                symlink(Path::new("..data").join(name), link)?;
            }
        }
        for name in before.iter().filter(|name| !kept.contains(name)) {
            let link = self.dir.join(name);
            if fs::symlink_metadata(&link).is_ok() {
                fs::remove_file(link)?;
            }
        }
        if self.written.is_some() {
            fs::remove_dir_all(self.dir.join(old))?;
        }
        Ok(())
    }
}

fn is_inside(path: &str) -> bool {
    !path.is_empty() && Path::new(path).components().all(|c| matches!(c, Component::Normal(_)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn payload(files: &[(&str, &str)]) -> Payload {
        files.iter().map(|(path, text)| ((*path).to_owned(), text.as_bytes().to_vec())).collect()
    }

    #[test]
    fn files_appear_change_and_vanish_together() {
        let dir = tempfile::tempdir().expect("a directory");
        let mut folder = Folder::new(dir.path().join("v"));
        let read = |path: &str| fs::read_to_string(dir.path().join("v").join(path)).ok();
        folder.write(payload(&[("a", "1"), ("sub/b", "2"), ("sub/c", "3")])).expect("written");
        assert_eq!((read("a"), read("sub/b")), (Some("1".into()), Some("2".into())));
        folder.write(payload(&[("sub/b", "4"), ("d", "5")])).expect("written");
        assert_eq!(
            (read("a"), read("sub/b"), read("sub/c"), read("d")),
            (None, Some("4".into()), None, Some("5".into()))
        );
        assert!(fs::symlink_metadata(dir.path().join("v/a")).is_err(), "no dangling link stays");
    }

    #[test]
    fn a_path_that_leaves_the_volume_is_refused() {
        let dir = tempfile::tempdir().expect("a directory");
        let mut folder = Folder::new(dir.path().join("v"));
        for path in ["../x", "/x", "a/../../x", ""] {
            assert!(folder.write(payload(&[(path, "")])).is_err(), "{path:?}");
        }
        assert!(!dir.path().join("x").exists());
    }
}
