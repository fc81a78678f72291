//! The words of Berth: ids, units, health, memory, model geometry.
