//! Names and numbers that identify things. Each is a type of its own, checked when it is made from
//! text, so that a node is never taken for a device.

use std::{fmt, str::FromStr};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Why a text is not the id it should be.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
#[error("{text:?} is not {what}: write it as {form}")]
pub struct InvalidId {
    text: String,
    what: &'static str,
    form: &'static str,
}

/// Longest name that Kubernetes gives an object.
const NAME_LIMIT: usize = 253;

fn is_name(text: &str) -> bool {
    let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit();
    !text.is_empty()
        && text.len() <= NAME_LIMIT
        && text.chars().all(|c| plain(c) || c == '-' || c == '.')
        && text.starts_with(plain)
        && text.ends_with(plain)
}

macro_rules! text_id {
    ($(#[$doc:meta])* $name:ident, $limit:literal, $what:literal, $form:literal, $check:expr) => {
        $(#[$doc])*
        #[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema)]
        #[serde(try_from = "String", into = "String")]
        #[schemars(extend("maxLength" = $limit))]
        pub struct $name(String);

        impl $name {
            /// The id as text.
            #[must_use]
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl FromStr for $name {
            type Err = InvalidId;

            fn from_str(text: &str) -> Result<Self, Self::Err> {
                if $check(text) {
                    Ok(Self(text.to_owned()))
                } else {
                    Err(InvalidId { text: text.to_owned(), what: $what, form: $form })
                }
            }
        }

        impl TryFrom<String> for $name {
            type Error = InvalidId;

            fn try_from(text: String) -> Result<Self, Self::Error> {
                text.parse()
            }
        }

        impl From<$name> for String {
            fn from(id: $name) -> Self {
                id.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
    };
}

text_id!(
    /// Name of a Kubernetes Node, and of the AcceleratorNode that describes it.
    NodeName,
    253,
    "a node name",
    "lower-case letters, digits, '-' and '.'",
    is_name
);

text_id!(
    /// An ExpertPlacement: `<namespace>/<name>`.
    PlacementName,
    507,
    "a placement",
    "<namespace>/<name>",
    |text: &str| text.split_once('/').is_some_and(|(space, name)| is_name(space) && is_name(name))
);

text_id!(
    /// One schedulable accelerator in the cluster: `<node>/<local>`. The local part is the PCI address
    /// of an NVIDIA GPU (`0000:3b:00.0`) or `<card>.<device>` of an Ascend logical NPU; it stays the
    /// same over restarts and resets, and changes when the device moves to another place.
    DeviceId,
    286,
    "a device",
    "<node>/<PCI address> or <node>/<card>.<device>",
    |text: &str| text.split_once('/').is_some_and(|(node, local)| is_name(node) && is_local(local))
);

fn is_local(text: &str) -> bool {
    !text.is_empty()
        && text.len() <= 32
        && text.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || ":.-".contains(c))
}

impl DeviceId {
    /// The device `local` of `node`.
    ///
    /// # Errors
    /// When `local` is no PCI address and no `<card>.<device>`.
    pub fn new(node: &NodeName, local: &str) -> Result<Self, InvalidId> {
        format!("{node}/{local}").parse()
    }

    /// The node that holds the device.
    #[must_use]
    pub fn node(&self) -> &str {
        self.0.split_once('/').map_or("", |(node, _)| node)
    }

    /// The part of the id that is unique within its node.
    #[must_use]
    pub fn local(&self) -> &str {
        self.0.split_once('/').map_or("", |(_, local)| local)
    }
}

impl PlacementName {
    /// The placement `name` in `namespace`.
    ///
    /// # Errors
    /// When either part is no Kubernetes name.
    pub fn new(namespace: &str, name: &str) -> Result<Self, InvalidId> {
        format!("{namespace}/{name}").parse()
    }

    /// Namespace of the object.
    #[must_use]
    pub fn namespace(&self) -> &str {
        self.0.split_once('/').map_or("", |(space, _)| space)
    }

    /// Name of the object.
    #[must_use]
    pub fn name(&self) -> &str {
        self.0.split_once('/').map_or("", |(_, name)| name)
    }
}

macro_rules! number_id {
    ($(#[$doc:meta])* $name:ident, $inner:ty) => {
        $(#[$doc])*
        #[derive(
            Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema,
        )]
        #[serde(transparent)]
        pub struct $name(#[schemars(range(min = 0))] pub $inner);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }
    };
}

number_id!(
    /// A numbered placement; only ever replaced by a higher one. 0 = none yet.
    Revision,
    u64
);
number_id!(
    /// Which leader wrote: the transition count of the scheduler's Lease. Never falls.
    Epoch,
    u64
);
number_id!(
    /// An expert's index within its layer, from 0.
    ExpertId,
    u32
);
number_id!(
    /// A layer's index in the model, from 0, dense layers counted.
    LayerId,
    u32
);

impl Revision {
    /// The revision that replaces this one.
    #[must_use]
    pub const fn next(self) -> Self {
        Self(self.0.saturating_add(1))
    }
}

/// Who makes a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Vendor {
    /// NVIDIA, CUDA.
    Nvidia,
    /// Huawei Ascend, CANN.
    Ascend,
}

impl Vendor {
    /// The word in objects, labels and the CLI.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Nvidia => "nvidia",
            Self::Ascend => "ascend",
        }
    }
}

impl fmt::Display for Vendor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for Vendor {
    type Err = InvalidId;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "nvidia" => Ok(Self::Nvidia),
            "ascend" => Ok(Self::Ascend),
            _ => Err(InvalidId { text: text.to_owned(), what: "a vendor", form: "nvidia or ascend" }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn device_id_names_node_and_place() {
        let id: DeviceId = "gpu-07/0000:3b:00.0".parse().unwrap();
        assert_eq!((id.node(), id.local()), ("gpu-07", "0000:3b:00.0"));
        let node: NodeName = "npu-112".parse().unwrap();
        assert_eq!(DeviceId::new(&node, "3.1").unwrap().to_string(), "npu-112/3.1");
    }

    #[test]
    fn damaged_ids_are_refused_with_the_form_to_write() {
        for text in ["", "gpu-07", "/3b", "GPU/0", "gpu-07/", "gpu 07/0", "gpu-07/../etc"] {
            assert!(text.parse::<DeviceId>().is_err(), "{text}");
        }
        let error = "x".parse::<PlacementName>().unwrap_err().to_string();
        assert!(error.contains("<namespace>/<name>"), "{error}");
    }

    proptest! {
        #[test]
        fn any_text_parses_or_fails_cleanly(text in ".{0,300}") {
            if let Ok(id) = text.parse::<DeviceId>() {
                prop_assert_eq!(id.to_string(), text);
            }
        }
    }
}
