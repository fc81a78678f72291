//! Builds and finds the binaries of the control plane: `cluster` (etcd, API server, controller manager,
//! scheduler, kubectl), `container` (one container as local processes) and `helm`.
//!
//! They take minutes to build, so they live in a cache outside the cargo target, under a hash of everything
//! that decides what they are; a clean checkout finds them again. Must never leave half a build where another
//! test could find it, and must never build twice at the same time.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use sha2::{Digest as _, Sha256};

use crate::{Error, Result};

/// The Kubernetes release of go.mod; clients refuse a server that does not know its own version.
pub const KUBERNETES_VERSION: &str = "v1.36.3";
const HELM_VERSION: &str = "v3.22.0";

/// The built binaries. Cheap to clone.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClusterTool {
    dir: PathBuf,
}

impl ClusterTool {
    /// Finds the binaries in the cache, or builds them there: at most 10 minutes on two cores with an empty Go
    /// cache, seconds with a warm one. A second caller waits for the first. Blocks the thread.
    ///
    /// The cache is `$BERTH_TOOLS_DIR`, else `$XDG_CACHE_HOME/berth`, else `~/.cache/berth`.
    ///
    /// # Errors
    /// When Go is not installed, the build does not succeed, or the cache cannot be written.
    pub fn locate() -> Result<Self> {
        Self::locate_in(&cache_root().join("cluster"))
    }

    fn locate_in(cache: &Path) -> Result<Self> {
        let module = module_dir();
        let dir = cache.join(fingerprint(&module)?);
        let tool = Self { dir };
        if tool.is_complete() {
            return Ok(tool);
        }
        fs::create_dir_all(cache).map_err(Error::file("create", cache))?;
        let lock_path = cache.join("lock");
        let lock = File::create(&lock_path).map_err(Error::file("create", &lock_path))?;
        lock.lock().map_err(Error::file("lock", &lock_path))?;
        if !tool.is_complete() {
            build(&module, &tool.dir)?;
        }
        Ok(tool)
    }

    /// The multi-call binary of the control plane; its first argument names the component.
    #[must_use]
    pub fn cluster(&self) -> PathBuf {
        self.dir.join("cluster")
    }

    /// The binary that runs one container.
    #[must_use]
    pub fn container(&self) -> PathBuf {
        self.dir.join("container")
    }

    /// The helm binary.
    #[must_use]
    pub fn helm(&self) -> PathBuf {
        self.dir.join("helm")
    }

    /// The folder with all of them and `kubectl`: put it on a PATH to use them by hand.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    fn is_complete(&self) -> bool {
        // The folder appears in one step, so that one of its files speaks for all.
        self.helm().exists()
    }
}

/// Builds everything beside `dir` and then moves it there in one step.
fn build(module: &Path, dir: &Path) -> Result<()> {
    let part = dir.with_extension("part");
    if part.exists() {
        fs::remove_dir_all(&part).map_err(Error::file("remove", &part))?;
    }
    fs::create_dir_all(&part).map_err(Error::file("create", &part))?;
    say("building the test control plane, kubectl and helm (once; about 7 minutes on two cores)");
    let mut out = part.clone().into_os_string();
    out.push("/");
    let status = Command::new("go")
        .args(["build", "-trimpath", "-ldflags", &link_flags(), "-o"])
        .arg(out)
        .args([".", "./container", "helm.sh/helm/v3/cmd/helm"])
        .current_dir(module)
        .env("CGO_ENABLED", "0")
        .stdin(Stdio::null())
        .status()
        .map_err(|source| Error::Start { program: "go".into(), source })?;
    if !status.success() {
        return Err(Error::Command {
            command: format!("go build in {}", module.display()),
            status: status.to_string(),
            stderr: "see its output above".into(),
        });
    }
    let kubectl = part.join("kubectl");
    std::os::unix::fs::symlink("cluster", &kubectl).map_err(Error::file("link", &kubectl))?;
    fs::rename(&part, dir).map_err(Error::file("rename", &part))
}

fn link_flags() -> String {
    let mut numbers = KUBERNETES_VERSION.trim_start_matches('v').split('.');
    let (major, minor) = (numbers.next().unwrap_or("0"), numbers.next().unwrap_or("0"));
    let version = "k8s.io/component-base/version";
    format!(
        "-s -w -X {version}.gitVersion={KUBERNETES_VERSION} -X {version}.gitMajor={major} -X {version}.gitMinor={minor} \
         -X k8s.io/client-go/pkg/version.gitVersion={KUBERNETES_VERSION} \
         -X helm.sh/helm/v3/internal/version.version={HELM_VERSION}"
    )
}

/// A hash of the module's files, the Go release and the flags: 16 hexadecimal digits.
fn fingerprint(module: &Path) -> Result<String> {
    let go = Command::new("go")
        .arg("version")
        .current_dir(module)
        .output()
        .map_err(|source| Error::Start { program: "go (https://go.dev/dl, 1.26 or newer)".into(), source })?;
    let mut hash = Sha256::new();
    hash.update(&go.stdout);
    hash.update(link_flags());
    for (name, content) in sources(module)? {
        hash.update(name);
        hash.update([0]);
        hash.update(content);
        hash.update([0]);
    }
    Ok(hash.finalize().iter().take(8).map(|byte| format!("{byte:02x}")).collect())
}

/// The module's go.mod, go.sum and Go files, by path.
fn sources(module: &Path) -> Result<BTreeMap<String, Vec<u8>>> {
    let mut found = BTreeMap::new();
    for dir in [module.to_owned(), module.join("container")] {
        for entry in fs::read_dir(&dir).map_err(Error::file("list", &dir))? {
            let path = entry.map_err(Error::file("list", &dir))?.path();
            if path.extension().is_some_and(|e| e == "go" || e == "mod" || e == "sum") {
                let content = fs::read(&path).map_err(Error::file("read", &path))?;
                found.insert(path.strip_prefix(module).unwrap_or(&path).display().to_string(), content);
            }
        }
    }
    Ok(found)
}

fn module_dir() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("cluster")
}

/// Where built and downloaded tools are kept.
pub(crate) fn cache_root() -> PathBuf {
    let dir = |name| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    dir("BERTH_TOOLS_DIR")
        .or_else(|| Some(dir("XDG_CACHE_HOME")?.join("berth")))
        .or_else(|| Some(dir("HOME")?.join(".cache/berth")))
        .unwrap_or_else(|| std::env::temp_dir().join("berth"))
}

/// Tells whoever waits what takes so long.
fn say(line: &str) {
    // Nobody to tell is no reason to stop.
    let _ = writeln!(std::io::stderr(), "{line}");
}
