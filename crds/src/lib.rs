//! Kubernetes objects of the group berth.dev.
