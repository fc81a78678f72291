//! Image names to binaries of this machine. Pure: it never looks whether the binary exists.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// What a container runs instead of an image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Image {
    /// The last part of the image's repository: a command of this name means the binary.
    pub name: String,
    /// The binary.
    pub program: PathBuf,
}

/// Finds the binary for an image reference. A key of `images` is a whole reference (`berth:dev`), a repository
/// (`registry.example/berth`), or the end of one after a slash (`berth`); the longest key that fits wins.
pub(super) fn find(images: &BTreeMap<String, PathBuf>, reference: &str) -> Option<Image> {
    let repository = repository(reference);
    let fits = |key: &str| {
        key == reference || key == repository || repository.strip_suffix(key).is_some_and(|rest| rest.ends_with('/'))
    };
    let (_, program) = images.iter().filter(|(key, _)| fits(key)).max_by_key(|(key, _)| key.len())?;
    let name = repository.rsplit('/').next().unwrap_or(repository);
    Some(Image { name: name.into(), program: program.clone() })
}

/// A reference without its digest and tag.
fn repository(reference: &str) -> &str {
    let name = reference.split('@').next().unwrap_or(reference);
    match name.rsplit_once(':') {
        Some((before, tag)) if !tag.contains('/') => before,
        _ => name,
    }
}

impl Image {
    /// The arguments and the binary of a container of this image: `command` replaces the image's entry point,
    /// `args` follow. The binary is `None` where the command names another program.
    pub(super) fn command(&self, command: Vec<String>, args: Vec<String>) -> (Vec<String>, Option<PathBuf>) {
        let entry = self.program.display().to_string();
        let (mut line, program) = match command.first() {
            None => (vec![entry], Some(self.program.clone())),
            Some(first) if self.is_called(first) => (command, Some(self.program.clone())),
            Some(_) => (command, None),
        };
        line.extend(args);
        (line, program)
    }

    fn is_called(&self, command: &str) -> bool {
        let name = Path::new(command).file_name();
        name.is_some_and(|n| n == self.name.as_str()) || name == self.program.file_name()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn images() -> BTreeMap<String, PathBuf> {
        let entry = |key: &str, path: &str| (key.to_owned(), PathBuf::from(path));
        BTreeMap::from([entry("berth", "/t/berth"), entry("berth:old", "/old/berth"), entry("a.b:5/x", "/x")])
    }

    #[test]
    fn an_image_is_found_by_reference_repository_or_its_end() {
        let program = |reference| find(&images(), reference).map(|i| i.program.display().to_string());
        assert_eq!(program("berth:dev").as_deref(), Some("/t/berth"));
        assert_eq!(program("berth:old").as_deref(), Some("/old/berth"));
        assert_eq!(program("registry:5000/team/berth@sha256:00").as_deref(), Some("/t/berth"));
        assert_eq!(program("a.b:5/x:1").as_deref(), Some("/x"));
        assert_eq!(program("dearth:dev"), None);
        assert_eq!(program("a.b:5/xberth"), None);
    }

    #[test]
    fn a_command_of_the_images_name_means_its_binary() {
        let image = find(&images(), "berth:dev").expect("an image");
        let words = |line: &[&str]| line.iter().map(ToString::to_string).collect::<Vec<_>>();
        let (line, program) = image.command(vec![], words(&["agent"]));
        assert_eq!((line, program), (words(&["/t/berth", "agent"]), Some("/t/berth".into())));
        let (line, program) = image.command(words(&["/usr/local/bin/berth"]), words(&["agent"]));
        assert_eq!((line, program), (words(&["/usr/local/bin/berth", "agent"]), Some("/t/berth".into())));
        assert_eq!(image.command(words(&["sh"]), words(&["-c"])), (words(&["sh", "-c"]), None));
    }
}
