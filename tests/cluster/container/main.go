// Command container runs one container of a simulated pod as local processes: `container run SPEC` starts the
// program that SPEC describes in a mount and a process namespace of its own, so that it finds its volumes at
// the paths the pod says, and so that the kernel ends everything it started when its first process ends.
//
// It passes on signals and the exit status, and it must never outlive whoever started it: its standard input
// is a pipe, and when that closes (the kernel closes it for a parent that ended in any way) all is killed.
//
// `container serve-logs` is the small rest of a kubelet's server that `kubectl logs` asks.
//
//	caller --stdin pipe--> run --namespaces, death signal--> init = exec ==> the container's program, pid 1
package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"syscall"
)

// startError is what `run` exits with when the program never started, as container runtimes do.
const startError = 128

// Spec says what to run; the caller writes it as JSON.
type Spec struct {
	// Command is the program and its arguments; Program, when not empty, is the file run under that name.
	Command []string `json:"command"`
	Program string   `json:"program"`
	// Dir is the working directory inside the container.
	Dir string `json:"dir"`
	// Env is the whole environment, as KEY=VALUE.
	Env []string `json:"env"`
	// Mounts are host files and directories to show inside, parents before children.
	Mounts []Mount `json:"mounts"`
	// Root is an empty host directory, used when the root directory itself needs a new entry.
	Root string `json:"root"`
	// State is the file that receives a State once the program runs, or did not start.
	State string `json:"state"`
}

// State tells the caller what came of a Spec.
type State struct {
	Pid   int    `json:"pid,omitempty"`
	Error string `json:"error,omitempty"`
}

func main() {
	runtime.LockOSThread() // the death signal of a child follows the thread that started it
	if len(os.Args) > 1 && os.Args[1] == "serve-logs" {
		if err := logsMain(os.Args[2:]); err != nil {
			fail(err.Error())
		}
		return
	}
	if len(os.Args) != 3 {
		fail("usage: container run SPEC | container serve-logs DIR ADDRESS...")
	}
	spec, err := readSpec(os.Args[2])
	if err != nil {
		fail(err.Error())
	}
	switch os.Args[1] {
	case "run":
		os.Exit(run(spec, os.Args[2]))
	case "init":
		err := enter(spec)
		fmt.Fprint(os.NewFile(3, "errors"), err)
		os.Exit(startError)
	default:
		fail(fmt.Sprintf("unknown verb %q", os.Args[1]))
	}
}

func readSpec(path string) (*Spec, error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	spec := &Spec{}
	if err := json.Unmarshal(text, spec); err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	if len(spec.Command) == 0 {
		return nil, fmt.Errorf("%s: command is empty", path)
	}
	return spec, nil
}

// run starts the program, says so in the state file, and returns its exit status once it ended.
func run(spec *Spec, path string) int {
	errorsRead, errorsWrite, err := os.Pipe()
	if err != nil {
		fail(err.Error())
	}
	child := exec.Command("/proc/self/exe", "init", path)
	child.Stdout, child.Stderr = os.Stdout, os.Stderr
	child.ExtraFiles = []*os.File{errorsWrite}
	child.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags: syscall.CLONE_NEWPID | syscall.CLONE_NEWNS,
		Pdeathsig:  syscall.SIGKILL,
		Setsid:     true,
	}
	signals := make(chan os.Signal, 16)
	signal.Notify(signals, syscall.SIGTERM, syscall.SIGINT, syscall.SIGHUP, syscall.SIGQUIT, syscall.SIGUSR1, syscall.SIGUSR2)
	if err := child.Start(); err != nil {
		if errors.Is(err, syscall.EPERM) {
			err = fmt.Errorf("%w: mount and process namespaces need root with CAP_SYS_ADMIN", err)
		}
		writeState(spec, State{Error: err.Error()})
		return startError
	}
	go killWithCaller(child.Process)
	errorsWrite.Close()
	if text, _ := io.ReadAll(errorsRead); len(text) > 0 {
		_ = child.Wait()
		writeState(spec, State{Error: string(text)})
		return startError
	}
	writeState(spec, State{Pid: child.Process.Pid})
	go func() {
		for s := range signals {
			_ = child.Process.Signal(s)
		}
	}()
	_ = child.Wait()
	return exitStatus(child.ProcessState)
}

// killWithCaller kills the container when nobody holds the other end of standard input any more.
func killWithCaller(process *os.Process) {
	_, _ = io.Copy(io.Discard, os.Stdin)
	_ = process.Kill()
}

func exitStatus(state *os.ProcessState) int {
	status, ok := state.Sys().(syscall.WaitStatus)
	if ok && status.Signaled() {
		return 128 + int(status.Signal())
	}
	return state.ExitCode()
}

// writeState replaces the state file in one step, so that a reader never sees half of it.
func writeState(spec *Spec, state State) {
	text, _ := json.Marshal(state)
	part := filepath.Join(filepath.Dir(spec.State), ".state")
	err := os.WriteFile(part, text, 0o644)
	if err == nil {
		err = os.Rename(part, spec.State)
	}
	if err != nil {
		fail(err.Error())
	}
}

func fail(message string) {
	fmt.Fprintln(os.Stderr, "container:", message)
	os.Exit(startError)
}
