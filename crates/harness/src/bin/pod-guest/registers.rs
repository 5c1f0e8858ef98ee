//! Registers, down to the extended state, of threads that run all the while.

use std::arch::asm;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use crate::stage::*;

pub(crate) const KINDS: &[crate::stage::Kind] =
    &[("general-registers", general), ("vector-registers", vector), ("x87", x87), ("segments", segments)];

static GO: AtomicU32 = AtomicU32::new(0);

/// Runs `spin` in a thread until the driver says go; it is in its loop when everything is held.
fn with_spinning(spin: impl FnOnce(*const u32) -> Checked + Send + 'static) -> Checked {
    let (begun, has_begun) = std::sync::mpsc::channel();
    let thread = std::thread::spawn(move || {
        // By now it has the memory that a thread brings with it.
        begun.send(()).map_err(|_| "nobody waits")?;
        spin(GO.as_ptr())
    });
    has_begun.recv().map_err(|_| "the thread ended")?;
    hold()?;
    GO.store(1, Ordering::SeqCst);
    thread.join().map_err(|_| "a thread panicked")?
}

fn general() -> Checked {
    with_spinning(|go| {
        let mut seen = [0u64; 9];
        unsafe {
            asm!(
                "mov r8, 0x1111111111111111", "mov r9, 0x2222222222222222", "mov r10, 0x3333333333333333",
                "mov r11, 0x4444444444444444", "mov r12, 0x5555555555555555", "mov r13, 0x6666666666666666",
                "mov r14, 0x7777777777777777", "mov r15, 0x8888888888888888", "mov rcx, 0x9999999999999999",
                "2:", "cmp dword ptr [rdi], 0", "je 2b",
                "mov [rsi], r8", "mov [rsi + 8], r9", "mov [rsi + 16], r10", "mov [rsi + 24], r11",
                "mov [rsi + 32], r12", "mov [rsi + 40], r13", "mov [rsi + 48], r14", "mov [rsi + 56], r15",
                "mov [rsi + 64], rcx",
                in("rdi") go, in("rsi") seen.as_mut_ptr(),
                out("r8") _, out("r9") _, out("r10") _, out("r11") _, out("r12") _, out("r13") _, out("r14") _,
                out("r15") _, out("rcx") _,
            );
        }
        equal("registers", seen, std::array::from_fn(|i| 0x1111_1111_1111_1111 * (i as u64 + 1)))
    })
}

/// Distinct bytes for `count` registers of `width` bytes.
fn pattern(count: usize, width: usize) -> Vec<u8> {
    (0..count * width).map(|i| (i * 37 + i / 251) as u8 ^ 0x5a).collect()
}

fn vector() -> Checked {
    if is_x86_feature_detected!("avx512f") {
        with_spinning(|go| unsafe { spin_512(go) })
    } else if is_x86_feature_detected!("avx") {
        with_spinning(|go| unsafe { spin_256(go) })
    } else {
        hold()
    }
}

#[target_feature(enable = "avx")]
unsafe fn spin_256(go: *const u32) -> Checked {
    let (given, mut seen) = (pattern(16, 32), vec![0u8; 512]);
    unsafe {
        asm!(
            "vmovdqu ymm0, [rsi]", "vmovdqu ymm1, [rsi+32]", "vmovdqu ymm2, [rsi+64]", "vmovdqu ymm3, [rsi+96]",
            "vmovdqu ymm4, [rsi+128]", "vmovdqu ymm5, [rsi+160]", "vmovdqu ymm6, [rsi+192]", "vmovdqu ymm7, [rsi+224]",
            "vmovdqu ymm8, [rsi+256]", "vmovdqu ymm9, [rsi+288]", "vmovdqu ymm10, [rsi+320]", "vmovdqu ymm11, [rsi+352]",
            "vmovdqu ymm12, [rsi+384]", "vmovdqu ymm13, [rsi+416]", "vmovdqu ymm14, [rsi+448]", "vmovdqu ymm15, [rsi+480]",
            "2:", "cmp dword ptr [rdi], 0", "je 2b",
            "vmovdqu [rdx], ymm0", "vmovdqu [rdx+32], ymm1", "vmovdqu [rdx+64], ymm2", "vmovdqu [rdx+96], ymm3",
            "vmovdqu [rdx+128], ymm4", "vmovdqu [rdx+160], ymm5", "vmovdqu [rdx+192], ymm6", "vmovdqu [rdx+224], ymm7",
            "vmovdqu [rdx+256], ymm8", "vmovdqu [rdx+288], ymm9", "vmovdqu [rdx+320], ymm10", "vmovdqu [rdx+352], ymm11",
            "vmovdqu [rdx+384], ymm12", "vmovdqu [rdx+416], ymm13", "vmovdqu [rdx+448], ymm14", "vmovdqu [rdx+480], ymm15",
            in("rdi") go, in("rsi") given.as_ptr(), in("rdx") seen.as_mut_ptr(),
            out("ymm0") _, out("ymm1") _, out("ymm2") _, out("ymm3") _, out("ymm4") _, out("ymm5") _, out("ymm6") _,
            out("ymm7") _, out("ymm8") _, out("ymm9") _, out("ymm10") _, out("ymm11") _, out("ymm12") _, out("ymm13") _,
            out("ymm14") _, out("ymm15") _,
        );
    }
    equal("the ymm registers", seen, given)
}

#[target_feature(enable = "avx512f")]
unsafe fn spin_512(go: *const u32) -> Checked {
    let (given, mut seen) = (pattern(8, 64), vec![0u8; 512]);
    let mut masks = [0u16; 2];
    unsafe {
        asm!(
            "vmovdqu64 zmm0, [rsi]", "vmovdqu64 zmm5, [rsi+64]", "vmovdqu64 zmm10, [rsi+128]", "vmovdqu64 zmm15, [rsi+192]",
            "vmovdqu64 zmm16, [rsi+256]", "vmovdqu64 zmm21, [rsi+320]", "vmovdqu64 zmm26, [rsi+384]",
            "vmovdqu64 zmm31, [rsi+448]", "mov eax, 0xa5c3", "kmovw k1, eax", "mov eax, 0x1234", "kmovw k7, eax",
            "2:", "cmp dword ptr [rdi], 0", "je 2b",
            "vmovdqu64 [rdx], zmm0", "vmovdqu64 [rdx+64], zmm5", "vmovdqu64 [rdx+128], zmm10", "vmovdqu64 [rdx+192], zmm15",
            "vmovdqu64 [rdx+256], zmm16", "vmovdqu64 [rdx+320], zmm21", "vmovdqu64 [rdx+384], zmm26",
            "vmovdqu64 [rdx+448], zmm31", "kmovw [rcx], k1", "kmovw [rcx+2], k7",
            in("rdi") go, in("rsi") given.as_ptr(), in("rdx") seen.as_mut_ptr(), in("rcx") masks.as_mut_ptr(),
            out("eax") _, out("zmm0") _, out("zmm5") _, out("zmm10") _, out("zmm15") _, out("zmm16") _, out("zmm21") _,
            out("zmm26") _, out("zmm31") _, out("k1") _, out("k7") _,
        );
    }
    equal("the zmm registers", seen, given)?;
    equal("the mask registers", masks, [0xa5c3, 0x1234])
}

/// The x87 stack, its control word, and MXCSR.
fn x87() -> Checked {
    with_spinning(|go| {
        let mut seen = [0f64; 4];
        let (control, mut control_now) = (0x0f7fu16, 0u16);
        let (mxcsr, mut mxcsr_now) = (0x7f80u32, 0u32);
        let (mut control_was, mut mxcsr_was) = (0u16, 0u32);
        unsafe {
            asm!(
                "fnstcw word ptr [{control_was}]", "stmxcsr dword ptr [{mxcsr_was}]",
                "fldcw word ptr [{control}]", "ldmxcsr dword ptr [{mxcsr}]", "fldpi", "fldl2e", "fldln2", "fld1",
                "2:", "cmp dword ptr [{go}], 0", "je 2b",
                "fstp qword ptr [{seen}]", "fstp qword ptr [{seen} + 8]", "fstp qword ptr [{seen} + 16]",
                "fstp qword ptr [{seen} + 24]",
                "fnstcw word ptr [{control_now}]", "stmxcsr dword ptr [{mxcsr_now}]",
                "fldcw word ptr [{control_was}]", "ldmxcsr dword ptr [{mxcsr_was}]",
                go = in(reg) go, seen = in(reg) seen.as_mut_ptr(),
                control = in(reg) &raw const control, control_now = in(reg) &raw mut control_now,
                control_was = in(reg) &raw mut control_was, mxcsr = in(reg) &raw const mxcsr,
                mxcsr_now = in(reg) &raw mut mxcsr_now, mxcsr_was = in(reg) &raw mut mxcsr_was,
                out("st(0)") _, out("st(1)") _, out("st(2)") _, out("st(3)") _, out("st(4)") _, out("st(5)") _,
                out("st(6)") _, out("st(7)") _,
            );
        }
        use std::f64::consts::{LN_2, LOG2_E, PI};
        let near = |a: f64, b: f64| (a - b).abs() < 1e-15;
        check(
            near(seen[0], 1.0) && near(seen[1], LN_2) && near(seen[2], LOG2_E) && near(seen[3], PI),
            format!("the x87 stack: {seen:?}"),
        )?;
        equal("the x87 control word", control_now, control)?;
        equal("MXCSR", mxcsr_now & 0xffc0, mxcsr & 0xffc0)
    })
}

/// The bases of the segments, which address a thread's own data.
fn segments() -> Checked {
    const ARCH_SET_GS: u64 = 0x1001;
    const ARCH_GET_FS: u64 = 0x1003;
    const ARCH_GET_GS: u64 = 0x1004;
    let get = |code: u64| -> Result<u64, String> {
        let mut base = 0u64;
        call("arch_prctl", libc::SYS_arch_prctl, [code, &raw mut base as u64])?;
        Ok(base)
    };
    let word = Box::new(0x1234_5678_9abc_def0u64);
    call("arch_prctl", libc::SYS_arch_prctl, [ARCH_SET_GS, &raw const *word as u64])?;
    let before = (get(ARCH_GET_FS)?, get(ARCH_GET_GS)?);
    static ALIVE: AtomicBool = AtomicBool::new(true);
    hold()?;
    check(ALIVE.load(Ordering::SeqCst), "static data")?;
    equal("the segment bases", (get(ARCH_GET_FS)?, get(ARCH_GET_GS)?), before)?;
    let through: u64;
    unsafe { asm!("mov {}, gs:0", out(reg) through) };
    equal("a word through gs", through, *word)
}
