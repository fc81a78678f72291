//! What every part's door does first: logs that say who speaks, and traces where an OTLP endpoint is named.

use berth_runtime::telemetry::{self, LogFormat, Process};
use sha2::{Digest, Sha256};

/// Where steps of decisions go.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct TraceArgs {
    /// OTLP endpoint (gRPC) that traces of decisions are exported to, as http://<host>:4317; empty = none are
    #[arg(long, env = "BERTH_OTLP_ENDPOINT", default_value = "")]
    pub(crate) otlp_endpoint: String,
}

/// Begins logs and metrics of a part; `names` are what names this process.
pub(crate) fn begin(part: &'static str, names: Vec<(&'static str, String)>, log: &str) -> anyhow::Result<()> {
    let config = hash(std::env::args().skip(1), std::env::vars());
    Ok(telemetry::init(Process { part, names, config }, log, LogFormat::detect())?)
}

/// Variables that name one process and say nothing of how it is configured.
const OWN: [&str; 6] =
    ["BERTH_POD_NAME", "BERTH_POD_NAMESPACE", "BERTH_POD_IP", "BERTH_NODE_NAME", "BERTH_LISTEN", "BERTH_ADMIN_LISTEN"];

/// Hash of arguments and of the `BERTH_*` variables: 16 hexadecimal digits, equal in pods that were told the same.
fn hash(arguments: impl Iterator<Item = String>, variables: impl Iterator<Item = (String, String)>) -> String {
    let mut told: Vec<_> =
        variables.filter(|(name, _)| name.starts_with("BERTH_") && !OWN.contains(&name.as_str())).collect();
    told.sort();
    let mut hash = Sha256::new();
    let lines = arguments.chain(told.into_iter().map(|(name, value)| format!("{name}={value}")));
    for line in lines {
        hash.update(line);
        hash.update([0]);
    }
    hash.finalize().iter().take(8).map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pods_that_were_told_the_same_have_the_same_hash() {
        let of = |pod: &str, log: &str| {
            let variables = [("BERTH_LOG", log), ("BERTH_POD_NAME", pod), ("HOSTNAME", pod), ("BERTH_POD_IP", pod)];
            let variables = variables.map(|(name, value)| (name.to_owned(), value.to_owned()));
            hash(["scheduler".to_owned()].into_iter(), variables.into_iter())
        };
        assert_eq!(of("a", "info"), of("b", "info"));
        assert_ne!(of("a", "info"), of("a", "debug"));
        assert_eq!(of("a", "info").len(), 16);
    }
}
