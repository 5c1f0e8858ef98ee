//! Changes of what an image says: its framing and checksums stay right, its contents become whatever comes.

use std::fmt;
use std::io::{Read, Write};
use std::path::Path;

use ciborium::Value;
use proptest::prelude::*;
use proptest::sample::Index;
use zap::image::{Compression, DataRef, ImageReader, ImageWriter};

/// An image taken apart.
pub(crate) struct Parts {
    pub(crate) records: Vec<(String, u16, Value)>,
    data: Vec<u8>,
    layers: Vec<(String, Vec<u8>)>,
}

impl Parts {
    pub(crate) fn of(image: &Path) -> Parts {
        let reader = ImageReader::open(image).unwrap();
        let mut records = Vec::new();
        let kinds: Vec<String> = reader.contents().map(|(kind, ..)| kind.to_owned()).collect();
        let mut seen: Vec<&String> = Vec::new();
        for kind in &kinds {
            if !seen.contains(&kind) {
                seen.push(kind);
                let value = |body: &[u8]| ciborium::from_reader::<Value, _>(body).unwrap();
                records.extend(reader.records(kind).map(|(version, body)| (kind.clone(), version, value(body))));
            }
        }
        let length = reader.parts().find(|part| part.0 == "data").unwrap().2;
        let data = reader.read(DataRef { offset: 0, length }).unwrap();
        let layer = |name: &str| {
            let mut bytes = Vec::new();
            reader.layer(name).unwrap().read_to_end(&mut bytes).unwrap();
            (name.to_owned(), bytes)
        };
        let layers = reader.layers().map(layer).collect();
        Parts { records, data, layers }
    }

    /// The same with less data, and without the pages that were in the rest of it.
    pub(crate) fn with_little_data(mut self, bytes: usize) -> Parts {
        self.data.truncate(bytes);
        for (_, _, process) in self.records.iter_mut().filter(|record| record.0 == "process") {
            let memory = inside(process, "memory");
            let pages = inside(memory, "pages").as_array_mut().unwrap();
            let number = |value: &Value| value.as_integer().map_or(0, i128::from);
            pages.retain(|run| {
                let run = run.as_array().unwrap();
                number(&run[2]) + number(&run[1]) - number(&run[0]) <= bytes as i128
            });
        }
        self
    }

    /// Puts an image of such records together, with the rest as it was.
    pub(crate) fn write(&self, at: &Path, records: &[(String, u16, Value)]) {
        let mut writer = ImageWriter::create(at, Compression::None).unwrap();
        records.iter().for_each(|(kind, version, value)| writer.record(kind, *version, value));
        writer.data.append(self.data.clone());
        for (name, bytes) in &self.layers {
            let mut layer = writer.layer(name).unwrap();
            layer.write_all(bytes).unwrap();
            writer.close_layer(layer).unwrap();
        }
        writer.finish(&serde_json::json!({})).unwrap();
    }
}

fn inside<'v>(value: &'v mut Value, name: &str) -> &'v mut Value {
    let fields = value.as_map_mut().unwrap();
    &mut fields.iter_mut().find(|(key, _)| key.as_text() == Some(name)).unwrap().1
}

/// One change.
#[derive(Clone)]
pub(crate) struct Change {
    record: Index,
    /// The way down from the top of the record.
    path: Vec<Index>,
    how: How,
    pick: Index,
}

impl fmt::Debug for Change {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.how)
    }
}

#[derive(Clone, Copy, Debug)]
enum How {
    /// A number, a text, bytes become others of their kind.
    Other,
    /// Another type altogether.
    Strange,
    /// An element or field is there twice, is gone, changes places with its neighbour, is there very often.
    Twice,
    Gone,
    Swapped,
    Often,
    /// The whole record.
    RecordTwice,
    RecordGone,
    RecordUnknown,
    RecordNewer,
}

pub(crate) fn change() -> impl Strategy<Value = Change> {
    let how = prop_oneof![
        12 => Just(How::Other),
        2 => Just(How::Strange),
        2 => Just(How::Twice),
        2 => Just(How::Gone),
        1 => Just(How::Swapped),
        1 => Just(How::Often),
        1 => Just(How::RecordTwice),
        1 => Just(How::RecordGone),
        1 => Just(How::RecordUnknown),
        1 => Just(How::RecordNewer),
    ];
    let path = proptest::collection::vec(any::<Index>(), 1..8);
    (any::<Index>(), path, how, any::<Index>()).prop_map(|(record, path, how, pick)| Change { record, path, how, pick })
}

impl Change {
    pub(crate) fn apply(&self, records: &mut Vec<(String, u16, Value)>) -> String {
        let at = self.record.index(records.len());
        let said = format!("{} {} {:?}", records[at].0, at, self.how);
        match self.how {
            How::RecordTwice => records.push(records[at].clone()),
            How::RecordGone => drop(records.remove(at)),
            How::RecordUnknown => records[at].0 = "surprise".into(),
            How::RecordNewer => records[at].1 = u16::MAX,
            _ => return said + &within(&mut records[at].2, &self.path, self),
        }
        said
    }
}

/// Changes something on the way down; says where and to what.
fn within(value: &mut Value, path: &[Index], change: &Change) -> String {
    let Some((step, rest)) = path.split_first() else { return here(value, change) };
    match value {
        Value::Array(elements) if !elements.is_empty() => {
            let at = step.index(elements.len());
            let last = rest.is_empty() || matches!(&elements[at], Value::Integer(_) | Value::Bool(_) | Value::Null);
            match change.how {
                How::Twice if last => elements.insert(at, elements[at].clone()),
                How::Gone if last => drop(elements.remove(at)),
                How::Swapped if last => elements.swap(at, change.pick.index(at + 1)),
                How::Often if last => {
                    let many = std::iter::repeat_n(elements[at].clone(), 10_000);
                    elements.extend(many);
                }
                _ => return format!("[{at}]") + &within(&mut elements[at], rest, change),
            }
            format!("[{at}]")
        }
        Value::Map(fields) if !fields.is_empty() => {
            let at = step.index(fields.len());
            let name = fields[at].0.as_text().unwrap_or("?").to_owned();
            match change.how {
                How::Twice if rest.is_empty() => fields.push(fields[at].clone()),
                How::Gone if rest.is_empty() => drop(fields.remove(at)),
                _ => return format!(".{name}") + &within(&mut fields[at].1, rest, change),
            }
            format!(".{name}")
        }
        Value::Bytes(bytes) => {
            // The states of files are values in themselves.
            let inner = ciborium::from_reader::<Value, _>(&bytes[..]);
            match inner {
                Ok(mut inner @ (Value::Map(_) | Value::Array(_))) => {
                    let said = within(&mut inner, path, change);
                    bytes.clear();
                    ciborium::into_writer(&inner, bytes).unwrap();
                    format!("<{said}>")
                }
                _ => here(value, change),
            }
        }
        _ => here(value, change),
    }
}

fn here(value: &mut Value, change: &Change) -> String {
    const NUMBERS: [i128; 14] = [
        0,
        -1,
        1,
        2,
        7,
        4095,
        4096,
        i32::MAX as i128,
        i32::MIN as i128,
        u32::MAX as i128,
        i64::MAX as i128,
        i64::MIN as i128,
        u64::MAX as i128,
        1 << 40,
    ];
    const WORDS: [&str; 8] =
        ["", ".", "..", "../../../../../../tmp/zap-hostile", "/etc/passwd", "/proc/1/root", "a\0b", "/dev/null"];
    let number = || NUMBERS[change.pick.index(NUMBERS.len())];
    let word = || WORDS[change.pick.index(WORDS.len())];
    let integer = |number: i128| Value::Integer(number.try_into().unwrap());
    *value = match (&*value, change.how) {
        (Value::Integer(_), How::Other) => integer(number()),
        (Value::Text(_), How::Other) => Value::Text(word().into()),
        (Value::Bytes(_), How::Other) => Value::Bytes(word().into()),
        (Value::Bool(it), _) => Value::Bool(!it),
        (Value::Null, _) => integer(number()),
        (_, How::Strange) => match change.pick.index(4) {
            0 => Value::Null,
            1 => Value::Text(word().into()),
            2 => integer(number()),
            _ => Value::Array(Vec::new()),
        },
        (Value::Array(_), _) => Value::Array(Vec::new()),
        (Value::Map(_), _) => Value::Map(Vec::new()),
        (other, _) => other.clone(),
    };
    let shown = format!("{value:?}");
    format!(" = {}", &shown[..shown.len().min(60)])
}
