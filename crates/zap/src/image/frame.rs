//! Records of state: length-framed, tagged with (kind, version), checksummed. The same frames go over a wire.
//!
//! `length of body: u32 · version: u16 · length of kind: u8 · kind · body · CRC-32 of all before: u32`, little-endian.

/// One record, borrowed from the bytes it was found in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Record<'a> {
    pub(super) kind: &'a str,
    pub(super) version: u16,
    pub(super) body: &'a [u8],
}

/// A body longer than this is not believed.
const LONGEST: usize = 1 << 30;
const HEADER: usize = 7;

/// Appends a record to `out`.
pub(super) fn push(out: &mut Vec<u8>, record: Record<'_>) {
    assert!(record.body.len() <= LONGEST && record.kind.len() <= 255, "a record of kind {} is too long", record.kind);
    let start = out.len();
    out.extend_from_slice(&(record.body.len() as u32).to_le_bytes());
    out.extend_from_slice(&record.version.to_le_bytes());
    out.push(record.kind.len() as u8);
    out.extend_from_slice(record.kind.as_bytes());
    out.extend_from_slice(record.body);
    let sum = crc32fast::hash(&out[start..]);
    out.extend_from_slice(&sum.to_le_bytes());
}

/// Takes the first record off `bytes`. The error says what is wrong with it.
pub(super) fn pull<'a>(bytes: &mut &'a [u8]) -> Result<Record<'a>, String> {
    let header = bytes.get(..HEADER).ok_or("a record is cut off")?;
    let length = u32::from_le_bytes([header[0], header[1], header[2], header[3]]) as usize;
    let version = u16::from_le_bytes([header[4], header[5]]);
    if length > LONGEST {
        return Err(format!("a record claims {length} bytes"));
    }
    let kind_end = HEADER + header[6] as usize;
    let end = kind_end + length;
    let framed = bytes.get(..end + 4).ok_or("a record is cut off")?;
    let sum = u32::from_le_bytes([framed[end], framed[end + 1], framed[end + 2], framed[end + 3]]);
    if crc32fast::hash(&framed[..end]) != sum {
        return Err("the checksum of a record is wrong".into());
    }
    let kind = std::str::from_utf8(&framed[HEADER..kind_end]).map_err(|_| "the kind of a record is not text")?;
    *bytes = &bytes[end + 4..];
    Ok(Record { kind, version, body: &framed[kind_end..end] })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exact_bytes() {
        let mut out = Vec::new();
        push(&mut out, Record { kind: "pod", version: 2, body: b"\x01\x02\x03" });
        let mut expected = vec![3, 0, 0, 0, 2, 0, 3, b'p', b'o', b'd', 1, 2, 3];
        expected.extend_from_slice(&crc32fast::hash(&expected).to_le_bytes());
        assert_eq!(out, expected);
        assert_eq!(out[13..], [0x51, 0xcc, 0x59, 0xa3]);
    }

    #[test]
    fn a_cut_record_is_an_error() {
        let mut out = Vec::new();
        push(&mut out, Record { kind: "memory", version: 1, body: &[7; 40] });
        for cut in 0..out.len() {
            assert!(pull(&mut &out[..cut]).is_err());
        }
        assert_eq!(pull(&mut &out[..]).unwrap().body, [7; 40]);
    }
}
