//! Which interconnect domains to try for an instance: as few as possible, those that it is in
//! already first, and of those the ones that leave the fewest devices scattered in domains that are no longer whole.

/// Sets of one size are all tried while there are no more than so many.
const MOST_SETS: usize = 256;

/// A domain's usable devices.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Domain {
    /// How many hold the instance.
    pub(super) held: usize,
    /// How many there are.
    pub(super) size: usize,
}

/// The best set of domains for `count` devices for which `fits` answers, with that answer. Sets are places in `domains`.
///
/// Every single domain is looked at, and every set of a size while there are at most [`MOST_SETS`] of it; of more, the one with the most devices,
/// in which each domain then gives way to the smallest one that does as well.
pub(super) fn best<T>(domains: &[Domain], count: usize, mut fits: impl FnMut(&[usize]) -> Option<T>) -> Option<T> {
    for many in 1..=domains.len() {
        let found = if many == 1 || sets(domains.len(), many) <= MOST_SETS {
            ordered(domains, many).into_iter().filter(|set| size(domains, set) >= count).find_map(|set| fits(&set))
        } else {
            tightened(domains, many, count, &mut fits)
        };
        if found.is_some() {
            return found;
        }
    }
    None
}

fn size(domains: &[Domain], set: &[usize]) -> usize {
    set.iter().map(|at| domains[*at].size).sum()
}

/// How many sets of `many` out of `all` there are; exact up to [`MOST_SETS`].
fn sets(all: usize, many: usize) -> usize {
    let mut sets = 1_usize;
    for taken in 0..many.min(all - many) {
        sets = sets.saturating_mul(all - taken) / (taken + 1);
        if sets > MOST_SETS {
            return sets;
        }
    }
    sets
}

/// All sets of `many`, those with most of the instance first, then those with the fewest devices.
fn ordered(domains: &[Domain], many: usize) -> Vec<Vec<usize>> {
    let mut sets: Vec<Vec<usize>> = vec![Vec::new()];
    for missing in (1..=many).rev() {
        let longer = |set: &Vec<usize>| {
            let from = set.last().map_or(0, |last| last + 1);
            let set = set.clone();
            // As far as the missing ones still find a place: so there are never more of them than whole sets.
            (from..=domains.len() - missing).map(move |next| set.iter().copied().chain([next]).collect())
        };
        sets = sets.iter().flat_map(longer).collect();
    }
    let held = |set: &Vec<usize>| set.iter().map(|at| domains[*at].held).sum::<usize>();
    sets.sort_by_key(|set| (std::cmp::Reverse(held(set)), size(domains, set)));
    sets
}

/// The largest `many` domains, each replaced by the smallest that still fits.
fn tightened<T>(
    domains: &[Domain],
    many: usize,
    count: usize,
    fits: &mut impl FnMut(&[usize]) -> Option<T>,
) -> Option<T> {
    let mut order: Vec<usize> = (0..domains.len()).collect();
    order.sort_by_key(|at| std::cmp::Reverse((domains[*at].held, domains[*at].size)));
    let mut set: Vec<usize> = order.iter().copied().take(many).collect();
    if size(domains, &set) < count {
        return None;
    }
    let mut found = fits(&set)?;
    order.sort_by_key(|at| domains[*at].size);
    for place in (0..many).rev().filter(|place| domains[set[*place]].held == 0).collect::<Vec<_>>() {
        let now = domains[set[place]].size;
        let others = size(domains, &set) - now;
        for smaller in order.iter().copied().take_while(|at| domains[*at].size < now) {
            if set.contains(&smaller) || others + domains[smaller].size < count {
                continue;
            }
            let before = std::mem::replace(&mut set[place], smaller);
            match fits(&set) {
                Some(tighter) => {
                    found = tighter;
                    break;
                }
                None => set[place] = before,
            }
        }
    }
    Some(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(sizes: &[usize]) -> Vec<Domain> {
        sizes.iter().map(|size| Domain { held: 0, size: *size }).collect()
    }

    fn sizes(domains: &[Domain], count: usize) -> Option<Vec<usize>> {
        let mut sizes =
            best(domains, count, |set| Some(set.to_vec()))?.iter().map(|at| domains[*at].size).collect::<Vec<_>>();
        sizes.sort_unstable();
        Some(sizes)
    }

    #[test]
    fn the_fewest_domains_with_the_fewest_devices_are_taken() {
        assert_eq!(sizes(&of(&[8, 8, 5, 5]), 10), Some(vec![5, 5]));
        assert_eq!(sizes(&of(&[8, 4, 2]), 10), Some(vec![2, 8]));
        assert_eq!(sizes(&of(&[4, 4, 4]), 12), Some(vec![4, 4, 4]));
        assert_eq!(sizes(&of(&[4, 4, 4]), 13), None);
    }

    #[test]
    fn of_very_many_domains_each_gives_way_to_a_smaller_one() {
        let many: Vec<usize> = (0..40).map(|at| if at % 2 == 0 { 8 } else { 5 }).collect();
        assert!(sets(40, 3) > MOST_SETS);
        assert_eq!(sizes(&of(&many), 18), Some(vec![5, 5, 8]));
        assert_eq!(sizes(&of(&[8; 200]), 320), Some(vec![8; 40]));
        assert_eq!(sizes(&of(&[8; 200]), 1600), Some(vec![8; 200]));
    }

    #[test]
    fn domains_that_hold_the_instance_stay() {
        let mut domains = of(&[8, 6, 5]);
        domains[0].held = 3;
        assert_eq!(sizes(&domains, 11), Some(vec![5, 8]));
        assert_eq!((sets(5, 2), sets(7, 7), sets(300, 150) > MOST_SETS), (10, 1, true));
    }
}
