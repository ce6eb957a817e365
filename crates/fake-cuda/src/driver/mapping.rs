//! What the system lets the process do with its memory.

/// Whether all of a range is mapped, for reading and, if asked for, for writing.
pub(crate) fn allows(address: usize, len: usize, writing: bool) -> bool {
    let Ok(maps) = std::fs::read_to_string("/proc/self/maps") else { return true };
    covers(&maps, address, len, writing)
}

/// The same of a list in the form of `/proc/self/maps`, which is sorted.
fn covers(maps: &str, mut address: usize, len: usize, writing: bool) -> bool {
    let end = address.saturating_add(len);
    for line in maps.lines() {
        let Some((range, rest)) = line.split_once(' ') else { continue };
        let Some((from, to)) = range.split_once('-') else { continue };
        let number = |text| usize::from_str_radix(text, 16).unwrap_or(0);
        if number(to) <= address {
            continue;
        }
        let rights = rest.as_bytes();
        let allowed = rights.first() == Some(&b'r') && (!writing || rights.get(1) == Some(&b'w'));
        if number(from) > address || !allowed {
            return false;
        }
        address = number(to);
        if address >= end {
            return true;
        }
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_may_span_several_mappings() {
        let maps =
            "1000-3000 rw-p 0 08:01 7 /a\n3000-4000 r--s 0 08:01 7 /b\n5000-6000 rw-p 0 0 0\n";
        assert!(covers(maps, 0x1001, 0x1fff, true));
        assert!(covers(maps, 0x2000, 0x2000, false));
        assert!(!covers(maps, 0x2000, 0x2000, true), "part of it is for reading");
        assert!(!covers(maps, 0x3000, 0x1001, false), "it ends in nothing");
        assert!(!covers(maps, 0x3000, 0x3000, false), "there is a hole in it");
        assert!(!covers(maps, 0x10, 1, false));
        assert!(!covers(maps, 0x7000, 1, false));
    }

    #[test]
    fn it_knows_what_this_process_may_do() {
        let own = vec![0u8; 1 << 16];
        assert!(allows(own.as_ptr() as usize, own.len(), true));
        let text = "a constant";
        assert!(allows(text.as_ptr() as usize, text.len(), false));
        assert!(!allows(text.as_ptr() as usize, text.len(), true));
        assert!(!allows(64, 1, false));
    }
}
