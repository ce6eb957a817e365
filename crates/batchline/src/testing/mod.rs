//! To test your own backend or source: the conformance suite that every device of this crate
//! passes, and a device that injects faults. Not covered by semantic versioning.

pub mod conformance;
mod faults;

pub use faults::{Fault, FaultControl, FaultPlan, faulty_device};
