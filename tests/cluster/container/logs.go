package main

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"
)

// serveLogs is the part of a kubelet's server that `kubectl logs` needs, at each of the addresses: the file
// <dir>/<namespace>_<pod>/<container>.log. Ends when its standard input closes.
func serveLogs(dir string, addresses []string) error {
	certificate, err := selfSigned()
	if err != nil {
		return err
	}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /containerLogs/{namespace}/{pod}/{container}", func(w http.ResponseWriter, r *http.Request) {
		file, err := os.Open(filepath.Join(dir, r.PathValue("namespace")+"_"+r.PathValue("pod"), r.PathValue("container")+".log"))
		if err != nil {
			http.Error(w, "no log: the container never started", http.StatusNotFound)
			return
		}
		defer file.Close()
		if err := sendLog(w, r, file); err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
		}
	})
	failed := make(chan error, len(addresses)+1)
	for _, address := range addresses {
		server := &http.Server{
			Addr:              address,
			Handler:           plainNames(mux),
			ReadHeaderTimeout: 10 * time.Second,
			TLSConfig:         &tls.Config{Certificates: []tls.Certificate{certificate}, MinVersion: tls.VersionTLS12},
		}
		go func() { failed <- server.ListenAndServeTLS("", "") }()
	}
	go func() {
		_, _ = io.Copy(io.Discard, os.Stdin)
		failed <- nil
	}()
	return <-failed
}

// plainNames refuses names that would leave the log folder.
func plainNames(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if strings.Contains(r.URL.Path, "..") {
			http.Error(w, "a name with dots", http.StatusBadRequest)
			return
		}
		next.ServeHTTP(w, r)
	})
}

// sendLog sends the file from where tailLines says, and what is added to it while the client follows.
func sendLog(w http.ResponseWriter, r *http.Request, file *os.File) error {
	content, err := io.ReadAll(file)
	if err != nil {
		return err
	}
	if wanted := r.URL.Query().Get("tailLines"); wanted != "" {
		lines, err := strconv.Atoi(wanted)
		if err != nil || lines < 0 {
			return fmt.Errorf("tailLines %q is not a number of lines", wanted)
		}
		content = tail(content, lines)
	}
	w.Header().Set("Content-Type", "text/plain")
	_, _ = w.Write(content)
	follows := r.URL.Query().Get("follow") == "true"
	for follows && r.Context().Err() == nil {
		if flusher, ok := w.(http.Flusher); ok {
			flusher.Flush()
		}
		if n, err := io.Copy(w, file); err != nil || n == 0 {
			time.Sleep(100 * time.Millisecond)
		}
	}
	return nil
}

// tail returns the last lines of content.
func tail(content []byte, lines int) []byte {
	at := len(content)
	for at > 0 {
		if content[at-1] == '\n' && at != len(content) {
			if lines--; lines == 0 {
				return content[at:]
			}
		}
		at--
	}
	if lines == 0 {
		return nil
	}
	return content
}

// selfSigned makes a certificate that nobody checks: an API server without a CA for kubelets takes any.
func selfSigned() (tls.Certificate, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return tls.Certificate{}, err
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1),
		NotBefore:    time.Now().Add(-time.Hour),
		NotAfter:     time.Now().Add(24 * time.Hour),
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		return tls.Certificate{}, err
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}, nil
}

// logsMain reads the arguments of `container serve-logs DIR ADDRESS...`.
func logsMain(args []string) error {
	if len(args) < 2 {
		return errors.New("usage: container serve-logs DIR ADDRESS...")
	}
	return serveLogs(args[0], args[1:])
}
