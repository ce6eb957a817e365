//! tmp
pub(crate) fn convert(_s: &[u8], _d: &mut [u8], _c: &crate::backend::ConvertSpec) {}
