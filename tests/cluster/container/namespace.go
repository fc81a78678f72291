package main

import (
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// Mount shows the host's Source at Target inside the container. Both exist or can be made; a file is
// mounted on a file, a directory on a directory.
type Mount struct {
	Source   string `json:"source"`
	Target   string `json:"target"`
	ReadOnly bool   `json:"read_only"`
}

// enter turns this process, already alone in new namespaces, into the container's program. It returns only
// when it could not.
func enter(spec *Spec) error {
	unix.CloseOnExec(3)
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("make mounts private: %w", err)
	}
	for _, mount := range spec.Mounts {
		if err := bind(spec, mount); err != nil {
			return fmt.Errorf("mount %s at %s: %w", mount.Source, mount.Target, err)
		}
	}
	if err := unix.Mount("proc", "/proc", "proc", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, ""); err != nil {
		return fmt.Errorf("mount /proc: %w", err)
	}
	dir := spec.Dir
	if dir == "" {
		dir = "/"
	}
	if err := os.Chdir(dir); err != nil {
		return err
	}
	os.Clearenv()
	for _, entry := range spec.Env {
		key, value, _ := strings.Cut(entry, "=")
		if err := os.Setenv(key, value); err != nil {
			return fmt.Errorf("environment variable %q: %w", key, err)
		}
	}
	program := spec.Program
	if program == "" {
		found, err := exec.LookPath(spec.Command[0])
		if err != nil {
			return err
		}
		program = found
	}
	if err := unix.Exec(program, spec.Command, os.Environ()); err != nil {
		return fmt.Errorf("exec %q: %w", program, err)
	}
	return nil
}

// bind makes one mount, after giving its target a place to be.
func bind(spec *Spec, mount Mount) error {
	source, err := os.Stat(mount.Source)
	if err != nil {
		return err
	}
	// The source is held open, so that mounts over its path do not hide it.
	handle, err := unix.Open(mount.Source, unix.O_PATH|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(handle)
	target, err := place(spec, mount.Target, source.IsDir())
	if err != nil {
		return err
	}
	if err := unix.Mount(fmt.Sprintf("/proc/self/fd/%d", handle), target, "", unix.MS_BIND|unix.MS_REC, ""); err != nil {
		return err
	}
	if mount.ReadOnly {
		return unix.Mount("", target, "", unix.MS_BIND|unix.MS_REMOUNT|unix.MS_RDONLY, "")
	}
	return nil
}

// place returns the target with links resolved, made to exist. What is missing is made in a private copy of
// the deepest directory that exists: never on the host.
func place(spec *Spec, target string, isDir bool) (string, error) {
	existing, missing := filepath.Clean(target), ""
	for {
		if resolved, err := filepath.EvalSymlinks(existing); err == nil {
			existing = resolved
			break
		}
		missing = filepath.Join(filepath.Base(existing), missing)
		existing = filepath.Dir(existing)
	}
	if missing == "" {
		return existing, nil
	}
	if err := makePrivate(spec, existing); err != nil {
		return "", fmt.Errorf("private copy of %s: %w", existing, err)
	}
	full := filepath.Join(existing, missing)
	if isDir {
		return full, os.MkdirAll(full, 0o755)
	}
	if err := os.MkdirAll(filepath.Dir(full), 0o755); err != nil {
		return "", err
	}
	return full, os.WriteFile(full, nil, 0o644)
}

// private holds the mounts that makePrivate laid over directories of the host.
var private = map[uint64]bool{}

// makePrivate lays a tmpfs over dir that shows everything dir showed, and that may be added to. Does nothing
// when dir already lies in such a tmpfs.
func makePrivate(spec *Spec, dir string) error {
	if id, err := mountID(dir); err != nil || private[id] {
		return err
	}
	original, err := unix.Open(dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(original)
	over := dir
	if dir == "/" {
		over = spec.Root // a mount over "/" is not seen by a process whose root is below it
	}
	if err := unix.Mount("tmpfs", over, "tmpfs", 0, "mode=0755"); err != nil {
		return err
	}
	id, err := mountID(over)
	if err != nil {
		return err
	}
	private[id] = true
	if err := mirror(fmt.Sprintf("/proc/self/fd/%d", original), over); err != nil {
		return err
	}
	if dir != "/" {
		return nil
	}
	if err := unix.Chroot(over); err != nil {
		return err
	}
	return os.Chdir("/")
}

// mountID names the mount that path lies on.
func mountID(path string) (uint64, error) {
	var stat unix.Statx_t
	if err := unix.Statx(unix.AT_FDCWD, path, 0, unix.STATX_MNT_ID, &stat); err != nil {
		return 0, fmt.Errorf("statx %s: %w", path, err)
	}
	return stat.Mnt_id, nil
}

// mirror fills the empty directory into with binds of everything in from.
func mirror(from, into string) error {
	entries, err := os.ReadDir(from)
	if err != nil {
		return err
	}
	for _, entry := range entries {
		if err := mirrorEntry(filepath.Join(from, entry.Name()), filepath.Join(into, entry.Name()), entry.Type()); err != nil {
			return err
		}
	}
	return nil
}

func mirrorEntry(source, target string, kind fs.FileMode) error {
	if kind&fs.ModeSymlink != 0 {
		link, err := os.Readlink(source)
		if err != nil {
			return err
		}
		return os.Symlink(link, target)
	}
	var err error
	if kind.IsDir() {
		err = os.Mkdir(target, 0o755)
	} else {
		err = os.WriteFile(target, nil, 0o644)
	}
	if err != nil {
		return err
	}
	return unix.Mount(source, target, "", unix.MS_BIND|unix.MS_REC, "")
}
