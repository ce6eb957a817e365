//! The fake driver, used as a driver.
#![cfg(target_os = "linux")]

mod cuda;
mod failures;
mod loading;
mod order;
mod registered;
mod violations;
mod waiting;
