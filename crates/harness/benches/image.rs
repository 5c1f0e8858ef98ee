//! Writing and verifying images: 32 MiB of pages that compress about as memory does, on a tmpfs where there is one.

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

criterion_group!(benches, bench);
criterion_main!(benches);
