//! Filling.

use cuda_kernels_native::{Geometry, fill_u64};

#[test]
fn each_word_is_filled_and_no_other() {
    for len in [0, 1, 2, 255, 256, 257, 5000] {
        for geometry in [Geometry::of_elements(len, 1), Geometry { grid: [1, 1], block: [3, 1] }] {
            let len = usize::try_from(len).unwrap();
            let mut words = vec![7; len + 2];
            fill_u64(geometry, &mut words[1..=len], 0x0123_4567_89ab_cdef);
            assert_eq!((words[0], words[len + 1]), (7, 7));
            assert!(words[1..=len].iter().all(|&word| word == 0x0123_4567_89ab_cdef));
        }
    }
}
