//! Numbers out of byte slices: no allocation, overflow is a refusal.

/// A cursor over the text of one line.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Cursor<'a> {
    rest: &'a [u8],
}

#[inline]
const fn hex_digit(b: u8) -> u8 {
    match b {
        b'0'..=b'9' => b - b'0',
        b'a'..=b'f' => b - b'a' + 10,
        b'A'..=b'F' => b - b'A' + 10,
        _ => 255,
    }
}

const HEX: [u8; 256] = {
    let mut table = [255u8; 256];
    let mut i = 0;
    while i < 256 {
        table[i] = hex_digit(i as u8);
        i += 1;
    }
    table
};

impl<'a> Cursor<'a> {
    #[inline]
    pub(crate) fn new(rest: &'a [u8]) -> Self {
        Self { rest }
    }

    #[inline]
    pub(crate) fn rest(&self) -> &'a [u8] {
        self.rest
    }

    #[inline]
    pub(crate) fn skip_spaces(&mut self) {
        while let [b' ' | b'\t', tail @ ..] = self.rest {
            self.rest = tail;
        }
    }

    /// Consumes `literal` or refuses.
    #[inline]
    pub(crate) fn lit(&mut self, literal: &[u8]) -> Option<()> {
        self.rest = self.rest.strip_prefix(literal)?;
        Some(())
    }

    /// Consumes `literal` if it is there.
    #[inline]
    pub(crate) fn eat(&mut self, literal: &[u8]) -> bool {
        match self.rest.strip_prefix(literal) {
            Some(tail) => {
                self.rest = tail;
                true
            }
            None => false,
        }
    }

    #[inline]
    pub(crate) fn dec(&mut self) -> Option<u64> {
        let mut value = 0u64;
        let mut n = 0;
        while let Some(&b) = self.rest.get(n) {
            let digit = b.wrapping_sub(b'0');
            if digit > 9 {
                break;
            }
            value = value.checked_mul(10)?.checked_add(u64::from(digit))?;
            n += 1;
        }
        self.rest = &self.rest[n..];
        (n > 0).then_some(value)
    }

    /// Hexadecimal without `0x`.
    #[inline]
    pub(crate) fn hex(&mut self) -> Option<u64> {
        let mut value = 0u64;
        let mut n = 0;
        while let Some(&b) = self.rest.get(n) {
            let digit = HEX[b as usize];
            if digit == 255 {
                break;
            }
            if value >> 60 != 0 {
                return None;
            }
            value = value << 4 | u64::from(digit);
            n += 1;
        }
        self.rest = &self.rest[n..];
        (n > 0).then_some(value)
    }

    /// Hexadecimal with an optional `0x`.
    #[inline]
    pub(crate) fn hex_any(&mut self) -> Option<u64> {
        self.eat(b"0x");
        self.hex()
    }

    /// `0x...` hexadecimal, otherwise a decimal that may be negative (two's complement).
    #[inline]
    pub(crate) fn number(&mut self) -> Option<u64> {
        if self.eat(b"0x") {
            self.hex()
        } else if self.eat(b"-") {
            Some(self.dec()?.wrapping_neg())
        } else {
            self.dec()
        }
    }

    /// The bytes up to the next space (which is consumed) or the end.
    #[inline]
    pub(crate) fn word(&mut self) -> &'a [u8] {
        let end = self.rest.iter().position(|&b| b == b' ').unwrap_or(self.rest.len());
        let word = &self.rest[..end];
        self.rest = self.rest[end..].strip_prefix(b" ").unwrap_or(&self.rest[end..]);
        word
    }

    /// Consumes everything up to and including the literal.
    pub(crate) fn past(&mut self, literal: &[u8]) -> Option<()> {
        let at = memchr::memmem::find(self.rest, literal)?;
        self.rest = &self.rest[at + literal.len()..];
        Some(())
    }
}

/// The value of `key=` in a list of `key=value` words; `None` when it is missing or no number.
pub(crate) fn keyed(text: &[u8], key: &[u8]) -> Option<u64> {
    let mut from = 0;
    while let Some(at) = memchr::memmem::find(&text[from..], key) {
        let start = from + at;
        let end = start + key.len();
        let bounded = start == 0 || text[start - 1] == b' ';
        if bounded && text.get(end) == Some(&b'=') {
            return Cursor::new(&text[end + 1..]).number();
        }
        from = end;
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_overlong_number_is_refused_not_wrapped() {
        assert_eq!(Cursor::new(b"ffffffffffffffff").hex(), Some(u64::MAX));
        assert_eq!(Cursor::new(b"1ffffffffffffffff").hex(), None);
        assert_eq!(Cursor::new(b"18446744073709551615").dec(), Some(u64::MAX));
        assert_eq!(Cursor::new(b"18446744073709551616").dec(), None);
        assert_eq!(Cursor::new(b"").hex(), None);
    }

    #[test]
    fn a_key_matches_only_as_a_whole_word() {
        let text = b"root=0xff spt=0x10 role=0x3784";
        assert_eq!(keyed(text, b"spt"), Some(0x10));
        assert_eq!(keyed(b"min_level=3 level=2", b"level"), Some(2));
        assert_eq!(keyed(text, b"refs"), None);
    }
}
