//! What is measured of an NVIDIA device beyond its health: cheap calls of the management library, none of which opens
//! a device context. Deciding what a value means is nobody's here.

use berth_runtime::Clock;

use super::{
    Gpu,
    ffi::{Code, GPU_IS_LOST},
};
use crate::{
    health::fact::Reading,
    vendor::{
        measure::{Measurable, steps},
        slate::Slate,
    },
    vitals::{Measured, Memory, Sight},
};

/// `NVML_FI_DEV_MEMORY_TEMP`.
const MEMORY_TEMP: u32 = 82;
/// Clock event reasons that mean heat: software and hardware thermal slowdown.
const HEAT: u64 = 0x20 | 0x40;
/// Clock event reasons that mean power: the power cap, hardware slowdown, power brake.
const POWER: u64 = 0x4 | 0x8 | 0x80;
/// `NVML_CLOCK_SM`, `NVML_CLOCK_MEM`.
const CLOCKS: (u32, u32) = (1, 2);

/// What a reading of health tells besides.
pub(super) fn seen(reading: &Reading) -> Sight {
    if reading.lost {
        return Sight::default();
    }
    let reasons = reading.clock_reasons.value();
    Sight {
        temperature: reading.temperature.value(),
        corrected: reading.ecc_corrected.value(),
        uncorrected: reading.ecc_uncorrected.value(),
        repairs_pending: reading.rows.value().map(|rows| u64::from(rows.pending)),
        repair_failed: reading.rows.value().map(|rows| rows.failed),
        slowed_by_heat: reasons.map(|reasons| reasons & HEAT != 0),
        slowed_by_power: reasons.map(|reasons| reasons & POWER != 0),
        ..Sight::default()
    }
}

type Step = (&'static str, fn(&Gpu, &mut Measured) -> Result<(), Code>);

/// Every value, in the order of measuring.
const STEPS: &[Step] = &[
    ("number", |gpu, out| {
        (out.index, out.driver) = (Some(gpu.target.index), gpu.library.driver());
        Ok(())
    }),
    ("memory", |gpu, out| {
        let memory = gpu.library.api.memory_use(gpu.target.handle)?;
        let (total, used, free) = (memory.total, memory.used, Some(memory.free));
        out.memory = Some(Memory { total, used, free, reserved: memory.reserved });
        Ok(())
    }),
    ("power", |gpu, out| gpu.library.api.power(gpu.target.handle).map(|value| out.power_mw = Some(value.into()))),
    ("energy", |gpu, out| gpu.library.api.energy(gpu.target.handle).map(|value| out.energy_mj = Some(value))),
    ("clocks", |gpu, out| {
        out.clock_mhz = Some(gpu.library.api.clock(gpu.target.handle, CLOCKS.0)?);
        out.memory_clock_mhz = Some(gpu.library.api.clock(gpu.target.handle, CLOCKS.1)?);
        Ok(())
    }),
    ("utilization", |gpu, out| {
        let busy = gpu.library.api.utilization(gpu.target.handle)?;
        (out.busy.device, out.busy.memory) = (Some(busy.gpu), Some(busy.memory));
        Ok(())
    }),
    ("encoder", |gpu, out| gpu.library.api.encoder(gpu.target.handle).map(|value| out.busy.encoder = Some(value))),
    ("decoder", |gpu, out| gpu.library.api.decoder(gpu.target.handle).map(|value| out.busy.decoder = Some(value))),
    ("memory temperature", |gpu, out| {
        let value = gpu.library.api.field(gpu.target.handle, MEMORY_TEMP)?;
        out.memory_temperature = i32::try_from(value).ok().filter(|value| *value > 0);
        Ok(())
    }),
    ("retired rows", |gpu, out| {
        let rows = gpu.library.api.rows(gpu.target.handle)?;
        out.errors.retired_corrected = Some(rows.corrected.into());
        out.errors.retired_uncorrected = Some(rows.uncorrected.into());
        Ok(())
    }),
    ("bus replays", |gpu, out| {
        gpu.library.api.replays(gpu.target.handle).map(|value| out.bus_replays = Some(value.into()))
    }),
    // Asked once more: a reading of health that broke off says nothing of those it did not reach.
    ("links", |gpu, out| {
        let mut down = 0;
        for link in &gpu.target.links {
            down += usize::from(!gpu.library.api.link_up(gpu.target.handle, *link)?);
        }
        out.links_down = Some(down).filter(|_| !gpu.target.links.is_empty());
        Ok(())
    }),
];

impl Measurable for Gpu {
    fn local(&self) -> &str {
        &self.target.info.local
    }

    fn measure(&self, slate: &Slate<Measured>, clock: &Clock) {
        let of = |(name, read): &Step| {
            (*name, {
                let read = *read;
                move |out: &mut Measured| read(self, out)
            })
        };
        steps(slate, clock, GPU_IS_LOST, STEPS.iter().map(of));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::health::fact::{Read, Rows};

    #[test]
    fn a_reading_of_health_tells_what_it_holds_and_a_lost_device_nothing() {
        let mut reading = Reading {
            temperature: Read::Value(45),
            clock_reasons: Read::Value(0x40 | 0x1),
            rows: Read::Value(Rows { pending: true, failed: false }),
            ecc_corrected: Read::Missed,
            ..Reading::default()
        };
        let sight = seen(&reading);
        assert_eq!((sight.temperature, sight.repairs_pending), (Some(45), Some(1)));
        assert_eq!((sight.slowed_by_heat, sight.slowed_by_power), (Some(true), Some(false)));
        assert_eq!((sight.corrected, sight.repair_failed), (None, Some(false)));
        reading.lost = true;
        assert_eq!(seen(&reading), Sight::default());
    }
}
