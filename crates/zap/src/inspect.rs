//! Everything that an image says, as one document: for people and for scripts, never for a restart.

use ciborium::Value as Cbor;
use serde_json::{Map, Value, json};

use crate::files::FileState;
use crate::image::{ImageError, ImageReader, decode};
use crate::memory::{self, VmaState, layout};
use crate::process::state::ProcessState;

/// The document of an image that was opened.
pub fn inspect_image(image: &ImageReader) -> Result<Value, ImageError> {
    let part = |(name, stored, bytes): (&str, u64, u64)| json!({"name": name, "stored_bytes": stored, "bytes": bytes});
    Ok(json!({
        "id": image.id(),
        "parent": image.parent().map(|(id, path)| json!({"id": id, "path": path})),
        "facts": image.facts(),
        "compression": image.compression(),
        "parts": image.parts().map(part).collect::<Vec<_>>(),
        "pod": image.records("pod").map(|(_, body)| document(body)).next(),
        "processes": image.every::<ProcessState>("process")?.iter().map(process).collect::<Vec<_>>(),
        "files": image.every::<FileState>("file")?.iter().map(file).collect::<Vec<_>>(),
        "ipc": image.records("ipc").map(|(_, body)| document(body)).next(),
    }))
}

/// A process: where it stands, and its memory as `/proc/PID/maps` would show it; the rest field by field.
fn process(state: &ProcessState) -> Value {
    let mut shown = serde_json::to_value(state).unwrap_or_default();
    let pages: u64 = state.memory.pages.iter().map(|run| (run.end - run.start) / memory::PAGE).sum();
    shown["memory"] = json!({
        "mappings": state.memory.vmas.iter().map(mapping).collect::<Vec<_>>(),
        "pages": pages,
        "stored_bytes": state.memory.stored_bytes(),
        "executable": state.memory.fields.exe,
        "vdso": state.memory.vdso.as_ref().map(|v| &v.digest),
    });
    shown
}

fn mapping(vma: &VmaState) -> Value {
    let letter = |bit: i32, letter: char| if vma.protection & bit != 0 { letter } else { '-' };
    let protection: String =
        [letter(libc::PROT_READ, 'r'), letter(libc::PROT_WRITE, 'w'), letter(libc::PROT_EXEC, 'x')].iter().collect();
    json!({
        "addresses": format!("{:x}-{:x}", vma.start, vma.end),
        "protection": protection,
        "flags": layout::flag_names(vma.flags),
        "shows": vma.backing,
    })
}

fn file(file: &FileState) -> Value {
    json!({"id": file.id, "kind": file.kind, "state": document(&file.state)})
}

/// A state of any kind, field by field.
fn document(body: &[u8]) -> Value {
    decode::<Cbor>(body).map_or(Value::Null, |value| shown(&value))
}

fn shown(value: &Cbor) -> Value {
    match value {
        Cbor::Integer(number) => integer(i128::from(*number)),
        Cbor::Float(number) => json!(number),
        Cbor::Bool(truth) => json!(truth),
        Cbor::Text(text) => json!(text),
        Cbor::Bytes(bytes) => json!(readable(bytes)),
        Cbor::Array(all) => all.iter().map(shown).collect(),
        Cbor::Map(all) => {
            Value::Object(all.iter().map(|(key, value)| (name(key), shown(value))).collect::<Map<_, _>>())
        }
        Cbor::Tag(_, inner) => shown(inner),
        _ => Value::Null,
    }
}

fn integer(number: i128) -> Value {
    match (u64::try_from(number), i64::try_from(number)) {
        (Ok(number), _) => json!(number),
        (_, Ok(number)) => json!(number),
        _ => json!(number.to_string()),
    }
}

fn name(key: &Cbor) -> String {
    match key {
        Cbor::Text(text) => text.clone(),
        other => shown(other).to_string(),
    }
}

/// Bytes as text where they are text, in hexadecimal where not.
fn readable(bytes: &[u8]) -> String {
    match std::str::from_utf8(bytes) {
        Ok(text) if !text.contains(|c: char| c.is_control() && c != '\n' && c != '\t') => text.to_owned(),
        _ => bytes.iter().map(|b| format!("{b:02x}")).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::encode;

    #[test]
    fn states_are_shown_field_by_field() {
        #[derive(serde::Serialize)]
        struct State {
            #[serde(with = "serde_bytes")]
            path: Vec<u8>,
            flags: i32,
            place: (u64, Option<u8>),
        }
        let body = encode(&State { path: b"/etc/x".to_vec(), flags: -1, place: (u64::MAX, None) });
        assert_eq!(document(&body), json!({"path": "/etc/x", "flags": -1, "place": [u64::MAX, null]}));
        assert_eq!(readable(&[0, 255]), "00ff");
        assert_eq!(document(b"junk"), Value::Null);
    }
}
