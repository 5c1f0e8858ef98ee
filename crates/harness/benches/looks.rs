//! What a checkpoint does again and again while it looks at a pod: pages that are found, texts of `/proc` that are
//! read, batches of system calls that are put together.

use std::fmt::Write as _;
use std::fs::File;
use std::hint::black_box;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use zap::fuzzing;
use zap::memory::layout;
use zap::sys::pagemap::{self, Scan, page};
use zap::tracee::{Arg, Batch};

const PAGE: usize = 4096;

/// As the kernel writes `smaps`: programs, libraries, heaps, stacks.
fn mappings(count: usize) -> Vec<u8> {
    let mut text = String::new();
    for n in 0..count as u64 {
        let (start, inode) = (0x7f00_0000_0000 + n * 0x3000, 1000 + n % 50);
        let path = if n % 3 == 0 { String::new() } else { format!("/usr/lib/x86_64-linux-gnu/lib{}.so.6", n % 50) };
        let letters = ["r--p", "r-xp", "rw-p"][n as usize % 3];
        let _ =
            writeln!(text, "{start:x}-{:x} {letters} {:08x} fe:00 {inode} {path:>40}", start + 0x2000, n % 7 * 0x1000);
        for (name, kilobytes) in [("Size", 8), ("Rss", 8), ("Pss", 4), ("Pss_Dirty", n % 9), ("Anonymous", 0)] {
            let _ = writeln!(text, "{name}:{kilobytes:>20} kB");
        }
        text.push_str("ProtectionKey:         0\nVmFlags: rd wr mr mw me ac sd \n");
    }
    text.into_bytes()
}

fn parsers(c: &mut Criterion) {
    let mut group = c.benchmark_group("parse");
    for count in [100, 10_000] {
        let text = mappings(count);
        group.throughput(Throughput::Elements(count as u64));
        group.bench_with_input(BenchmarkId::new("smaps", count), &text, |b, text| {
            b.iter(|| layout::parse(black_box(text)).expect("these are mappings").len());
        });
    }
    group.throughput(Throughput::Elements(1));
    for (name, path) in
        [("stat", "/proc/self/stat"), ("status", "/proc/self/status"), ("mounts", "/proc/self/mountinfo")]
    {
        let text = std::fs::read(path).expect("proc is mounted");
        let parse = fuzzing::target(name).expect("that has a parser");
        group.bench_with_input(BenchmarkId::from_parameter(name), &text, |b, text| b.iter(|| parse(black_box(text))));
    }
    group.finish();
}

/// Of this process's own pages: 64 MiB, all of them there, or every other one.
fn scans(c: &mut Criterion) {
    let mut group = c.benchmark_group("pagemap");
    for (name, step) in [("dense", 1), ("every other page", 2)] {
        let mut memory = vec![0u8; 64 << 20];
        memory.iter_mut().step_by(step * PAGE).for_each(|byte| *byte = 1);
        let start = memory.as_ptr() as u64;
        let pagemap = File::open("/proc/self/pagemap").expect("this process has pages");
        let any = page::PRESENT | page::SWAPPED;
        let scan = || Scan {
            start: start / PAGE as u64 * PAGE as u64,
            end: start + memory.len() as u64,
            none: page::FILE | page::ZERO,
            any,
            tell: any,
            ..Scan::default()
        };
        group.throughput(Throughput::Bytes(memory.len() as u64));
        group.bench_function(name, |b| {
            b.iter(|| {
                let mut found = Vec::new();
                // Before Linux 6.7 there is no such call: what fails is timed then.
                let _ = pagemap::scan(&pagemap, scan(), &mut found);
                found.len()
            });
        });
    }
    group.finish();
}

fn batches(c: &mut Criterion) {
    const CALLS: usize = 1000;
    let mut group = c.benchmark_group("batch");
    group.throughput(Throughput::Elements(CALLS as u64));
    group.bench_function("calls with a structure and a pointer", |b| {
        b.iter(|| {
            let mut batch = Batch::new();
            for n in 0..CALLS {
                let name = batch.bytes(b"a name of thirty-two bytes, here");
                let structure = batch.bytes(&[0; 24]);
                batch.pointer(structure, 8, name);
                batch.call(n as i64, [Arg::from(n), structure, Arg::from(24usize)], "a call");
            }
            batch
        });
    });
    group.finish();
}

criterion_group!(benches, parsers, scans, batches);
criterion_main!(benches);
