//! How fast devices are beside each other for one placement, from what its spec declares by product. Pure.

use std::collections::BTreeMap;

use berth_crds::{expert_placement::ProductSpeed, model_profile::Basis};
use berth_planner::speed::{Known, relative};
use berth_types::DeviceId;

use crate::index::Index;

/// What a modelled figure is planned with: 20 % headroom.
const HEADROOM: f64 = 0.8;

/// Speeds of all known devices, 1 = the median; empty where nothing is declared: every device alike.
#[must_use]
pub fn speeds(index: &Index, declared: &[ProductSpeed]) -> BTreeMap<DeviceId, f64> {
    if declared.is_empty() {
        return BTreeMap::new();
    }
    let devices = index.nodes().values().flat_map(|node| node.devices());
    let known = devices.map(|(id, device)| {
        let found = find(declared, &device.product);
        let known = Known { measured: None, declared: found.map(rate), product: device.product.clone() };
        (id.clone(), known)
    });
    relative(&known.collect())
}

/// The entry for `product`: of that name, else the longest that is a word of it, whatever the case.
fn find<'a>(declared: &'a [ProductSpeed], product: &str) -> Option<&'a ProductSpeed> {
    let product = product.to_lowercase();
    let is_word = |name: &str| product.split(|c: char| !c.is_alphanumeric() && c != '_').any(|word| word == name);
    let exact = declared.iter().find(|one| one.product.to_lowercase() == product);
    exact.or_else(|| {
        let named = declared.iter().filter(|one| is_word(&one.product.to_lowercase()));
        named.max_by_key(|one| one.product.len())
    })
}

fn rate(speed: &ProductSpeed) -> f64 {
    let headroom = if speed.basis == Basis::Modelled { HEADROOM } else { 1.0 };
    speed.tokens_per_second.get() * headroom
}

/// Which speeds a plan was made for, in words.
#[must_use]
pub fn words(declared: &[ProductSpeed]) -> String {
    let one = |speed: &ProductSpeed| {
        let basis = match speed.basis {
            Basis::Modelled => "modelled, less 20 %",
            Basis::Calibrated => "calibrated",
            Basis::Measured => "measured",
        };
        format!("{} {:.0} tokens/s ({basis})", speed.product, speed.tokens_per_second.get())
    };
    match declared {
        [] => "none declared: every device alike".to_owned(),
        some => some.iter().map(one).collect::<Vec<_>>().join(", ").chars().take(256).collect(),
    }
}

#[cfg(test)]
mod tests {
    use berth_types::TokensPerSecond;

    use super::*;

    fn declared(product: &str, rate: f64, basis: Basis) -> ProductSpeed {
        ProductSpeed { product: product.to_owned(), tokens_per_second: TokensPerSecond::try_from(rate).unwrap(), basis }
    }

    #[test]
    fn a_product_is_found_by_its_name_or_by_a_word_of_it() {
        let all = [declared("h200", 2.0, Basis::Measured), declared("Ascend910_9392", 1.0, Basis::Measured)];
        let found = |product: &str| find(&all, product).map(|one| one.product.as_str());
        assert_eq!(found("NVIDIA H200"), Some("h200"));
        assert_eq!(found("Ascend910_9392"), Some("Ascend910_9392"));
        assert_eq!((found("NVIDIA H20"), found("Ascend910B4")), (None, None));
    }

    #[test]
    fn a_modelled_figure_counts_with_its_headroom_and_says_so() {
        let modelled = declared("h200", 1000.0, Basis::Modelled);
        assert!((rate(&modelled) - 800.0).abs() < 1e-9);
        assert_eq!(words(&[modelled]), "h200 1000 tokens/s (modelled, less 20 %)");
        assert_eq!(words(&[]), "none declared: every device alike");
    }
}
