//! Ports and addresses on loopback that no other running control plane uses.
//!
//! The port of a control plane's API server is its own on this machine for as long as it runs, so it also
//! decides which 512 addresses of 127.0.0.0/8 are its nodes' and pods': no two control planes ever share one.

use std::collections::BTreeSet;
use std::net::{Ipv4Addr, TcpListener};
use std::sync::{Arc, Mutex, PoisonError};

use crate::{Error, Result};

/// Ports below are not used, so that the address blocks above them fill 127.0.0.0/8 and miss 127.0.0.1.
const FIRST_PORT: u16 = 32_769;
/// Addresses of one control plane.
const BLOCK: u32 = 512;

/// Finds `N` TCP ports of 127.0.0.1 that are free now, all different, each above 32768.
///
/// # Errors
/// When none is left.
pub fn free_ports<const N: usize>() -> Result<[u16; N]> {
    // All are held until all are found; another process may still take one before it is used.
    let mut held = Vec::new();
    let mut ports = [0; N];
    for port in &mut ports {
        for _ in 0..1000 {
            let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).ok();
            let found = listener.as_ref().and_then(|l| l.local_addr().ok()).map(|a| a.port());
            held.extend(listener);
            if let Some(found) = found.filter(|p| *p >= FIRST_PORT) {
                *port = found;
                break;
            }
        }
        if *port == 0 {
            return Err(Error::NoAddress { what: "port" });
        }
    }
    Ok(ports)
}

/// The addresses of one control plane's nodes and pods.
#[derive(Debug)]
pub struct AddressPool {
    first: u32,
    taken: Mutex<Taken>,
}

#[derive(Debug, Default)]
struct Taken {
    offsets: BTreeSet<u32>,
    last: u32,
}

impl AddressPool {
    /// The pool that belongs to an API server's port (above 32768).
    #[must_use]
    pub fn of_port(port: u16) -> Self {
        let block = u32::from(port.max(FIRST_PORT) - FIRST_PORT + 1);
        let first = u32::from(Ipv4Addr::new(127, 0, 0, 0)) + block * BLOCK;
        Self { first, taken: Mutex::default() }
    }

    /// Takes the next free address, in turn, so that whoever still calls a pod that is gone does not reach
    /// another; it is free again when the returned value is dropped.
    ///
    /// # Errors
    /// When all are taken.
    pub fn take(self: &Arc<Self>) -> Result<Address> {
        let mut taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        let mut in_turn = (taken.last + 1..BLOCK - 1).chain(1..=taken.last);
        let offset = in_turn.find(|o| !taken.offsets.contains(o)).ok_or(Error::NoAddress { what: "address" })?;
        taken.offsets.insert(offset);
        taken.last = offset;
        Ok(Address { pool: Arc::clone(self), offset })
    }
}

/// An address in use.
#[derive(Debug)]
pub struct Address {
    pool: Arc<AddressPool>,
    offset: u32,
}

impl Address {
    /// The address itself.
    #[must_use]
    pub fn ip(&self) -> Ipv4Addr {
        Ipv4Addr::from(self.pool.first + self.offset)
    }
}

impl Drop for Address {
    fn drop(&mut self) {
        self.pool.taken.lock().unwrap_or_else(PoisonError::into_inner).offsets.remove(&self.offset);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pools_of_two_ports_share_no_address() {
        let (a, b) = (AddressPool::of_port(40_000), AddressPool::of_port(40_001));
        assert_eq!(a.first + BLOCK, b.first);
        assert_eq!(Ipv4Addr::from(AddressPool::of_port(u16::MAX).first + BLOCK - 1), Ipv4Addr::new(127, 255, 255, 255));
        assert!(Ipv4Addr::from(AddressPool::of_port(FIRST_PORT).first) > Ipv4Addr::LOCALHOST);
    }

    #[test]
    fn a_dropped_address_is_taken_again_only_after_all_others() -> Result<()> {
        let pool = Arc::new(AddressPool::of_port(40_000));
        let kept = pool.take()?;
        let dropped = pool.take()?.ip();
        let others: Vec<_> = (3..BLOCK - 1).map(|_| pool.take()).collect::<Result<_>>()?;
        assert!(others.iter().all(|a| a.ip() != dropped && a.ip() != kept.ip()));
        let again = pool.take()?;
        assert_eq!(again.ip(), dropped);
        assert!(pool.take().is_err());
        Ok(())
    }

    #[test]
    fn free_ports_are_all_different() -> Result<()> {
        let ports: [u16; 8] = free_ports()?;
        assert_eq!(ports.iter().collect::<BTreeSet<_>>().len(), 8);
        Ok(())
    }
}
