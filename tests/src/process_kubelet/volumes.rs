//! A pod's volumes as directories of this machine, and a container's mounts of them. What a pod asks to be
//! created on its node is created in the node's own folder, never on the machine.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use k8s_openapi::api::core::v1::{Container, HostPathVolumeSource, Pod, Volume};

use super::attempt::Mount;
use super::folder::Folder;
use super::payload::Lookup;
use super::status::Addresses;

/// Where a node keeps its files and what it shows instead of the machine's.
#[derive(Debug, Clone)]
pub(super) struct HostFiles {
    /// The node's own folder.
    pub root: PathBuf,
    /// Paths of the node to paths of this machine, for a path and all below it.
    pub remapped: BTreeMap<PathBuf, PathBuf>,
}

/// The volumes of one pod.
#[derive(Debug)]
pub(super) struct Volumes {
    dir: PathBuf,
    paths: BTreeMap<String, PathBuf>,
    folders: BTreeMap<String, Folder>,
}

impl Volumes {
    /// No volumes yet, to be made below `dir`.
    pub(super) fn new(dir: PathBuf) -> Self {
        Self { dir, paths: BTreeMap::new(), folders: BTreeMap::new() }
    }

    /// Makes every volume of the pod, or brings those made of objects up to date.
    ///
    /// # Errors
    /// A sentence as a kubelet puts it into a `FailedMount` event.
    pub(super) async fn prepare(
        &mut self,
        pod: &Pod,
        addresses: &Addresses,
        host: &HostFiles,
        lookup: &Lookup,
    ) -> Result<(), String> {
        for volume in pod.spec.iter().flat_map(|s| s.volumes.iter().flatten()) {
            let failed = |why| format!("MountVolume.SetUp failed for volume {:?}: {why}", volume.name);
            if let Some(payload) = lookup.volume(volume, pod, addresses).await.map_err(failed)? {
                let path = self.dir.join(&volume.name);
                let folder = self.folders.entry(volume.name.clone()).or_insert_with(|| Folder::new(path.clone()));
                folder.write(payload).map_err(failed)?;
                self.paths.insert(volume.name.clone(), path);
            } else if self.paths.contains_key(&volume.name) {
                continue;
            } else if let Some(source) = &volume.persistent_volume_claim {
                let source = lookup.claimed(&source.claim_name).await.map_err(failed)?;
                self.paths.insert(volume.name.clone(), host.find(&source).map_err(failed)?);
            } else {
                let path = make(&self.dir, volume, host).map_err(failed)?;
                self.paths.insert(volume.name.clone(), path);
            }
        }
        Ok(())
    }

    /// What a container sees of them, parents before children.
    ///
    /// # Errors
    /// A sentence as a kubelet puts it into `CreateContainerConfigError`.
    pub(super) fn mounts(&self, container: &Container) -> Result<Vec<Mount>, String> {
        let mut mounts = Vec::new();
        for wanted in container.volume_mounts.iter().flatten() {
            if wanted.sub_path_expr.is_some() {
                return Err("subPathExpr is not supported by the process kubelet".into());
            }
            let volume = self.paths.get(&wanted.name).ok_or_else(|| format!("volume {:?} not found", wanted.name))?;
            let source = match wanted.sub_path.as_deref() {
                None | Some("") => volume.clone(),
                Some(sub) => inside(volume, sub)?,
            };
            mounts.push(Mount {
                source,
                target: PathBuf::from(&wanted.mount_path),
                read_only: wanted.read_only == Some(true),
            });
        }
        mounts.sort_by(|a, b| a.target.cmp(&b.target));
        Ok(mounts)
    }
}

/// A path below a volume, made as a directory where it is missing.
fn inside(volume: &Path, sub: &str) -> Result<PathBuf, String> {
    let path = volume.join(sub);
    if !path.exists() {
        fs::create_dir_all(&path).map_err(|e| format!("create subPath {sub:?}: {e}"))?;
    }
    let (root, path) = (volume.canonicalize(), path.canonicalize());
    match (root, path) {
        (Ok(root), Ok(path)) if path.starts_with(&root) => Ok(path),
        _ => Err(format!("subPath {sub:?} leaves the volume")),
    }
}

/// Makes a volume that is not made of objects.
fn make(dir: &Path, volume: &Volume, host: &HostFiles) -> Result<PathBuf, String> {
    if let Some(source) = &volume.host_path {
        return host.find(source);
    }
    if volume.empty_dir.is_some() {
        let path = dir.join(&volume.name);
        return fs::create_dir_all(&path).map(|()| path).map_err(|e| e.to_string());
    }
    Err("this kind of volume is not supported by the process kubelet".into())
}

impl HostFiles {
    /// The path of this machine for a hostPath volume, checked or made as its type asks.
    fn find(&self, source: &HostPathVolumeSource) -> Result<PathBuf, String> {
        let kind = source.type_.as_deref().unwrap_or_default();
        let creates = matches!(kind, "DirectoryOrCreate" | "FileOrCreate");
        let wanted = Path::new(&source.path);
        let path = self.remap(wanted, creates);
        if creates && !path.exists() {
            let parent = path.parent().unwrap_or(&path);
            let made = if kind == "FileOrCreate" {
                fs::create_dir_all(parent).and_then(|()| fs::write(&path, ""))
            } else {
                fs::create_dir_all(&path)
            };
            made.map_err(|e| format!("hostPath {}: {e}", source.path))?;
        }
        let is_right = match kind {
            "Directory" | "DirectoryOrCreate" => path.is_dir(),
            "File" | "FileOrCreate" => path.is_file(),
            // A device or socket may be doubled by a file.
            _ => path.exists(),
        };
        if is_right { Ok(path) } else { Err(format!("hostPath type check failed: {} is not a {kind}", source.path)) }
    }

    /// The longest remapping of a path or a parent wins; without one, what would be created is the node's own.
    fn remap(&self, wanted: &Path, creates: bool) -> PathBuf {
        let fitting = self.remapped.iter().filter(|(from, _)| wanted.starts_with(from));
        match fitting.max_by_key(|(from, _)| from.components().count()) {
            Some((from, to)) => match wanted.strip_prefix(from) {
                Ok(rest) if rest.as_os_str().is_empty() => to.clone(),
                Ok(rest) => to.join(rest),
                Err(_) => to.clone(),
            },
            None if creates => self.root.join(wanted.strip_prefix("/").unwrap_or(wanted)),
            None => wanted.to_owned(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host(root: &Path) -> HostFiles {
        let remapped = BTreeMap::from([("/dev/kmsg".into(), root.join("kmsg")), ("/data".into(), root.join("data"))]);
        HostFiles { root: root.join("node"), remapped }
    }

    fn find(host: &HostFiles, path: &str, kind: Option<&str>) -> Result<PathBuf, String> {
        host.find(&HostPathVolumeSource { path: path.into(), type_: kind.map(Into::into) })
    }

    #[test]
    fn a_created_host_path_is_the_nodes_own() {
        let dir = tempfile::tempdir().expect("a directory");
        let host = host(dir.path());
        let made = find(&host, "/var/lib/berth-never", Some("DirectoryOrCreate")).expect("made");
        assert_eq!(made, dir.path().join("node/var/lib/berth-never"));
        assert!(made.is_dir() && !Path::new("/var/lib/berth-never").exists());
    }

    #[test]
    fn remapped_host_paths_are_shown_instead_of_the_machines() {
        let dir = tempfile::tempdir().expect("a directory");
        let host = host(dir.path());
        assert!(find(&host, "/dev/kmsg", Some("CharDevice")).is_err(), "nothing there yet");
        fs::write(dir.path().join("kmsg"), "").expect("written");
        assert_eq!(find(&host, "/dev/kmsg", None), Ok(dir.path().join("kmsg")));
        let below = find(&host, "/data/a", Some("DirectoryOrCreate"));
        assert_eq!(below, Ok(dir.path().join("data/a")));
        assert_eq!(find(&host, "/proc", Some("Directory")), Ok("/proc".into()));
    }
}
