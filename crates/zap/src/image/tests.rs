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

/// Writes an image relative to another: the last of 700 pages and a word in the middle of its archive differ by `version`.
fn write_child(at: &Path, parent: Option<&Path>, compression: Compression, version: u8) -> Summary {
    let mut writer = ImageWriter::create_child(at, compression, parent).unwrap();
    writer.record("pod", 1, &version);
    let mut pages: Vec<u8> = (0..700 * 4096u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
    pages[699 * 4096..].fill(version);
    writer.data.append_pages(pages);
    let mut layer = writer.layer("upper").unwrap();
    let noise = |seed: u32| (0..400_000u32).map(|i| (i.wrapping_mul(seed) >> 9) as u8).collect::<Vec<u8>>();
    layer.write_all(&noise(2_654_435_761)).unwrap();
    layer.write_all(&vec![version; usize::from(version) * 1_000]).unwrap();
    layer.write_all(&noise(2_246_822_519)).unwrap();
    writer.close_layer(layer).unwrap();
    writer.finish(&serde_json::json!({})).unwrap()
}

#[test]
fn a_child_is_small_and_as_whole_as_its_parent() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let contents = |path: &Path| {
        let reader = ImageReader::open(path).unwrap();
        reader.verify_layers().and_then(|()| reader.verify_data()).unwrap();
        reader.check_kinds(&[("pod", 1)]).unwrap();
        for (_, body) in reader.records(inherit::KIND) {
            assert_eq!(encode(&decode::<inherit::Stretches>(body).unwrap()), body);
        }
        let length = reader.parts().find(|part| part.0 == "data").unwrap().2;
        let of = |reader: &ImageReader| {
            let mut layer = Vec::new();
            reader.layer("upper").unwrap().read_to_end(&mut layer).unwrap();
            (reader.one::<u8>("pod").unwrap(), reader.read(DataRef { offset: 0, length }).unwrap(), layer)
        };
        let whole = of(&reader);
        assert!(whole == of(&ImageReader::receive(reader.share().unwrap()).unwrap()));
        whole
    };
    for compression in ALL {
        let name = |n: u8| format!("{compression:?}-{n}");
        write_child(&at(&name(0)), None, compression, 1);
        for n in 1..4 {
            // every generation with another compression than its parent
            let other = ALL[usize::from(n) % 3];
            let parent = at(&name(n - 1));
            let written = write_child(&at(&name(n)), Some(&parent), other, n + 1);
            assert!(written.data_bytes <= 4096 && written.layer_bytes < 300_000, "{written:?}");
            write_child(&at("whole"), None, compression, n + 1);
            assert!(contents(&at(&name(n))) == contents(&at("whole")), "generation {n} of {compression:?}");
            fs::remove_dir_all(at("whole")).unwrap();
        }
    }
}

#[test]
fn a_parent_is_found_by_its_content_or_missed_by_it() {
    let dir = tempfile::tempdir().unwrap();
    let [parent, child, moved] = ["parent", "child", "moved"].map(|name| dir.path().join(name));
    write_child(&parent, None, Compression::None, 1);
    write_child(&child, Some(&parent), Compression::None, 2);
    assert_eq!(ImageReader::open(&child).unwrap().parent().map(|p| p.1), Some(&*parent));
    fs::rename(&parent, &moved).unwrap();
    // another image where the parent was
    write_child(&parent, None, Compression::None, 3);
    check(&child).unwrap();
    let data = moved.join("data");
    let whole = fs::read(&data).unwrap();
    fs::write(&data, &whole[1..]).unwrap();
    assert!(check(&child).unwrap_err().to_string().contains("moved/data"));
    fs::write(&data, whole).unwrap();
    check(&child).unwrap();
    fs::remove_dir_all(&moved).unwrap();
    let missed = ImageReader::open(&child).err().unwrap();
    assert!(matches!(missed, ImageError::Orphan { .. }), "{missed}");
    assert!(matches!(
        ImageWriter::create_child(&moved, Compression::None, Some(&child)).err(),
        Some(ImageError::Orphan { .. })
    ));
    assert!(!moved.exists() && fs::read_dir(dir.path()).unwrap().count() == 2);
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
fn every_byte_and_length_of_the_small_files_is_covered() {
    let sample = sample(Compression::None);
    for file in sample.files.iter().filter(|f| fs::metadata(f).unwrap().len() < 4000) {
        let whole = fs::read(file).unwrap();
        for place in 0..whole.len() {
            let mut bytes = whole.clone();
            bytes[place] ^= 1;
            fs::write(file, bytes).unwrap();
            assert!(check(&sample.at).is_err(), "{} byte {place}", file.display());
            fs::write(file, &whole[..place]).unwrap();
            assert!(check(&sample.at).is_err(), "the first {place} bytes of {}", file.display());
        }
        fs::write(file, whole).unwrap();
    }
    check(&sample.at).unwrap();
}
