//! Registered memory, as devices read it by themselves.

use fake_cuda::codes::*;

use crate::cuda::{Cuda, made};

const READ_ONLY: u32 = 8;

#[test]
fn memory_that_the_process_may_only_read_is_registered_for_reading() {
    let text = "a constant, which lies where nothing can be written";
    let (address, len) = (text.as_ptr().cast_mut(), text.len());
    let cuda = Cuda::new("");
    assert_eq!(cuda.cuMemHostRegister_v2(address, len, 1), INVALID_VALUE);
    assert_eq!(cuda.cuMemHostRegister_v2(address, len, 1 | READ_ONLY), 0);
    let (stream, device) = (cuda.stream(), cuda.device(len));
    assert_eq!(cuda.cuMemcpyHtoDAsync_v2(device, address, len, stream), 0);
    assert_eq!(cuda.cuStreamSynchronize(stream), 0);
    assert_eq!(cuda.read(device, len), text.as_bytes());
    assert_eq!(cuda.cuMemHostUnregister(address), 0);
    assert_eq!(cuda.cuMemHostRegister_v2(64 as *mut u8, 4, 1), INVALID_VALUE);
    cuda.no_violations();
    drop(cuda);
    let cuda = Cuda::new("attribute=113:0");
    let mut own = [0u8; 4];
    assert_eq!(cuda.cuMemHostRegister_v2(own.as_mut_ptr(), 4, 1 | READ_ONLY), NOT_SUPPORTED);
    assert_eq!(cuda.cuMemHostRegister_v2(own.as_mut_ptr(), 4, 1), 0);
    assert_eq!(cuda.cuMemHostUnregister(own.as_mut_ptr()), 0);
}

/// Pieces of one allocation, which share a page. The driver (590.48 was looked at) tells them apart.
fn two_pieces(cuda: &Cuda, own: &mut [u8; 8]) -> (*mut u8, *mut u8) {
    let (first, second) = (own.as_mut_ptr(), own.as_mut_ptr().wrapping_add(4));
    for piece in [first, second] {
        assert_eq!(cuda.cuMemHostRegister_v2(piece, 4, 1 | 2), 0);
    }
    (first, second)
}

#[test]
fn pieces_beside_each_other_are_one_range_for_kernels_and_two_for_copies() {
    let cuda = Cuda::new("");
    let mut own = [1, 2, 3, 4, 5, 6, 7, 8];
    let (first, second) = two_pieces(&cuda, &mut own);
    let again = cuda.cuMemHostRegister_v2(first.wrapping_add(3), 2, 1);
    assert_eq!(again, HOST_MEMORY_ALREADY_REGISTERED);
    for at in 0..8 {
        let address = first.wrapping_add(at);
        let device = made(|device| cuda.cuMemHostGetDevicePointer_v2(device, address, 0));
        assert_eq!(device, address as u64);
    }
    let (stream, device) = (cuda.stream(), cuda.device(8));
    let batch = |from: [u64; 2], lens: [usize; 2]| {
        let (to, attributes) = ([device, device + 4], [1, 0, 0, 0, 0, 0]);
        let (to, from, lens) = (to.as_ptr(), from.as_ptr(), lens.as_ptr());
        cuda.cuMemcpyBatchAsync_v2(to, from, lens, 2, &raw const attributes, &0, 1, stream)
    };
    assert_eq!(batch([second as u64, first as u64], [4, 4]), 0);
    assert_eq!(cuda.cuStreamSynchronize(stream), 0);
    assert_eq!(cuda.read(device, 8), [5, 6, 7, 8, 1, 2, 3, 4]);
    cuda.no_violations();
    assert_eq!(batch([second as u64, first as u64 + 2], [4, 4]), INVALID_VALUE);
    cuda.violated("end behind registered memory of 4 bytes");
}

#[test]
fn a_kernel_reads_all_pieces_from_its_address_on() {
    let cuda = Cuda::new("");
    let mut own = [0; 8];
    let (first, second) = two_pieces(&cuda, &mut own);
    let (stream, fill) = (cuda.stream(), cuda.function("batchline_fill_u64"));
    cuda.fake.hold(stream);
    assert_eq!(cuda.launch(fill, stream, &[second as u64, 0, 0]), 0);
    assert_eq!(cuda.cuMemHostUnregister(first), 0);
    cuda.no_violations();
    assert_eq!(cuda.cuMemHostRegister_v2(first, 4, 1 | 2), 0);
    assert_eq!(cuda.launch(fill, stream, &[first as u64, 0, 0]), 0);
    assert_eq!(cuda.cuMemHostUnregister(second), 0);
    cuda.violated("registered memory");
    // It is not run: what it would read may be gone.
    cuda.fake.release(stream);
    assert_eq!(cuda.cuStreamSynchronize(stream), ILLEGAL_ADDRESS);
    assert!(cuda.fake.violations()[1].contains("was unregistered"));
}
