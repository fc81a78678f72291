//! Real control plane, process kubelet, doubles, scenarios: what Berth is tested and demonstrated on.
//!
//! ```text
//! ClusterTool --binaries--> ControlPlane --kubeconfig--> tests, helm, the parts of Berth
//!                                |                            ^ bound pods, as local processes
//!                                +---watches, statuses--- ProcessKubelet
//! ```
//!
//! Nothing here may be used by a part of Berth, and nothing here may outlive the process that started it.

pub mod address;
pub mod bench;
pub mod cluster_tool;
pub mod collector;
pub mod control_plane;
pub mod demo;
mod error;
pub mod etcd;
pub mod process_kubelet;
pub mod prometheus;
pub mod rights;
pub mod tied_process;

pub use cluster_tool::ClusterTool;
pub use control_plane::ControlPlane;
pub use error::{Error, Result};
pub use etcd::EtcdServer;
pub use process_kubelet::ProcessKubelet;
