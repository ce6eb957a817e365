//! Arrays of every type, byte order, element order and shape, written by the rules: each is read as
//! the rules say, element by element, and refused exactly where they say so.
#![no_main]

use batchline::formats::Npy;
use batchline::{DType, Dataset};
use batchline_fuzz::{check_end, check_error, file, read};
use libfuzzer_sys::arbitrary::{self, Arbitrary};
use libfuzzer_sys::fuzz_target;

#[derive(Debug, Arbitrary)]
struct Array {
    kind: Kind,
    order: Order,
    fortran: bool,
    version: Version,
    dims: Vec<u8>,
    /// Elements, which are repeated.
    data: Vec<u8>,
    spelling: u8,
}

#[derive(Debug, Clone, Copy, Arbitrary)]
enum Kind {
    B1,
    I1,
    I2,
    I4,
    I8,
    U1,
    U2,
    U4,
    U8,
    F2,
    F4,
    F8,
}

#[derive(Debug, Clone, Copy, PartialEq, Arbitrary)]
enum Order {
    Little,
    Big,
    Native,
    None,
    Unsaid,
}

#[derive(Debug, Clone, Copy, Arbitrary)]
enum Version {
    One,
    Two,
    Three,
}

/// Arrays of more bytes are left out.
const LARGEST: u64 = 1 << 12;

fuzz_target!(|array: Array| {
    let size = array.size();
    let dims: Vec<u64> = array.dims.iter().take(10).map(|dim| u64::from(*dim)).collect();
    let bytes = dims.iter().try_fold(size as u64, |n, dim| n.checked_mul(*dim));
    let Some(bytes) = bytes.filter(|bytes| *bytes <= LARGEST) else { return };
    let elements = usize::try_from(bytes).expect("small") / size;
    let data: Vec<u8> =
        array.data.iter().copied().chain([7]).cycle().take(elements * size).collect();
    let path = file("images.npy", &array.saved(&dims, &data));
    let opened = Npy::open(&path, None);
    let good = (1..=8).contains(&dims.len())
        && !dims.contains(&0)
        && (array.order != Order::None || size == 1);
    let dataset = match opened {
        Ok(dataset) => dataset,
        Err(error) => {
            assert!(!good, "a good file was refused: {}", error.chain());
            return check_error(&error);
        }
    };
    assert!(good, "a bad file was accepted");
    let input = dataset.spec().input();
    assert_eq!((dataset.len(), input.dtype), (dims[0], array.delivered_as()));
    assert_eq!(input.shape.dims(), &dims[1..]);
    check_end(&dataset);
    for index in 0..dims[0] {
        let expected: Option<Vec<[u8; 8]>> = places(&dims, array.fortran, index)
            .map(|at| array.element(&data[at * size..][..size]))
            .collect();
        let width = array.delivered_as().size();
        match (read(&dataset, index), expected) {
            (Ok(sample), Some(expected)) => {
                let expected: Vec<u8> =
                    expected.iter().flat_map(|element| native(element, width)).collect();
                assert_eq!(sample, [expected]);
            }
            (Err(error), None) => assert!(error.contains("more than i64"), "{error}"),
            (Ok(_), None) => panic!("sample {index} is more than i64 can hold"),
            (Err(error), Some(_)) => panic!("sample {index}: {error}"),
        }
    }
});

impl Array {
    fn name(&self) -> &'static str {
        match self.kind {
            Kind::B1 => "b1",
            Kind::I1 => "i1",
            Kind::I2 => "i2",
            Kind::I4 => "i4",
            Kind::I8 => "i8",
            Kind::U1 => "u1",
            Kind::U2 => "u2",
            Kind::U4 => "u4",
            Kind::U8 => "u8",
            Kind::F2 => "f2",
            Kind::F4 => "f4",
            Kind::F8 => "f8",
        }
    }

    fn size(&self) -> usize {
        usize::from(self.name().as_bytes()[1] - b'0')
    }

    fn delivered_as(&self) -> DType {
        match self.kind {
            Kind::B1 => DType::Bool,
            Kind::I1 => DType::I8,
            Kind::I2 => DType::I16,
            Kind::I4 | Kind::U2 => DType::I32,
            Kind::I8 | Kind::U4 | Kind::U8 => DType::I64,
            Kind::U1 => DType::U8,
            Kind::F2 => DType::F16,
            Kind::F4 => DType::F32,
            Kind::F8 => DType::F64,
        }
    }

    /// Whether the lowest byte of an element comes first.
    fn is_little(&self) -> bool {
        match self.order {
            Order::Little => true,
            Order::Big => false,
            _ => cfg!(target_endian = "little"),
        }
    }

    /// An element as it is delivered, lowest byte first; `None` where it can't be.
    fn element(&self, stored: &[u8]) -> Option<[u8; 8]> {
        let mut element = [0; 8];
        element[..stored.len()].copy_from_slice(stored);
        if !self.is_little() {
            element[..stored.len()].reverse();
        }
        match self.kind {
            Kind::B1 => Some([u8::from(stored[0] > 0), 0, 0, 0, 0, 0, 0, 0]),
            Kind::U8 if element[7] > 127 => None,
            _ => Some(element),
        }
    }

    fn saved(&self, dims: &[u64], data: &[u8]) -> Vec<u8> {
        let order = match self.order {
            Order::Little => "<",
            Order::Big => ">",
            Order::Native => "=",
            Order::None => "|",
            Order::Unsaid => "",
        };
        let bit = |n: u8| self.spelling >> n & 1 == 1;
        let quote = if bit(0) { '"' } else { '\'' };
        let space = if bit(1) { " " } else { "" };
        let long = if bit(2) { "L" } else { "" };
        let dims: Vec<String> = dims.iter().map(|dim| format!("{dim}{long}")).collect();
        let comma = if dims.len() == 1 || bit(3) && !dims.is_empty() { "," } else { "" };
        let shape = format!("({}{comma})", dims.join(&format!(",{space}")));
        let fortran = if self.fortran { "True" } else { "False" };
        let mut entries = [
            format!("{quote}descr{quote}:{space}{quote}{order}{}{quote}", self.name()),
            format!("{quote}fortran_order{quote}:{space}{fortran}"),
            format!("{quote}shape{quote}:{space}{shape}"),
        ];
        entries.rotate_left(usize::from(self.spelling >> 4) % 3);
        let end = if bit(6) { "," } else { "" };
        let header = format!("{{{}{end}{space}}}{space}\n", entries.join(&format!(",{space}")));
        let mut bytes = b"\x93NUMPY".to_vec();
        let len = u16::try_from(header.len()).expect("short");
        match self.version {
            Version::One => bytes.extend([1, 0]),
            Version::Two => bytes.extend([2, 0]),
            Version::Three => bytes.extend([3, 0]),
        }
        match self.version {
            Version::One => bytes.extend(len.to_le_bytes()),
            _ => bytes.extend(u32::from(len).to_le_bytes()),
        }
        bytes.extend(header.as_bytes());
        bytes.extend(data);
        bytes
    }
}

/// The places of a sample's elements in the file, the last dimension varying fastest.
fn places(dims: &[u64], fortran: bool, index: u64) -> impl Iterator<Item = usize> {
    let row: u64 = dims[1..].iter().product();
    (0..row).map(move |element| {
        // The position in each dimension, from the last one on.
        let (mut rest, mut position) = (element, Vec::new());
        for dim in dims[1..].iter().rev() {
            position.push(rest % dim);
            rest /= dim;
        }
        position.push(index);
        position.reverse();
        let place = |(place, stride): (u64, u64), (at, dim): (&u64, &u64)| {
            (place + at * stride, stride * dim)
        };
        let pairs = position.iter().zip(dims);
        let (place, _) =
            if fortran { pairs.fold((0, 1), place) } else { pairs.rev().fold((0, 1), place) };
        usize::try_from(place).expect("small")
    })
}

/// The lowest `width` bytes in this machine's order.
fn native(element: &[u8; 8], width: usize) -> Vec<u8> {
    let mut bytes = element[..width].to_vec();
    if cfg!(target_endian = "big") {
        bytes.reverse();
    }
    bytes
}
