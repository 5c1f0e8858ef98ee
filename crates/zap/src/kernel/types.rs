//! The running kernel's types (BTF), as far as they say where the members of structures are.

use std::collections::{HashMap, HashSet};

const STRUCTURE: u32 = 4;
const UNION: u32 = 5;
const FUNCTION: u32 = 12;
const HEAD: usize = 12;
/// Members without a name lie in each other no deeper than this.
const DEPTH: usize = 16;

/// The types of a kernel.
pub(crate) struct Types<'t> {
    bytes: &'t [u8],
    names: &'t [u8],
    /// Where the type of a number begins; there is no type 0.
    places: Vec<usize>,
    /// The numbers of the structures that were asked for.
    found: HashMap<&'t str, usize>,
    /// The numbers of the functions that were.
    functions: HashMap<&'t str, u32>,
}

/// What every type begins with.
struct Head {
    name: u32,
    kind: u32,
    count: usize,
    has_bit_fields: bool,
    size: u32,
}

impl<'t> Types<'t> {
    /// Finds the structures and the functions of these names; `None` if the bytes are no types.
    pub(crate) fn parse(bytes: &'t [u8], wanted: &HashSet<&str>, functions: &[&'t str]) -> Option<Types<'t>> {
        const MAGIC: &[u8] = &[0x9f, 0xeb];
        if bytes.get(..2)? != MAGIC {
            return None;
        }
        let header = |at| word(bytes, at).map(|word| word as usize);
        let after = header(4)?;
        let part = |from: usize, length: usize| bytes.get(after..)?.get(from..)?.get(..length);
        let (types, names) = (part(header(8)?, header(12)?)?, part(header(16)?, header(20)?)?);
        let mut all = Types { bytes: types, names, places: vec![0], found: HashMap::new(), functions: HashMap::new() };
        let mut at = 0;
        while at < types.len() {
            let head = all.head(at)?;
            if head.kind == STRUCTURE
                && let Some(name) = all.name(head.name)
                && wanted.contains(name)
            {
                all.found.insert(name, all.places.len());
            }
            if head.kind == FUNCTION
                && let Some(name) = functions.iter().find(|name| all.is_called(head.name, name))
            {
                all.functions.insert(name, all.places.len() as u32);
            }
            all.places.push(at);
            at += HEAD + following(&head)?;
        }
        Some(all)
    }

    /// The number of a function that was asked for.
    pub(crate) fn function(&self, name: &str) -> Option<u32> {
        self.functions.get(name).copied()
    }

    /// How large a structure that was found is, in bytes.
    pub(crate) fn size(&self, structure: &str) -> Option<u64> {
        let place = *self.places.get(*self.found.get(structure)?)?;
        Some(self.head(place)?.size.into())
    }

    /// At which byte of its structure the member `structure.member` is.
    pub(crate) fn member(&self, path: &str) -> Option<u64> {
        let (structure, member) = path.split_once('.')?;
        let bits = self.find(*self.found.get(structure)?, member, DEPTH)?;
        (bits % 8 == 0).then_some(bits / 8)
    }

    /// Where a member is, in bits, also within members without a name.
    fn find(&self, number: usize, member: &str, depth: usize) -> Option<u64> {
        let place = *self.places.get(number)?;
        let head = self.head(place)?;
        if !matches!(head.kind, STRUCTURE | UNION) {
            return None;
        }
        let one = |index: usize| {
            let at = place + HEAD + index * 12;
            let [name, kind, offset] = [0, 4, 8].map(|more| word(self.bytes, at + more));
            // Where there are bit fields, the high byte is their width.
            let offset = u64::from(if head.has_bit_fields { offset? & 0xff_ffff } else { offset? });
            match self.name(name?)? {
                "" => Some(offset + self.find(kind? as usize, member, depth.checked_sub(1)?)?),
                name => (name == member).then_some(offset),
            }
        };
        (0..head.count).find_map(one)
    }

    fn head(&self, at: usize) -> Option<Head> {
        let (name, info, size) = (word(self.bytes, at)?, word(self.bytes, at + 4)?, word(self.bytes, at + 8)?);
        let (kind, count) = (info >> 24 & 0x1f, (info & 0xffff) as usize);
        Some(Head { name, kind, count, has_bit_fields: info >> 31 != 0, size })
    }

    fn is_called(&self, at: u32, name: &str) -> bool {
        let here = self.names.get(at as usize..).unwrap_or_default();
        here.strip_prefix(name.as_bytes()).is_some_and(|rest| rest.first() == Some(&0))
    }

    fn name(&self, at: u32) -> Option<&'t str> {
        let name = self.names.get(at as usize..)?;
        std::str::from_utf8(&name[..name.iter().position(|byte| *byte == 0)?]).ok()
    }
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..)?.first_chunk().map(|word| u32::from_ne_bytes(*word))
}

/// How many bytes come behind the head of a type; `None` for a kind that is not known.
fn following(head: &Head) -> Option<usize> {
    match head.kind {
        // Integers, variables, tags of declarations.
        1 | 14 | 17 => Some(4),
        // Arrays.
        3 => Some(12),
        // Structures, unions, sections, enumerations of 64 bits.
        STRUCTURE | UNION | 15 | 19 => Some(12 * head.count),
        // Enumerations, prototypes.
        6 | 13 => Some(8 * head.count),
        // Pointers, declarations ahead, names, qualifiers, functions, floats, tags of types.
        2 | 7..=12 | 16 | 18 => Some(0),
        _ => None,
    }
}

/// Reads some bytes as types, and asks for what is looked for in those of a kernel.
pub(crate) fn try_types(bytes: &[u8]) {
    if let Some(types) = Types::parse(bytes, &HashSet::from(["task_struct", "outer"]), &["int"]) {
        let _ = (types.size("outer"), types.member("outer.one"), types.member("task_struct.pid"));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn types(cut: usize) -> Vec<u8> {
        // An integer; a union of it, without a name; a structure of the union 8 bytes in; a function.
        let types: Vec<u32> = [
            [1, 1 << 24, 4, 32].as_slice(),
            &[0, UNION << 24 | 1, 4, 5, 1, 0],
            &[8, STRUCTURE << 24 | 2, 12, 5, 1, 0, 0, 2, 64],
            &[5, FUNCTION << 24, 0],
        ]
        .concat();
        let names = b"\0int\0in\0outer\0";
        let mut bytes = vec![0x9f, 0xeb, 1, 0];
        for word in [24, 0, 4 * types.len() as u32, 4 * types.len() as u32, names.len() as u32].iter().chain(&types) {
            bytes.extend(word.to_ne_bytes());
        }
        bytes.extend(names);
        bytes.truncate(bytes.len() - cut);
        bytes
    }

    #[test]
    fn members_are_found_also_in_what_has_no_name() {
        let mut bytes = types(0);
        let wanted = HashSet::from(["outer"]);
        let all = Types::parse(&bytes, &wanted, &["in"]).unwrap();
        assert_eq!((all.size("outer"), all.member("outer.in"), all.member("outer.out")), (Some(12), Some(0), None));
        assert_eq!(all.function("in"), Some(4));
        // The structure's own member has another name now: the one in the union is left.
        let second = 24 + 4 * (4 + 6 + 3);
        bytes[second..second + 4].copy_from_slice(&1u32.to_ne_bytes());
        let all = Types::parse(&bytes, &wanted, &["in"]).unwrap();
        assert_eq!(all.member("outer.in"), Some(8));
        assert_eq!(all.member("outer.int"), Some(0));
    }

    #[test]
    fn what_is_cut_off_is_no_type() {
        assert!(Types::parse(&types(1), &HashSet::new(), &[]).is_none());
        assert!(Types::parse(&types(30), &HashSet::new(), &[]).is_none());
        assert!(Types::parse(&[], &HashSet::new(), &[]).is_none());
    }
}
