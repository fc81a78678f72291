//! The pages that speak as vendors' exporters do: everything that is said to be served is, with the labels that boards
//! made for the exporters ask for.

use std::time::Duration;

use berth_agent::vitals::{dcgm, npu};
use berth_tests::{demo::objects, prometheus::Target};

use super::Watched;

/// Longest time until everything was measured and scraped.
const PATIENCE: Duration = Duration::from_secs(60);

/// What Grafana's board for dcgm-exporter, number 12239, asks for, but for the tensor pipe's counter; and labels that
/// other boards select by.
const QUERIES: [&str; 8] = [
    "avg(DCGM_FI_DEV_GPU_TEMP{instance=~\".+\",gpu=~\"[0-9]+\"})",
    "sum(DCGM_FI_DEV_POWER_USAGE{instance=~\".+\",gpu=~\"[0-9]+\"})",
    "DCGM_FI_DEV_SM_CLOCK{instance=~\".+\",gpu=~\"[0-9]+\"} * 1000000",
    "DCGM_FI_DEV_GPU_UTIL{instance=~\".+\",gpu=~\"[0-9]+\"}",
    "DCGM_FI_DEV_FB_USED{instance=~\".+\",gpu=~\"[0-9]+\"}",
    "DCGM_FI_DEV_GPU_TEMP{UUID!=\"\",device=~\"nvidia[0-9]+\",modelName!=\"\",Hostname!=\"\",pci_bus_id=~\"[0-9A-F:.]+\"}",
    "npu_chip_info_health_status{id=~\"[0-9]+\",model_name=~\".+-Ascend-.+\"} == 1",
    "sum(machine_npu_nums) > 0",
];

/// What a monitor scrapes of an agent besides its own metrics.
pub(super) fn target(agent: &Target, page: &str) -> Target {
    let mut labels = agent.labels.clone();
    labels.insert("job".to_owned(), format!("agent-{page}"));
    labels.insert("__metrics_path__".to_owned(), format!("/metrics/{page}"));
    Target { address: agent.address, labels }
}

/// Every name has a value, and what boards ask for is answered.
pub(super) async fn boards_for_vendors_exporters_go_on_showing(watched: &Watched) {
    let dcgm = dcgm::COUNTERS.iter().map(|(name, ..)| *name);
    let npu = npu::GAUGES.iter().map(|(name, ..)| *name);
    let names: Vec<&str> =
        dcgm.chain(npu).chain(["npu_chip_info_error_code", "npu_chip_info_name"]).chain(QUERIES).collect();
    let answered = objects::wait_for("an answer to every query of the vendors' boards", PATIENCE, || async {
        let mut missing = Vec::new();
        for query in &names {
            if watched.prometheus.query(query).await?.is_empty() {
                missing.push(*query);
            }
        }
        Ok(if missing.is_empty() { Ok(()) } else { Err(format!("{missing:?}")) })
    });
    answered.await.unwrap_or_else(|error| panic!("{error}"));
    super::say(&format!("{} names and queries of vendors' exporters have values", names.len()));
}
