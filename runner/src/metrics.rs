//! Every metric of the runner. Values are read from the engine and the client when somebody asks, so that nothing on
//! the way of a token counts twice.

use std::fmt;

use berth_runtime::telemetry::{Described, Metrics};
use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeMetric},
    metrics::{counter::ConstCounter, gauge::ConstGauge},
};

use crate::{engine::Engine, experts::Experts, num::f64_of_u64};

/// All of them.
pub const METRICS: &[Described] = &[
    ACCEPTED,
    REFUSED,
    FAILED,
    RETRIED,
    STEPS,
    TOKENS,
    SEQUENCES,
    WAITING,
    CACHE,
    CALLS,
    CALLS_REFUSED,
    CALLS_RETRIED,
    FIRST_REFUSED,
    REROUTED,
    REVISION,
    OLDEST,
    GONE,
];

const ACCEPTED: Described = Described::counter("requests_accepted", &[], "Requests that were accepted");
const REFUSED: Described = Described::counter("requests_refused", &[], "Requests that were refused at the door");
const FAILED: Described =
    Described::counter("requests_failed", &[], "Requests that ended with an error after they were accepted");
const RETRIED: Described =
    Described::counter("requests_retried", &[], "Requests that needed at least one retried expert call");
const STEPS: Described = Described::counter("steps", &[], "Model steps finished");
const TOKENS: Described = Described::counter("tokens", &[], "Tokens generated");
const SEQUENCES: Described = Described::gauge("sequences", &[], "Sequences being generated");
const WAITING: Described = Described::gauge("requests_waiting", &[], "Requests waiting for room");
const CACHE: Described =
    Described::gauge("cache_reserved_bytes", &[], "Bytes of KV cache that running sequences have reserved");
const CALLS: Described = Described::counter("expert_calls", &[], "Expert calls sent to workers");
const CALLS_REFUSED: Described =
    Described::counter("expert_calls_refused", &[], "Expert calls that a worker refused or that broke");
const CALLS_RETRIED: Described =
    Described::counter("expert_calls_retried", &[], "Expert calls made again on another replica");
const FIRST_REFUSED: Described = Described::gauge(
    "first_refused_timestamp_seconds",
    &[],
    "Wall clock at which the first expert call was refused; 0 = none was",
);
const REROUTED: Described = Described::gauge(
    "rerouted_timestamp_seconds",
    &[],
    "Wall clock at which a lost device's call was last answered by another; 0 = none was",
);
const REVISION: Described = Described::gauge("revision", &[], "Placement revision that steps start on; 0 = none");
const OLDEST: Described =
    Described::gauge("oldest_revision", &[], "Oldest placement revision that a step is on; 0 = none");
const GONE: Described = Described::gauge("gone_devices", &[], "Devices of the placement that are not called");

/// Registers the metrics.
pub(crate) fn register(metrics: &Metrics, engine: &Engine, experts: &Experts) {
    let reader = Reader { engine: engine.clone(), experts: experts.clone() };
    metrics.register(|registry| registry.register_collector(Box::new(reader)));
}

#[derive(Debug)]
struct Reader {
    engine: Engine,
    experts: Experts,
}

impl Collector for Reader {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let (engine, experts) = (self.engine.stats(), self.experts.stats());
        let calls = experts.counts;
        for (name, value) in [
            (ACCEPTED, engine.accepted),
            (REFUSED, engine.refused),
            (FAILED, engine.failed),
            (RETRIED, engine.retried),
            (STEPS, engine.steps),
            (TOKENS, engine.tokens),
            (CALLS, calls.calls),
            (CALLS_REFUSED, calls.refused),
            (CALLS_RETRIED, calls.retried),
        ] {
            write(&mut encoder, name, &ConstCounter::new(value))?;
        }
        for (name, value) in [
            (SEQUENCES, f64_of_u64(engine.sequences)),
            (WAITING, f64_of_u64(engine.waiting)),
            (CACHE, f64_of_u64(engine.cache_bytes)),
            (FIRST_REFUSED, f64_of_u64(experts.first_refused_unix_ms) / 1000.0),
            (REROUTED, f64_of_u64(experts.rerouted_unix_ms) / 1000.0),
            (REVISION, f64_of_u64(experts.in_use.current.0)),
            (OLDEST, f64_of_u64(experts.in_use.oldest.0)),
            (GONE, f64_of_u64(crate::num::u64_of(experts.gone.len()))),
        ] {
            write(&mut encoder, name, &ConstGauge::new(value))?;
        }
        Ok(())
    }
}

fn write(
    encoder: &mut DescriptorEncoder<'_>,
    described: Described,
    metric: &impl EncodeMetric,
) -> Result<(), fmt::Error> {
    metric.encode(encoder.encode_descriptor(described.name, described.help, None, metric.metric_type())?)
}
