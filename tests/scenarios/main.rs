//! Scenarios on a real control plane.

use berth_tests::control_plane::{ControlPlane, ControlPlaneConfig};

#[tokio::test]
async fn control_plane_serves() {
    let plane = ControlPlane::start(ControlPlaneConfig::named("scenarios")).await.unwrap();
    println!("{}", plane.kubectl(&["get", "ns,sa", "-A"]).await.unwrap());
    println!("{}", plane.kubectl(&["version"]).await.unwrap());
    println!("{}", plane.helm(&["version"]).await.unwrap());
    println!("{}", plane.helm(&["list"]).await.unwrap());
}
