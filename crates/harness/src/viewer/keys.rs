//! Names of keys (X11 keysyms, which RFB uses).

/// Return.
pub const RETURN: u32 = 0xff0d;
/// Escape.
pub const ESCAPE: u32 = 0xff1b;
/// The left Control key.
pub const CONTROL: u32 = 0xffe3;
/// The left Alt key.
pub const ALT: u32 = 0xffe9;
/// The left Shift key.
pub const SHIFT: u32 = 0xffe1;
/// Insert.
pub const INSERT: u32 = 0xff63;
/// A function key, from 1.
pub const fn function(number: u32) -> u32 {
    0xffbd + number
}

/// The key of a character.
pub fn of(character: char) -> u32 {
    match character {
        '\n' => RETURN,
        '\t' => 0xff09,
        '\u{8}' => 0xff08,
        // Latin-1 keysyms are their code points; others are marked.
        '\0'..='\u{ff}' => character as u32,
        _ => 0x0100_0000 | character as u32,
    }
}

/// Whether a character is typed with Shift on a US keyboard.
pub fn is_shifted(character: char) -> bool {
    character.is_ascii_uppercase() || "~!@#$%^&*()_+{}|:\"<>?".contains(character)
}
