//! The driver's functions, by what they are about.

mod capture;
mod context;
mod copy;
mod device;
mod event;
mod lookup;
mod memory;
mod module;
mod stream;
