//! The frame of a part at work: keeping a Lease, answering probes, ending in order.

#[cfg(test)]
mod lease;
#[cfg(test)]
mod part;
#[cfg(test)]
mod store;
