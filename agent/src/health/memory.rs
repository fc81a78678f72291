//! The ledger over the end of its process: what it remembers, and what that is worth when it is read again. A memory
//! may make a device look worse than it is, never better: it is taken before anything is read, and every reading and
//! every line that follows has its say before anything is told.

use std::time::Duration;

use serde_json::Value;

use super::{
    condition::{DAY, Origin},
    device::Settings,
    ledger::Ledger,
    switch::Switches,
};

/// Why a memory cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Unusable {
    /// Its fields are not those of this build.
    #[error("its ledger cannot be read: {0}")]
    Fields(#[from] serde_json::Error),
    /// It speaks of a time that has not come.
    #[error("its ledger has a time {seconds} s after it was written")]
    Future {
        /// How far ahead.
        seconds: u64,
    },
}

impl Ledger {
    /// A ledger that goes on from `memory`, which was written at `written` on the same timeline as `now`; `rebooted` =
    /// the node has booted since. It takes facts as history until [`Self::start`].
    ///
    /// # Errors
    /// [`Unusable`]; then a new ledger is to be begun.
    pub fn resumed(
        settings: Settings,
        memory: Value,
        written: Duration,
        now: Duration,
        rebooted: bool,
    ) -> Result<Self, Unusable> {
        check_times(&memory, written)?;
        let mut ledger: Self = serde_json::from_value(memory)?;
        ledger.settings = settings;
        for device in ledger.devices.values_mut() {
            device.resume(now, rebooted, settings);
        }
        // What the agent could not see then it tries to see anew.
        ledger.node.retain(|(_, origin), _| !matches!(origin, Origin::Library(_) | Origin::Log));
        if rebooted {
            ledger.node.clear();
            ledger.switches = Switches::default();
            (ledger.switch_fault, ledger.triggers) = (None, Vec::new());
            ledger.strangers.clear();
        }
        ledger.rebooted = rebooted;
        Ok(ledger)
    }
}

/// Every time in `value` must lie before what a ledger of `written` can know: the end of the longest probation or quiet.
fn check_times(value: &Value, written: Duration) -> Result<(), Unusable> {
    let latest = written.saturating_add(DAY.saturating_mul(3)).as_secs();
    match value {
        Value::Object(fields) => {
            let seconds = fields.get("secs").and_then(Value::as_u64).filter(|_| fields.contains_key("nanos"));
            if let Some(seconds) = seconds.filter(|seconds| *seconds > latest) {
                return Err(Unusable::Future { seconds: seconds.saturating_sub(written.as_secs()) });
            }
            fields.values().try_for_each(|value| check_times(value, written))
        }
        Value::Array(values) => values.iter().try_for_each(|value| check_times(value, written)),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => Ok(()),
    }
}
