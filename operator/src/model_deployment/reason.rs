//! Every reason in a ModelDeployment's conditions and events: one word each, for programs to match on.

/// A reason.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Reason {
    /// The profile was found and everything asked for is honoured.
    ProfileResolved,
    /// No such ModelProfile.
    ProfileNotFound,
    /// The profile's numbers contradict each other.
    ProfileInvalid,
    /// A field of the spec is not honoured.
    FieldNotHonoured,
    /// Weights lie outside the allowed folders.
    WeightsNotAllowed,
    /// Every instance that is wanted was granted.
    Granted,
    /// The queue is full.
    QuotaExceeded,
    /// An instance is larger than the queue allows.
    QuotaTooSmall,
    /// No such queue.
    QueueNotFound,
    /// The queue does not admit the namespace.
    QueueNotAllowed,
    /// Not enough devices that fit.
    CapacityShort,
    /// Every instance is so.
    AllInstances,
    /// Some instances are not so.
    SomeInstances,
    /// No instance is so.
    NoInstance,
    /// None is wanted.
    ScaledToZero,
    /// Fewer instances serve than are wanted.
    InstancesShort,
    /// An expert has no live replica.
    ExpertsLost,
    /// Nothing less than asked for is given.
    AsAsked,
    /// New instances replace old ones.
    Replacing,
    /// Everything asked for is true.
    Serving,
    /// Instances load or start.
    Starting,
    /// Nothing is left to do.
    Settled,
}

impl Reason {
    /// The word.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::ProfileResolved => "ProfileResolved",
            Self::ProfileNotFound => "ProfileNotFound",
            Self::ProfileInvalid => "ProfileInvalid",
            Self::FieldNotHonoured => "FieldNotHonoured",
            Self::WeightsNotAllowed => "WeightsNotAllowed",
            Self::Granted => "Granted",
            Self::QuotaExceeded => "QuotaExceeded",
            Self::QuotaTooSmall => "QuotaTooSmall",
            Self::QueueNotFound => "QueueNotFound",
            Self::QueueNotAllowed => "QueueNotAllowed",
            Self::CapacityShort => "CapacityShort",
            Self::AllInstances => "AllInstances",
            Self::SomeInstances => "SomeInstances",
            Self::NoInstance => "NoInstance",
            Self::ScaledToZero => "ScaledToZero",
            Self::InstancesShort => "InstancesShort",
            Self::ExpertsLost => "ExpertsLost",
            Self::AsAsked => "AsAsked",
            Self::Replacing => "Replacing",
            Self::Serving => "Serving",
            Self::Starting => "Starting",
            Self::Settled => "Settled",
        }
    }
}
