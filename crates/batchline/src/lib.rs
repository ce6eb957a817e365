//! tmp
mod backend; mod dtype; mod error; mod plan; mod shape; mod source; mod sync;
pub use backend::*; pub use dtype::*; pub use error::*; pub use shape::*; pub use source::*;
