//! What the driver learns from a module's text: its kernels and the sizes of their parameters.

#![allow(clippy::disallowed_types, reason = "batchline's locks are its own")]

use std::sync::{Mutex, PoisonError};

use crate::codes::{INVALID_PTX, Result, UNSUPPORTED_PTX_VERSION};

/// A kernel's name and the bytes of each parameter.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Entry {
    pub(crate) name: String,
    pub(crate) parameters: Vec<usize>,
}

/// Reads a module, for a driver of this version. The last one is remembered: tests load the same
/// long one hundreds of times.
pub(crate) fn read(text: &str, driver: i32) -> Result<Vec<Entry>> {
    static LAST: Mutex<Option<(String, i32, Vec<Entry>)>> = Mutex::new(None);
    let mut last = LAST.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some((known, version, entries)) = &*last
        && (known.as_str(), *version) == (text, driver)
    {
        return Ok(entries.clone());
    }
    let entries = parse(text, driver)?;
    *last = Some((text.to_owned(), driver, entries.clone()));
    Ok(entries)
}

fn parse(text: &str, driver: i32) -> Result<Vec<Entry>> {
    let text = without_comments(text);
    let version = word_after(&text, ".version").ok_or(INVALID_PTX)?;
    let (major, minor) = version.split_once('.').ok_or(INVALID_PTX)?;
    let version: (i32, i32) =
        (major.parse().map_err(|_| INVALID_PTX)?, minor.parse().map_err(|_| INVALID_PTX)?);
    if version > newest(driver) {
        return Err(UNSUPPORTED_PTX_VERSION);
    }
    word_after(&text, ".target").ok_or(INVALID_PTX)?;
    text.match_indices(".entry").map(|(at, _)| entry(&text[at + ".entry".len()..])).collect()
}

/// The newest PTX that a driver takes.
fn newest(driver: i32) -> (i32, i32) {
    let (major, minor) = (driver / 1000, driver % 1000 / 10);
    match (major, minor) {
        // CUDA 12.6 has no PTX version of its own.
        (12, 6..) => (8, minor - 1),
        (..=12, _) => (major - 4, minor),
        _ => (9, minor),
    }
}

fn without_comments(text: &str) -> String {
    let mut rest = text;
    let mut kept = String::new();
    while let Some(at) = rest.find("//").into_iter().chain(rest.find("/*")).min() {
        kept.push_str(&rest[..at]);
        kept.push(' ');
        let (end, len) = if rest[at..].starts_with("//") { ("\n", 0) } else { ("*/", 2) };
        rest = rest[at + 2..].find(end).map_or("", |to| &rest[at + 2 + to + len..]);
    }
    kept + rest
}

fn word_after<'a>(text: &'a str, key: &str) -> Option<&'a str> {
    text[text.find(key)? + key.len()..].split_whitespace().next()
}

/// What comes after `.entry`.
fn entry(text: &str) -> Result<Entry> {
    let end = text.find(['(', '{']).ok_or(INVALID_PTX)?;
    let name = text[..end].split_whitespace().next().ok_or(INVALID_PTX)?.to_owned();
    let mut parameters = Vec::new();
    if text[end..].starts_with('(') {
        let close = text[end..].find(')').ok_or(INVALID_PTX)?;
        let list = text[end + 1..end + close].trim();
        for parameter in list.split(',').filter(|_| !list.is_empty()) {
            parameters.push(size(parameter)?);
        }
    }
    Ok(Entry { name, parameters })
}

/// The bytes of a parameter such as `.param .align 8 .b8 shape[24]`.
fn size(parameter: &str) -> Result<usize> {
    let bits = parameter
        .split_whitespace()
        .find_map(|word| match word {
            ".u8" | ".s8" | ".b8" => Some(8),
            ".u16" | ".s16" | ".b16" | ".f16" => Some(16),
            ".u32" | ".s32" | ".b32" | ".f32" => Some(32),
            ".u64" | ".s64" | ".b64" | ".f64" => Some(64),
            _ => None,
        })
        .ok_or(INVALID_PTX)?;
    let count = match parameter.split_once('[') {
        None => 1,
        Some((_, count)) => count.trim().trim_end_matches(']').trim().parse().unwrap_or(0),
    };
    let bytes = bits / 8 * count;
    if bytes == 0 { Err(INVALID_PTX) } else { Ok(bytes) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_and_the_sizes_of_their_parameters_are_read() {
        let text = "//\n// made by hand\n.version 7.0\n.target sm_52\n.address_size 64\n\
            .visible .entry first( /* where */ .param .u64 .ptr .global .align 8 to,\n\
            \t.param .align 8 .b8 shape[24], // how\n .param .f32 x)\n.maxntid 256, 1, 1\n{ ret; }\n\
            .visible .entry second()\n{ ret; }\n.entry third\n{ ret; }";
        let entry = |name: &str, parameters: &[usize]| Entry {
            name: name.into(),
            parameters: parameters.to_vec(),
        };
        let expected = vec![entry("first", &[8, 24, 4]), entry("second", &[]), entry("third", &[])];
        assert_eq!(read(text, 12020), Ok(expected));
    }

    #[test]
    fn an_old_driver_refuses_new_text() {
        let text = |version| format!(".version {version}\n.target sm_52");
        for (driver, newest, too_new) in [
            (11080, "7.8", "8.0"),
            (12020, "8.2", "8.3"),
            (12060, "8.5", "8.6"),
            (13000, "9.0", "9.1"),
        ] {
            assert_eq!(read(&text(newest), driver), Ok(vec![]));
            assert_eq!(read(&text(too_new), driver), Err(UNSUPPORTED_PTX_VERSION));
        }
        assert_eq!(read("no module", 13000), Err(INVALID_PTX));
    }
}
