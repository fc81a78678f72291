// Command cluster is a whole Kubernetes control plane in one binary: its first argument names the component
// to be (etcd, kube-apiserver, kube-controller-manager, kube-scheduler, kubectl; or keys, which makes their
// certificates), the rest is for that component. It may also be called by a component's name, through a link.
//
// It must never outlive whoever started it: with BERTH_EXIT_ON_STDIN_EOF set it ends as soon as its standard
// input closes, which the kernel does for a parent that ended in any way, kill -9 included.
package main

import (
	"fmt"
	"io"
	"os"
	"path/filepath"
	_ "time/tzdata" // CronJob time zones

	"github.com/spf13/cobra"
	"go.etcd.io/etcd/server/v3/etcdmain"
	_ "k8s.io/client-go/plugin/pkg/client/auth" // kubectl's ways to log in
	"k8s.io/component-base/cli"
	"k8s.io/component-base/logs"
	_ "k8s.io/component-base/logs/json/register"
	_ "k8s.io/component-base/metrics/prometheus/clientgo"
	_ "k8s.io/component-base/metrics/prometheus/version"
	kubectl "k8s.io/kubectl/pkg/cmd"
	kubectlutil "k8s.io/kubectl/pkg/cmd/util"
	apiserver "k8s.io/kubernetes/cmd/kube-apiserver/app"
	controllers "k8s.io/kubernetes/cmd/kube-controller-manager/app"
	scheduler "k8s.io/kubernetes/cmd/kube-scheduler/app"
)

// exitOnStdinEOF is the variable that ties this process to the one holding the other end of its stdin.
const exitOnStdinEOF = "BERTH_EXIT_ON_STDIN_EOF"

// components maps a name to what runs it; each takes its arguments from os.Args.
var components = map[string]func(){
	"etcd":                    func() { etcdmain.Main(os.Args) },
	"kube-apiserver":          serve(apiserver.NewAPIServerCommand),
	"kube-controller-manager": serve(controllers.NewControllerManagerCommand),
	"kube-scheduler":          serve(func() *cobra.Command { return scheduler.NewSchedulerCommand() }),
	"kubectl":                 runKubectl,
	"keys":                    writeKeys,
}

func main() {
	name := filepath.Base(os.Args[0])
	if _, known := components[name]; !known {
		if len(os.Args) < 2 {
			usage("no component named")
		}
		name = os.Args[1]
		os.Args = append([]string{name}, os.Args[2:]...)
	}
	run, known := components[name]
	if !known {
		usage(fmt.Sprintf("unknown component %q", name))
	}
	if os.Getenv(exitOnStdinEOF) != "" {
		go exitWithParent()
	}
	run()
}

// exitWithParent ends this process when nobody holds the other end of standard input any more.
func exitWithParent() {
	_, _ = io.Copy(io.Discard, os.Stdin)
	os.Exit(1)
}

// serve runs a long-lived component as its own main function does.
func serve(command func() *cobra.Command) func() {
	return func() { os.Exit(cli.Run(command())) }
}

// runKubectl runs kubectl as its own main function does.
func runKubectl() {
	_, _ = logs.GlogSetter(kubectl.GetLogVerbosity(os.Args))
	if err := cli.RunNoErrOutput(kubectl.NewDefaultKubectlCommand()); err != nil {
		kubectlutil.CheckErr(err)
	}
}

func usage(problem string) {
	fmt.Fprintf(os.Stderr, "cluster: %s; name one of etcd, kube-apiserver, kube-controller-manager, kube-scheduler, kubectl\n", problem)
	os.Exit(2)
}
