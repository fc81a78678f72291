//! What is measured of an Ascend device beyond its health: cheap calls of the management library, none of which opens
//! a device context. Deciding what a value means is nobody's here.

use berth_runtime::Clock;

use super::{
    Npu,
    ffi::{At, Code, NOT_EXIST},
};
use crate::{
    health::fact::NpuReading,
    vendor::{
        measure::{Measurable, steps},
        slate::Slate,
    },
    vitals::{Errors, Measured, Memory, Sight},
};

/// `DCMI_FREQ_AICORE_CURRENT_`.
const CORE_CLOCK: u32 = 7;
/// Kinds of `dcmi_get_device_utilization_rate`: AI cores, vector units, the whole device.
const RATES: (i32, i32, i32) = (2, 12, 13);
/// The network is well; not known yet.
const NETWORK: (u32, u32) = (0, 6);
/// Health of a device that is absent or has not started.
const NOT_THERE: u32 = u32::MAX;

/// What a reading of health tells besides.
pub(super) fn seen(reading: &NpuReading) -> Sight {
    let network = reading.network.value().filter(|network| *network != NETWORK.1);
    let codes = match &reading.codes {
        crate::health::fact::Read::Value(codes) => Some(codes.clone()),
        _ => None,
    };
    Sight {
        repairs_pending: reading.next_isolated.value().map(u64::from),
        network_up: network.map(|network| network == NETWORK.0),
        vendor_health: reading.health.value().filter(|health| *health != NOT_THERE),
        codes,
        ..Sight::default()
    }
}

type Step = (&'static str, fn(&Npu, At, &mut Measured) -> Result<(), Code>);

/// Every value, in the order of measuring.
const STEPS: &[Step] = &[
    ("number", |npu, at, out| {
        out.driver = npu.library.driver();
        let number = npu.target.logic.map(|logic| npu.library.api.physical(at, logic).unwrap_or(logic));
        out.index = number.and_then(|number| u32::try_from(number).ok());
        Ok(())
    }),
    ("model", |npu, at, out| npu.library.api.model(at).map(|model| out.model = Some(model))),
    ("memory", |npu, at, out| {
        let info = npu.library.api.hbm_use(at)?;
        let (total, used) = (info.size.saturating_mul(1 << 20), info.usage.saturating_mul(1 << 20));
        out.memory = Some(Memory { total, used, free: None, reserved: None });
        out.memory_temperature = Some(info.temperature);
        out.busy.memory = percent(info.bandwidth);
        Ok(())
    }),
    ("temperature", |npu, at, out| {
        let value = npu.library.api.temperature(at)?;
        // 0x7ffd = invalid, 0x7fff = not read.
        out.temperature = Some(value).filter(|value| *value < 0x7ffd);
        Ok(())
    }),
    // Tenths of a watt.
    ("power", |npu, at, out| {
        let value = npu.library.api.power(at)?;
        out.power_mw = u64::try_from(value).ok().map(|tenths| tenths.saturating_mul(100));
        Ok(())
    }),
    // Hundredths of a volt.
    ("voltage", |npu, at, out| {
        let value = npu.library.api.voltage(at)?;
        out.voltage_mv = Some(u64::from(value).saturating_mul(10));
        Ok(())
    }),
    ("clock", |npu, at, out| npu.library.api.frequency(at, CORE_CLOCK).map(|mhz| out.clock_mhz = Some(mhz))),
    ("utilization", |npu, at, out| {
        let api = &npu.library.api;
        if let Ok(all) = api.utilizations(at) {
            (out.busy.core, out.busy.device) = (percent(all.aicore), percent(all.npu));
            (out.busy.vector, out.busy.cube) = (percent(all.aiv), percent(all.aic));
            return Ok(());
        }
        out.busy.core = percent(api.utilization(at, RATES.0)?);
        // Older chips do not know these.
        out.busy.vector = api.utilization(at, RATES.1).ok().and_then(percent);
        out.busy.device = api.utilization(at, RATES.2).ok().and_then(percent);
        Ok(())
    }),
    ("memory errors", |npu, at, out| {
        let info = npu.library.api.errors(at)?;
        out.errors = Errors {
            enabled: Some(info.enabled != 0),
            corrected: Some(info.single.into()),
            uncorrected: Some(info.double.into()),
            corrected_ever: Some(info.total_single.into()),
            uncorrected_ever: Some(info.total_double.into()),
            retired_corrected: Some(info.single_isolated.into()),
            retired_uncorrected: Some(info.double_isolated.into()),
        };
        Ok(())
    }),
];

/// A driver says numbers above 100 for a unit that the chip does not have.
fn percent(value: u32) -> Option<u32> {
    Some(value).filter(|value| *value <= 100)
}

impl Measurable for Npu {
    fn local(&self) -> &str {
        &self.target.info.local
    }

    fn measure(&self, slate: &Slate<Measured>, clock: &Clock) {
        let of = |(name, read): &Step| {
            (*name, {
                let read = *read;
                move |out: &mut Measured| read(self, self.target.at, out)
            })
        };
        steps(slate, clock, NOT_EXIST, STEPS.iter().map(of));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::health::fact::Read;

    #[test]
    fn a_network_that_is_not_known_yet_is_neither_up_nor_down() {
        let network = |value| seen(&NpuReading { network: Read::Value(value), ..NpuReading::default() }).network_up;
        assert_eq!((network(0), network(3), network(6)), (Some(true), Some(false), None));
    }

    #[test]
    fn a_device_that_has_not_started_has_no_health() {
        let health = |value| seen(&NpuReading { health: Read::Value(value), ..NpuReading::default() }).vendor_health;
        assert_eq!((health(0), health(u32::MAX)), (Some(0), None));
        assert_eq!(seen(&NpuReading::default()), Sight::default());
    }

    #[test]
    fn a_unit_that_the_chip_does_not_have_is_no_percentage() {
        assert_eq!((percent(100), percent(u32::MAX)), (Some(100), None));
    }
}
