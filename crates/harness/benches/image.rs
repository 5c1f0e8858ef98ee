//! Writing and verifying images: 32 MiB of pages that compress about as memory does, on a tmpfs where there is one; frames
//! of records, and checksums.

use std::hint::black_box;
use std::path::Path;

use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use zap::image::{Compression, ImageReader, ImageWriter};

const BYTES: usize = 32 << 20;
const COMPRESSIONS: [(&str, Compression); 3] =
    [("none", Compression::None), ("lz4", Compression::Lz4), ("zstd", Compression::Zstd)];

/// Half of each page is drawn at random, half repeats.
fn pages() -> Vec<u8> {
    let mut rng = StdRng::seed_from_u64(1);
    let mut pages = vec![0; BYTES];
    pages.chunks_mut(4096).for_each(|page| rng.fill(&mut page[..2048]));
    pages
}

fn write(at: &Path, pages: Vec<u8>, compression: Compression) {
    let mut writer = ImageWriter::create(at, compression).expect("an image can be started");
    writer.data.append_pages(pages);
    writer.finish(&()).expect("an image can be completed");
}

fn bench(c: &mut Criterion) {
    let shm = Path::new("/dev/shm");
    let directory = if shm.is_dir() { tempfile::tempdir_in(shm) } else { tempfile::tempdir() };
    let directory = directory.expect("a directory for images");
    let pages = pages();
    let mut group = c.benchmark_group("image");
    group.throughput(Throughput::Bytes(BYTES as u64)).sample_size(10);
    for (name, compression) in COMPRESSIONS {
        let at = directory.path().join(name);
        group.bench_function(format!("write/{name}"), |b| {
            let fresh = || {
                let _ = std::fs::remove_dir_all(&at);
                pages.clone()
            };
            b.iter_batched(fresh, |pages| write(&at, pages, compression), BatchSize::PerIteration);
        });
        group.bench_function(format!("verify/{name}"), |b| {
            b.iter(|| {
                let reader = ImageReader::open(&at).expect("the image is sound");
                reader.verify_data().expect("the image is whole");
                black_box(reader);
            });
        });
    }
    group.finish();
}

/// Records of state, as small as most are: framed and written, and found again.
fn framing(c: &mut Criterion) {
    const RECORDS: usize = 10_000;
    let directory = tempfile::tempdir().expect("a directory for images");
    let at = directory.path().join("records");
    let states: Vec<(u64, String)> = (0..RECORDS as u64).map(|n| (n, format!("a name, number {n}"))).collect();
    let write = || {
        let mut writer = ImageWriter::create(&at, Compression::None).expect("an image can be started");
        states.iter().for_each(|state| writer.record("bench", 1, state));
        writer.finish(&()).expect("an image can be completed");
    };
    let mut group = c.benchmark_group("framing");
    group.throughput(Throughput::Elements(RECORDS as u64)).sample_size(20);
    group.bench_function("write", |b| {
        b.iter_batched(|| drop(std::fs::remove_dir_all(&at)), |()| write(), BatchSize::PerIteration);
    });
    group.bench_function("read", |b| {
        b.iter(|| {
            let reader = ImageReader::open(&at).expect("the image is sound");
            black_box(reader.records("bench").count())
        });
    });
    group.finish();
}

/// Of a chunk of an image, and of what is known by its contents.
fn checksums(c: &mut Criterion) {
    let chunk = &pages()[..1 << 20];
    let mut group = c.benchmark_group("checksum");
    group.throughput(Throughput::Bytes(chunk.len() as u64));
    group.bench_function("crc32", |b| b.iter(|| crc32fast::hash(black_box(chunk))));
    group.bench_function("blake3", |b| b.iter(|| blake3::hash(black_box(chunk))));
    group.finish();
}

criterion_group!(benches, bench, framing, checksums);
criterion_main!(benches);
