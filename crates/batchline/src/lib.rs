//! tmp
pub mod backend; mod command; mod device; mod dtype; mod error; mod memory; mod plan; mod shape; mod source; mod staging; mod sync;
pub use backend::{ChannelOrder, Custom, HostCustom}; pub use command::*; pub use device::*; pub use dtype::*; pub use error::*; pub use memory::*; pub use shape::*; pub use source::*; pub use staging::*;
