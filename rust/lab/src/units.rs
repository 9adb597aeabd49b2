//! Bytes for people.

/// `bytes` with a binary suffix and at most one decimal: `64 TiB`, `128.3 GiB`.
pub fn bytes(bytes: u64) -> String {
    const NAMES: [&str; 6] = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"];
    let mut unit = 0;
    let mut value = bytes as f64;
    while value >= 1024.0 && unit + 1 < NAMES.len() {
        value /= 1024.0;
        unit += 1;
    }
    let text = format!("{value:.1}");
    format!("{} {}", text.strip_suffix(".0").unwrap_or(&text), NAMES[unit])
}

#[cfg(test)]
mod tests {
    #[test]
    fn whole_values_have_no_decimals() {
        assert_eq!(super::bytes(64 << 40), "64 TiB");
        assert_eq!(super::bytes(1536), "1.5 KiB");
    }
}
