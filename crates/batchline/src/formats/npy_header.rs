//! The header of an npy file: a Python dict of three keys, written as a literal, such as
//! `{'descr': '<f4', 'fortran_order': False, 'shape': (60000, 28, 28), }`.
//!
//! numpy reads it by evaluating Python. This parser knows exactly the literals that a header can
//! hold, and takes anything else for an error. It works on bytes, moves forward only, and keeps
//! nothing larger than the file's own header.

use super::array::{Encoding, Stored};
use crate::DType;

/// How much of a malformed header an error quotes, in bytes.
const QUOTED: usize = 40;

/// The three values.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) descr: Descr,
    pub(super) fortran: bool,
    pub(super) shape: Vec<u64>,
}

/// The element type as the header gives it.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Descr {
    /// A type string, such as `<f4`.
    Simple(String),
    /// A list of fields, which is not read any further.
    Structure,
}

/// Parses a header. Errors say what is wrong and where, counted in bytes from its start.
pub(super) fn parse(text: &[u8]) -> Result<Header, String> {
    if let Some(at) = text.iter().position(|byte| !byte.is_ascii()) {
        return Err(format!("byte {at} is 0x{:02x}, which is not ASCII", text[at]));
    }
    let mut parser = Parser { text, at: 0 };
    let (mut descr, mut fortran, mut shape) = (None, None, None);
    parser.expect(b'{')?;
    while !parser.accept(b'}') {
        let (key_at, key) = (parser.at, parser.string()?);
        parser.expect(b':')?;
        let twice = match key {
            "descr" => {
                let value = parser.descr()?;
                // What a structure's fields are doesn't matter: it is refused.
                if value == Descr::Structure {
                    return Ok(Header { descr: value, fortran: false, shape: Vec::new() });
                }
                descr.replace(value).is_some()
            }
            "fortran_order" => fortran.replace(parser.boolean()?).is_some(),
            "shape" => shape.replace(parser.shape()?).is_some(),
            _ => {
                return Err(format!(
                    "unknown key {} at byte {key_at}: only descr, fortran_order and shape may be",
                    quoted(key)
                ));
            }
        };
        if twice {
            return Err(format!("the key {} comes twice, again at byte {key_at}", quoted(key)));
        }
        if !parser.accept(b',') {
            parser.expect(b'}')?;
            break;
        }
    }
    if parser.peek().is_some() {
        return Err(parser.unexpected("nothing but spaces after the closing brace"));
    }
    let missing = |key: &str| format!("the key '{key}' is missing");
    Ok(Header {
        descr: descr.ok_or_else(|| missing("descr"))?,
        fortran: fortran.ok_or_else(|| missing("fortran_order"))?,
        shape: shape.ok_or_else(|| missing("shape"))?,
    })
}

struct Parser<'a> {
    text: &'a [u8],
    at: usize,
}

impl<'a> Parser<'a> {
    /// The next byte that is no white space, which becomes the current one.
    fn peek(&mut self) -> Option<u8> {
        while matches!(self.text.get(self.at), Some(b' ' | b'\n' | b'\t' | b'\r')) {
            self.at += 1;
        }
        self.text.get(self.at).copied()
    }

    fn accept(&mut self, byte: u8) -> bool {
        let found = self.peek() == Some(byte);
        self.at += usize::from(found);
        found
    }

    fn expect(&mut self, byte: u8) -> Result<(), String> {
        if self.accept(byte) {
            return Ok(());
        }
        Err(self.unexpected(&format!("'{}'", char::from(byte))))
    }

    fn unexpected(&mut self, expected: &str) -> String {
        match self.peek() {
            None => format!("it ends where {expected} should be"),
            Some(_) => {
                let rest = str::from_utf8(&self.text[self.at..]).unwrap_or("");
                format!(
                    "{expected} should be at byte {}, found {}",
                    self.at,
                    quoted(rest.trim_end())
                )
            }
        }
    }

    /// A string in either kind of quotes, without escapes.
    fn string(&mut self) -> Result<&'a str, String> {
        let quote = match self.peek() {
            Some(quote @ (b'\'' | b'"')) => quote,
            _ => return Err(self.unexpected("a string")),
        };
        let start = self.at + 1;
        let rest = self.text.get(start..).unwrap_or(&[]);
        let len = rest
            .iter()
            .position(|byte| *byte == quote)
            .ok_or_else(|| format!("the string that starts at byte {} has no end", self.at))?;
        let text = &rest[..len];
        if text.contains(&b'\\') {
            return Err(format!("the string at byte {} has a backslash in it", self.at));
        }
        self.at = start + len + 1;
        str::from_utf8(text).map_err(|err| err.to_string())
    }

    fn descr(&mut self) -> Result<Descr, String> {
        match self.peek() {
            // A list of fields, or a tuple of a type and the shape of its elements.
            Some(b'[' | b'(') => Ok(Descr::Structure),
            _ => Ok(Descr::Simple(self.string()?.to_owned())),
        }
    }

    fn boolean(&mut self) -> Result<bool, String> {
        self.peek();
        for (word, value) in [("True", true), ("False", false)] {
            let rest = &self.text[self.at..];
            if rest.starts_with(word.as_bytes())
                && !rest.get(word.len()).is_some_and(u8::is_ascii_alphanumeric)
            {
                self.at += word.len();
                return Ok(value);
            }
        }
        Err(self.unexpected("True or False"))
    }

    /// A tuple of numbers: `()`, `(3,)`, `(3, 4)` or `(3, 4,)`.
    fn shape(&mut self) -> Result<Vec<u64>, String> {
        self.peek();
        let start = self.at;
        self.expect(b'(')?;
        let (mut dims, mut commas) = (Vec::new(), 0usize);
        while !self.accept(b')') {
            dims.push(self.extent()?);
            // NumPy's own limit; a header of gigabytes would make a list of gigabytes.
            if dims.len() > 64 {
                return Err(format!("the shape at byte {start} has more than 64 dimensions"));
            }
            if !self.accept(b',') {
                self.expect(b')')?;
                break;
            }
            commas += 1;
        }
        if dims.len() == 1 && commas == 0 {
            return Err(format!("the shape at byte {start} is a number, not a tuple: (3,) is one"));
        }
        Ok(dims)
    }

    fn extent(&mut self) -> Result<u64, String> {
        if self.peek() == Some(b'-') {
            return Err(format!("a negative extent in the shape, at byte {}", self.at));
        }
        let rest = &self.text[self.at..];
        let len = rest.iter().take_while(|byte| byte.is_ascii_digit()).count();
        if len == 0 {
            return Err(self.unexpected("a number or ')'"));
        }
        let digits = str::from_utf8(&rest[..len]).unwrap_or("");
        let extent = digits.parse().map_err(|_| {
            format!("the extent {} at byte {} does not fit 64 bits", quoted(digits), self.at)
        })?;
        self.at += len;
        // Python 2 marked long numbers so.
        if self.text.get(self.at) == Some(&b'L') {
            self.at += 1;
        }
        Ok(extent)
    }
}

/// Text as an error shows it: escaped, and not all of a long one. It must be ASCII.
fn quoted(text: &str) -> String {
    match text.get(..QUOTED) {
        Some(start) if text.len() > QUOTED => format!("{start:?}…"),
        _ => format!("{text:?}"),
    }
}

/// What a type string means. Errors say how to save such an array so that it can be read.
pub(super) fn dtype(descr: &Descr) -> Result<Stored, String> {
    let text = match descr {
        Descr::Simple(text) => text.as_str(),
        Descr::Structure => {
            return Err("holds structures: save each field as an array by itself, with \
                        `numpy.save(name, a['field'])`"
                .to_owned());
        }
    };
    let (order, kind) = match text.split_at_checked(1) {
        Some((order @ ("<" | ">" | "=" | "|"), kind)) => (order, kind),
        // No byte order means this machine's.
        _ => ("=", text),
    };
    let encoding = match kind {
        "b1" => Encoding::Truth,
        "i1" => Encoding::Plain(DType::I8),
        "i2" => Encoding::Plain(DType::I16),
        "i4" => Encoding::Plain(DType::I32),
        "i8" => Encoding::Plain(DType::I64),
        "u1" => Encoding::Plain(DType::U8),
        "u2" => Encoding::U16,
        "u4" => Encoding::U32,
        "u8" => Encoding::U64,
        "f2" => Encoding::Plain(DType::F16),
        "f4" => Encoding::Plain(DType::F32),
        "f8" => Encoding::Plain(DType::F64),
        _ => return Err(refusal(text, kind)),
    };
    let swapped = match order {
        "<" => cfg!(target_endian = "big"),
        ">" => cfg!(target_endian = "little"),
        _ => false,
    };
    let stored = Stored { encoding, swapped };
    if order == "|" && stored.size() > 1 {
        return Err(format!(
            "dtype {}: elements of {} bytes need a byte order, < or >",
            quoted(text),
            stored.size()
        ));
    }
    Ok(stored)
}

fn refusal(text: &str, kind: &str) -> String {
    let (what, remedy) = match kind.as_bytes().first() {
        Some(b'O') => {
            return format!(
                "dtype {}: pickled objects are refused: they can run code",
                quoted(text)
            );
        }
        Some(b'c') if kind == "c8" => ("complex numbers", "save `a.view('f4')`, pairs of floats"),
        Some(b'c') => ("complex numbers", "save `a.view('f8')` or `a.astype('c8').view('f4')`"),
        Some(b'f') => ("a float that few machines have", "save `a.astype('f8')`"),
        Some(b'S' | b'a' | b'U') => {
            ("strings", "save their numbers instead: `numpy.unique(a, return_inverse=True)[1]`")
        }
        Some(b'M') => ("dates", "save `a.view('i8')`, or differences as `f4`"),
        Some(b'm') => ("time spans", "save `a.view('i8')`, or `a / numpy.timedelta64(1, 's')`"),
        Some(b'V') => (
            "raw bytes, as which numpy also saves bfloat16",
            "save `a.view('u1')`, or `a.astype('f4')` where they are numbers",
        ),
        _ => ("nothing that is known here", "save `a.astype('f4')` or another plain number type"),
    };
    format!("dtype {} is {what}: {remedy}", quoted(text))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text_of(header: &str) -> String {
        parse(header.as_bytes()).unwrap_err()
    }

    #[test]
    fn what_numpy_writes_is_read() {
        let header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (3, 4), }      \n";
        let expected =
            Header { descr: Descr::Simple("<f4".to_owned()), fortran: false, shape: vec![3, 4] };
        assert_eq!(parse(header), Ok(expected));
    }

    #[test]
    fn other_spellings_of_the_same_are_read() {
        let header = b" {\"shape\":(3L,4L,),\"descr\":\"f4\"\n,\t\"fortran_order\":True}";
        let expected =
            Header { descr: Descr::Simple("f4".to_owned()), fortran: true, shape: vec![3, 4] };
        assert_eq!(parse(header), Ok(expected));
    }

    #[test]
    fn shapes() {
        let shape = |text: &str| Parser { text: text.as_bytes(), at: 0 }.shape();
        assert_eq!(shape("()"), Ok(vec![]));
        assert_eq!(shape("(3,)"), Ok(vec![3]));
        assert_eq!(shape("( 18446744073709551615 , 0 )"), Ok(vec![u64::MAX, 0]));
        for bad in ["", "(", "3", "(3)", "(,)", "(3", "(3,", "(3,,)", "(3 4)", "[3]", "(3.0,)"] {
            assert!(shape(bad).is_err(), "{bad}");
        }
        assert_eq!(shape("(2, -1)").unwrap_err(), "a negative extent in the shape, at byte 4");
        assert!(shape("(18446744073709551616,)").unwrap_err().contains("does not fit 64 bits"));
        assert!(shape(&format!("({},)", "9".repeat(1000))).unwrap_err().len() < 120);
    }

    #[test]
    fn malformed_headers_say_where() {
        assert_eq!(text_of(""), "it ends where '{' should be");
        assert_eq!(text_of("{'descr"), "the string that starts at byte 1 has no end");
        assert_eq!(text_of("{'descr': 'a\\'"), "the string at byte 10 has a backslash in it");
        assert_eq!(
            text_of("{'shape': (1,)} x"),
            "nothing but spaces after the closing brace should be at byte 16, found \"x\""
        );
        assert_eq!(
            text_of("{'fortran_order': Falsey"),
            "True or False should be at byte 18, found \"Falsey\""
        );
        assert_eq!(
            text_of("{'fortran_order': 0}"),
            "True or False should be at byte 18, found \"0}\""
        );
        assert_eq!(
            text_of("{'a': 1}"),
            "unknown key \"a\" at byte 1: only descr, fortran_order and shape may be"
        );
        assert_eq!(
            text_of("{'shape': (1,), 'shape': (1,)}"),
            "the key \"shape\" comes twice, again at byte 16"
        );
        assert_eq!(text_of("{'shape': (1,)}"), "the key 'descr' is missing");
        assert_eq!(
            text_of("{'descr': '|u1' 'shape'"),
            "'}' should be at byte 16, found \"'shape'\""
        );
    }

    #[test]
    fn dtypes_without_a_byte_order_that_need_one_are_refused() {
        let simple = |text: &str| dtype(&Descr::Simple(text.to_owned()));
        assert!(simple("|f4").unwrap_err().contains("need a byte order"));
        assert!(simple("|u1").is_ok() && simple("<u1").is_ok() && simple("f4").is_ok());
        for bad in ["", "<", "é", "<é", "<f", "<f3", "<f44", "<<f4", "f4 "] {
            assert!(simple(bad).is_err(), "{bad}");
        }
    }
}
