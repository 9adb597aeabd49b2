//! The description of one event: the `format` file that the kernel gives for it.
//!
//! ```text
//! name: kvm_tdp_mmu_spte_changed
//! ID: 1484
//! format:
//!     field:u64 gfn;  offset:8;  size:8;  signed:0;
//! print fmt: "as id %d gfn %llx ...", REC->as_id, REC->gfn
//! ```

/// Where a field lies in a record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Field {
    pub(crate) offset: u32,
    pub(crate) size: u32,
    pub(crate) signed: bool,
}

/// One event's description.
#[derive(Clone, Debug, Default)]
pub(crate) struct Layout {
    pub(crate) name: String,
    pub(crate) id: u16,
    pub(crate) fields: Vec<(String, Field)>,
    pub(crate) print: String,
}

impl Layout {
    /// Reads a format file; `Err` is the rule that it breaks.
    pub(crate) fn parse(text: &[u8]) -> Result<Self, &'static str> {
        let text = String::from_utf8_lossy(text);
        let mut layout = Layout::default();
        let mut id = None;
        for line in text.lines() {
            let line = line.trim();
            if let Some(name) = line.strip_prefix("name:") {
                name.trim().clone_into(&mut layout.name);
            } else if let Some(number) = line.strip_prefix("ID:") {
                id = number.trim().parse::<u16>().ok();
            } else if let Some(print) = line.strip_prefix("print fmt:") {
                print.trim().clone_into(&mut layout.print);
            } else if let Some(rest) = line.strip_prefix("field:") {
                layout
                    .fields
                    .push(field(rest).ok_or("a field must be `TYPE NAME; offset:N; size:N; signed:N;`")?);
            }
        }
        if layout.name.is_empty() {
            return Err("an event's description must have a name");
        }
        layout.id = id.ok_or("an event's description must have an ID below 65536")?;
        Ok(layout)
    }

    pub(crate) fn field(&self, name: &str) -> Option<Field> {
        self.fields.iter().find(|f| f.0 == name).map(|f| f.1)
    }
}

/// `TYPE NAME[n]; offset:8; size:8; signed:0;`
pub(crate) fn field(text: &str) -> Option<(String, Field)> {
    let mut parts = text.split(';').map(str::trim);
    let declaration = parts.next()?;
    let name = declaration.split('[').next()?.trim_end().rsplit([' ', '*', '\t']).next()?;
    let (mut offset, mut size, mut signed) = (None, None, false);
    for part in parts {
        match part.split_once(':') {
            Some(("offset", n)) => offset = n.trim().parse().ok(),
            Some(("size", n)) => size = n.trim().parse().ok(),
            Some(("signed", n)) => signed = n.trim() == "1",
            _ => {}
        }
    }
    Some((name.to_owned(), Field { offset: offset?, size: size?, signed }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_description_gives_name_number_and_the_places_of_its_fields() {
        let text = b"name: put_root\nID: 1500\nformat:\n\tfield:int common_pid;\toffset:4;\tsize:4;\tsigned:1;\n\n\
                     \tfield:s32 refs;\toffset:16;\tsize:4;\tsigned:1;\n\tfield:u64 * sptep;\toffset:24;\tsize:8;\tsigned:0;\n\
                     \tfield:char buf[];\toffset:32;\tsize:0;\tsigned:0;\n\nprint fmt: \"(%lx)\", REC->__probe_ip\n";
        let layout = Layout::parse(text).expect("well-formed");
        assert_eq!((layout.name.as_str(), layout.id), ("put_root", 1500));
        assert_eq!(layout.field("refs"), Some(Field { offset: 16, size: 4, signed: true }));
        assert_eq!(layout.field("sptep").map(|f| f.offset), Some(24));
        assert_eq!(layout.field("buf").map(|f| f.size), Some(0));
        assert!(Layout::parse(b"name: x\nID: 70000\n").is_err());
        assert!(Layout::parse(b"\xff\xfe\x00").is_err());
    }
}
