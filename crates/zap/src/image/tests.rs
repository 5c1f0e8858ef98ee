use std::fs;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};

use proptest::prelude::*;

use super::*;

fn write(at: &Path, compression: Compression) -> Summary {
    let mut writer = ImageWriter::create(at, compression).unwrap();
    writer.record("pod", 1, &"web");
    let noise: Vec<u8> = (0..3_000_000u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
    writer.data.append(vec![1, 2, 3]);
    assert_eq!(writer.data.append_pages(noise), DataRef { offset: 4096, length: 3_000_000 });
    writer.data.flush().unwrap();
    let mut layer = writer.layer("upper").unwrap();
    layer.write_all(&[b'x'; 5000]).unwrap();
    writer.close_layer(layer).unwrap();
    writer.record("process", 2, &(14, "httpd"));
    writer.record("process", 2, &(15, "httpd"));
    writer.data.append(b"late".to_vec());
    writer.finish(&serde_json::json!({ "pod": "web" })).unwrap()
}

fn check(at: &Path) -> Result<(), ImageError> {
    let reader = ImageReader::open(at)?;
    reader.verify_layers().and_then(|()| reader.verify_data())
}

const ALL: [Compression; 3] = [Compression::None, Compression::Lz4, Compression::Zstd];

#[test]
fn what_was_written_is_read() {
    let dir = tempfile::tempdir().unwrap();
    for compression in ALL {
        let at = dir.path().join(format!("{compression:?}"));
        let summary = write(&at, compression);
        assert_eq!(fs::metadata(at.join("data")).unwrap().len(), summary.data_bytes);
        let reader = ImageReader::open(&at).unwrap();
        reader.verify_layers().unwrap();
        reader.verify_data().unwrap();
        for reader in [ImageReader::receive(reader.share().unwrap()).unwrap(), reader] {
            assert_eq!(reader.one::<String>("pod").unwrap(), "web");
            assert_eq!(reader.every::<(i32, String)>("process").unwrap()[1], (15, "httpd".into()));
            assert!(reader.one::<(i32, String)>("process").is_err());
            assert_eq!(reader.read(DataRef { offset: 0, length: 3 }).unwrap(), [1, 2, 3]);
            assert_eq!(reader.read(DataRef { offset: 3_004_096, length: 4 }).unwrap(), b"late");
            assert!(reader.read(DataRef { offset: 3_004_096, length: 5 }).is_err());
            assert!(reader.read(DataRef { offset: u64::MAX, length: 5 }).is_err());
            let mut layer = Vec::new();
            reader.layer("upper").unwrap().read_to_end(&mut layer).unwrap();
            assert_eq!(layer, [b'x'; 5000]);
            reader.check_kinds(&[("pod", 1), ("process", 2)]).unwrap();
            let unknown = reader.check_kinds(&[("pod", 1), ("process", 1)]).unwrap_err();
            assert!(unknown.to_string().contains("kind process, version 2"), "{unknown}");
        }
    }
}

#[test]
fn it_appears_whole_or_not_at_all() {
    let dir = tempfile::tempdir().unwrap();
    let at = dir.path().join("image");
    let orphan = dir.path().join(".image.partial-1");
    fs::create_dir(&orphan).unwrap();
    let writer = ImageWriter::create(&at, Compression::None).unwrap();
    assert!(!orphan.exists() && !at.exists());
    drop(writer);
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    write(&at, Compression::None);
    assert!(matches!(ImageWriter::create(&at, Compression::None), Err(ImageError::Exists(_))));
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
}

#[test]
fn another_version_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let at = dir.path().join("image");
    write(&at, Compression::None);
    let text = fs::read_to_string(at.join("manifest")).unwrap();
    let body = text.replace("format 1", "format 7");
    let body = &body[..body.len() - 15];
    fs::write(at.join("manifest"), format!("{body}crc32 {:08x}\n", crc32fast::hash(body.as_bytes()))).unwrap();
    assert!(matches!(check(&at), Err(ImageError::Version { found: 7, known: 1, .. })));
}

#[test]
fn a_stray_missing_or_foreign_file_is_an_error() {
    let dir = tempfile::tempdir().unwrap();
    let at = dir.path().join("image");
    assert!(matches!(check(&at), Err(ImageError::Io { .. })));
    write(&at, Compression::None);
    fs::write(at.join("stray"), "").unwrap();
    assert!(check(&at).unwrap_err().to_string().contains("stray"));
    fs::remove_file(at.join("stray")).unwrap();
    check(&at).unwrap();
    fs::remove_file(at.join("layer-upper")).unwrap();
    assert!(check(&at).unwrap_err().to_string().contains("layer-upper"));
    assert!(matches!(check(dir.path()), Err(ImageError::Foreign { .. })));
    assert!(matches!(check(&at.join("data")), Err(ImageError::Foreign { .. })));
}

struct Sample {
    _dir: tempfile::TempDir,
    files: Vec<PathBuf>,
    at: PathBuf,
}

fn sample(compression: Compression) -> Sample {
    let dir = tempfile::tempdir().unwrap();
    let at = dir.path().join("image");
    write(&at, compression);
    let files = fs::read_dir(&at).unwrap().map(|e| e.unwrap().path()).collect();
    Sample { _dir: dir, files, at }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(100))]

    #[test]
    fn any_damage_is_noticed(
        compression in prop::sample::select(&ALL[..]), which in any::<prop::sample::Index>(),
        place in any::<prop::sample::Index>(), mask in 1u8.., how in 0..3,
    ) {
        let sample = sample(compression);
        let file = which.get(&sample.files);
        let mut bytes = fs::read(file).unwrap();
        match how {
            0 => { let i = place.index(bytes.len()); bytes[i] ^= mask }
            1 => bytes.truncate(place.index(bytes.len())),
            _ => bytes.push(mask),
        }
        fs::write(file, bytes).unwrap();
        let error = check(&sample.at).unwrap_err().to_string();
        let name = file.file_name().unwrap().to_str().unwrap();
        prop_assert!(error.contains(name), "{} does not name {}", error, name);
    }
}

#[test]
fn every_byte_of_the_small_files_is_covered() {
    let sample = sample(Compression::None);
    for file in sample.files.iter().filter(|f| fs::metadata(f).unwrap().len() < 4000) {
        let whole = fs::read(file).unwrap();
        for place in 0..whole.len() {
            let mut bytes = whole.clone();
            bytes[place] ^= 1;
            fs::write(file, bytes).unwrap();
            assert!(check(&sample.at).is_err(), "{} byte {place}", file.display());
        }
        fs::write(file, whole).unwrap();
    }
    check(&sample.at).unwrap();
}
