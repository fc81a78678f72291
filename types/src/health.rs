//! The one health vocabulary for both vendors. Order of the variants is order of badness, so the worst
//! of several conditions is `max`.

use std::fmt;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

macro_rules! words {
    ($(#[$doc:meta])* $name:ident { $($(#[$vdoc:meta])* $variant:ident),+ $(,)? }) => {
        $(#[$doc])*
        #[derive(
            Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema,
        )]
        pub enum $name { $($(#[$vdoc])* $variant),+ }

        impl $name {
            /// Every word, in order.
            pub const ALL: &'static [Self] = &[$(Self::$variant),+];

            /// The word as written in objects, reports and scripts.
            #[must_use]
            pub const fn as_str(self) -> &'static str {
                match self { $(Self::$variant => stringify!($variant)),+ }
            }

            /// The word that `text` is, if it is one.
            #[must_use]
            pub fn parse(text: &str) -> Option<Self> {
                Self::ALL.iter().copied().find(|word| word.as_str() == text)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(self.as_str())
            }
        }
    };
}

words!(
    /// How well a device is.
    Health {
        /// Nothing wrong.
        Healthy,
        /// Works, with less than its nominal speed, memory or safety.
        Degraded,
        /// The agent cannot tell.
        Unknown,
        /// Not fit for work.
        Unhealthy,
    }
);

words!(
    /// What may be placed on a device.
    Admission {
        /// New replicas may be placed.
        Schedulable,
        /// No new replicas; those there are moved away gracefully.
        Draining,
        /// Its replicas count as gone at once.
        Barred,
    }
);

words!(
    /// What should be done; advice that only the operator turns into an order.
    Action {
        /// Nothing.
        None,
        /// Restart the program that failed.
        RestartWorkload,
        /// Reset this device.
        ResetDevice,
        /// Reset all devices that can only be reset together.
        ResetGroup,
        /// Reboot the node.
        RebootNode,
        /// Call the hardware service.
        ServiceHardware,
    }
);

words!(
    /// The smallest thing that holds a fault.
    Scope {
        /// One process or one MIG instance; the device's state does not change.
        Process,
        /// One device.
        Device,
        /// All devices of a card.
        Card,
        /// All devices of a reset group.
        Ring,
        /// The whole node.
        Node,
        /// An interconnect domain.
        Domain,
    }
);

words!(
    /// Why a device is not healthy.
    Reason {
        /// No longer answers on its bus, or missing at start.
        DeviceLost,
        /// Data in device memory or on-chip RAM was lost.
        MemoryUncorrectable,
        /// A spare row waits for a reset to replace a bad one.
        MemoryRemapPending,
        /// No repair left: spares used up or not recorded.
        MemoryRemapFailed,
        /// Corrected errors above the normal rate.
        MemoryCorrectableBurst,
        /// A unit on the chip failed or timed out.
        EngineFault,
        /// Device firmware or a management core stopped.
        FirmwareHang,
        /// Host driver or library broken, device not accused.
        DriverFault,
        /// A scale-up link is down for good.
        FabricLinkDown,
        /// Scale-up fabric slower, re-routed or re-partitioned.
        FabricDegraded,
        /// The device's own scale-out port is down.
        NetworkDown,
        /// Host link faulty, device still there.
        PcieFault,
        /// Supply, voltage or power smoothing.
        PowerFault,
        /// Hot and slowed down, not in danger.
        ThermalThrottle,
        /// Too hot to run.
        ThermalCritical,
        /// A program's own error.
        ProcessFault,
        /// The driver wants an action, cause not seen.
        ResetRequired,
        /// The same fault came back too often.
        RepeatedFault,
        /// A code nobody listed.
        UnknownFault,
        /// The agent cannot see the device or the node.
        AgentBlind,
        /// Other than the expected number of devices.
        CountMismatch,
    }
);

impl Scope {
    /// The word in reports and scripts, which write scopes in lower case.
    #[must_use]
    pub const fn lower(self) -> &'static str {
        match self {
            Self::Process => "process",
            Self::Device => "device",
            Self::Card => "card",
            Self::Ring => "ring",
            Self::Node => "node",
            Self::Domain => "domain",
        }
    }

    /// The scope that `text` names in lower case, if it is one.
    #[must_use]
    pub fn parse_lower(text: &str) -> Option<Self> {
        Self::ALL.iter().copied().find(|scope| scope.lower() == text)
    }
}

/// The five words of a device's state. A transition is a change of any of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct DeviceState {
    /// Worst health over all conditions.
    pub health: Health,
    /// Worst admission over all conditions.
    pub admission: Admission,
    /// Strongest action over all conditions.
    pub action: Action,
    /// Scope of the worst condition; `None` when nothing is wrong.
    pub scope: Option<Scope>,
    /// Reason of the worst condition; `None` when nothing is wrong.
    pub reason: Option<Reason>,
}

impl DeviceState {
    /// Nothing is wrong.
    pub const HEALTHY: Self = Self {
        health: Health::Healthy,
        admission: Admission::Schedulable,
        action: Action::None,
        scope: None,
        reason: None,
    };
}

impl Default for DeviceState {
    fn default() -> Self {
        Self::HEALTHY
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn worse_words_are_greater() {
        assert!(Health::Unknown > Health::Degraded && Health::Unhealthy > Health::Unknown);
        assert!(Admission::Barred > Admission::Draining);
        assert!(Action::ServiceHardware > Action::RebootNode && Action::ResetGroup > Action::ResetDevice);
    }

    #[test]
    fn every_word_reads_back() {
        assert_eq!(Reason::ALL.len(), 21);
        for reason in Reason::ALL {
            assert_eq!(Reason::parse(reason.as_str()), Some(*reason));
        }
        assert_eq!(Scope::parse_lower("domain"), Some(Scope::Domain));
        assert_eq!(Health::parse("healthy"), None);
    }
}
