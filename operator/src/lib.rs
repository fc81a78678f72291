//! Keeps Kubernetes objects true.
