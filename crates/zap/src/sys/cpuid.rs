//! `CPUID`: what the processor says of itself.

use std::arch::asm;
use std::arch::x86_64::__cpuid_count;

/// Size and offset of a component of the XSAVE area, in the uncompacted format; a size of zero if there is none
/// (leaf 0xD, Intel SDM volume 1, 13.2).
pub fn component(number: u32) -> (u32, u32) {
    // SAFETY: every x86-64 processor has the instruction; leaves that it does not know are zeros, or those of the highest.
    #[allow(unused_unsafe, reason = "newer compilers know that it is safe")]
    let (highest, found) = unsafe { (__cpuid_count(0, 0).eax, __cpuid_count(0xd, number)) };
    if highest < 0xd { (0, 0) } else { (found.eax, found.ebx) }
}

/// The components that the kernel has switched on (XCR0); none without XSAVE.
pub fn enabled_components() -> u64 {
    const OSXSAVE: u32 = 1 << 27;
    // SAFETY: as above.
    #[allow(unused_unsafe, reason = "newer compilers know that it is safe")]
    let has_register = unsafe { __cpuid_count(1, 0).ecx } & OSXSAVE != 0;
    if !has_register {
        return 0;
    }
    let (low, high): (u32, u32);
    // SAFETY: the kernel has switched the instruction on; it changes two registers and nothing else.
    unsafe { asm!("xgetbv", in("ecx") 0, out("eax") low, out("edx") high, options(nomem, nostack, preserves_flags)) };
    u64::from(high) << 32 | u64::from(low)
}
