//! From the bytes as dropped to the bytes of rows: decompression within caps (F30).

use std::{
    ffi::OsStr,
    io::{self, BufReader, Read},
    os::unix::ffi::OsStrExt,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

use postrider_settings::Directory;

/// Below this, no ratio is suspicious: a short list of equal lines packs very well.
const RATIO_FROM_BYTES: u64 = 1 << 20;

/// What a zstd frame may need for its window: 8 MiB, what RFC 8878 recommends that every reader supports and
/// `zstd -19` keeps to. Memory is bounded by it (I8).
const ZSTD_WINDOW_LOG_MAX: u32 = 23;

/// The bytes of a file by the ending of its name, unpacked as far as the directory's keys allow.
pub(super) fn unpack(
    name: &OsStr,
    file: impl Read + Send + 'static,
    directory: &Directory,
) -> io::Result<Box<dyn Read + Send>> {
    let name = name.as_bytes();
    if !name.ends_with(b".gz") && !name.ends_with(b".zst") {
        return Ok(Box::new(file));
    }
    let read = Arc::new(AtomicU64::new(0));
    let broken = Arc::new(AtomicBool::new(false));
    let packed = CountingReader { inner: file, read: read.clone(), broken: broken.clone() };
    let (kind, unpacked): (_, Box<dyn Read + Send>) = if name.ends_with(b".gz") {
        ("gzip", Box::new(flate2::read::MultiGzDecoder::new(BufReader::with_capacity(1 << 16, packed))))
    } else {
        let mut decoder = zstd::stream::read::Decoder::new(packed)?;
        decoder.window_log_max(ZSTD_WINDOW_LOG_MAX)?;
        ("zstd", Box::new(decoder))
    };
    let (ratio_max, bytes_max) = (directory.decompress_max_ratio.into(), directory.decompress_max);
    Ok(Box::new(Capped { kind, unpacked, written: 0, read, broken, ratio_max, bytes_max }))
}

/// Counts what is read of the packed file and notes whether reading it failed.
struct CountingReader<R> {
    inner: R,
    read: Arc<AtomicU64>,
    broken: Arc<AtomicBool>,
}

impl<R: Read> Read for CountingReader<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self.inner.read(buffer) {
            Ok(bytes) => {
                self.read.fetch_add(bytes as u64, Ordering::Relaxed);
                Ok(bytes)
            }
            Err(error) => {
                self.broken.store(error.kind() != io::ErrorKind::Interrupted, Ordering::Relaxed);
                Err(error)
            }
        }
    }
}

struct Capped {
    kind: &'static str,
    unpacked: Box<dyn Read + Send>,
    written: u64,
    read: Arc<AtomicU64>,
    broken: Arc<AtomicBool>,
    ratio_max: u64,
    bytes_max: u64,
}

impl Read for Capped {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let bytes = self.unpacked.read(buffer).map_err(|error| self.explain(error))?;
        self.written += bytes as u64;
        let Self { ratio_max, bytes_max, .. } = *self;
        let invalid = |text| Err(io::Error::new(io::ErrorKind::InvalidData, text));
        if self.written > bytes_max {
            return invalid(format!("it unpacks to more than decompress_max = {bytes_max}"));
        }
        let ratio_bytes = self.read.load(Ordering::Relaxed).saturating_mul(ratio_max);
        if self.written > ratio_bytes.max(RATIO_FROM_BYTES) {
            return invalid(format!(
                "it unpacks to more than decompress_max_ratio = {ratio_max} times its size"
            ));
        }
        Ok(bytes)
    }
}

impl Capped {
    /// Separates a failing disk from a damaged file: the first may pass, the second won't.
    fn explain(&self, error: io::Error) -> io::Error {
        if error.kind() == io::ErrorKind::Interrupted || self.broken.load(Ordering::Relaxed) {
            return error;
        }
        let text = if error.to_string().contains("too much memory") {
            format!(
                "the zstd data needs a window of more than {} MiB: pack it without --long and --ultra",
                (1u32 << ZSTD_WINDOW_LOG_MAX) >> 20
            )
        } else if error.kind() == io::ErrorKind::UnexpectedEof {
            format!("the {} data is cut off", self.kind)
        } else {
            format!("the {} data is damaged: {error}", self.kind)
        };
        io::Error::new(io::ErrorKind::InvalidData, text)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use postrider_settings::Keys as _;

    use super::*;

    /// By default, but for what is given.
    fn capped(ratio_max: u32, decompress_max: u64) -> Directory {
        Directory { decompress_max_ratio: ratio_max, decompress_max, ..Directory::declared() }
    }

    fn gz(bytes: &[u8]) -> Vec<u8> {
        let mut writer = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
        writer.write_all(bytes).unwrap();
        writer.finish().unwrap()
    }

    fn zst(bytes: &[u8]) -> Vec<u8> {
        zstd::encode_all(bytes, 3).unwrap()
    }

    fn read(name: &str, bytes: Vec<u8>, caps: &Directory) -> io::Result<Vec<u8>> {
        let mut rows = Vec::new();
        unpack(OsStr::new(name), io::Cursor::new(bytes), caps)?.read_to_end(&mut rows)?;
        Ok(rows)
    }

    #[test]
    fn several_members_and_frames_are_one_file() {
        assert_eq!(
            read("a.gz", [gz(b"1\n"), gz(b"2\n")].concat(), &Directory::declared()).unwrap(),
            b"1\n2\n"
        );
        assert_eq!(
            read("a.zst", [zst(b"1\n"), zst(b"2\n")].concat(), &Directory::declared()).unwrap(),
            b"1\n2\n"
        );
        assert_eq!(
            read("a.txt", gz(b"1\n"), &Directory::declared()).unwrap(),
            gz(b"1\n"),
            "the name decides"
        );
    }

    #[test]
    fn f30_caps_on_ratio_and_size_are_named() {
        let zeros = vec![0; 64 << 20];
        let (caps, small) = (Directory::declared(), capped(1_000_000, (64 << 20) - 1));
        for (name, packed) in [("a.gz", gz(&zeros)), ("a.zst", zst(&zeros))] {
            let error = read(name, packed.clone(), &caps).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::InvalidData);
            assert!(error.to_string().contains("decompress_max_ratio = 200"), "{error}");
            let error = read(name, packed.clone(), &small).unwrap_err();
            assert!(error.to_string().contains("decompress_max = 67108863"), "{error}");
            assert_eq!(
                read(name, packed, &capped(1_000_000, 64 << 20)).unwrap().len(),
                zeros.len(),
                "at the limit"
            );
        }
        let short = vec![b'a'; 1 << 20];
        assert_eq!(read("a.zst", zst(&short), &capped(2, 1 << 30)).unwrap(), short);
    }

    #[test]
    fn f30_a_window_that_would_cost_too_much_memory_is_refused() {
        let noise: Vec<u8> = (0..9_000_000u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
        let mut writer = zstd::stream::write::Encoder::new(Vec::new(), 1).unwrap();
        writer.window_log(24).unwrap();
        writer.write_all(&noise).unwrap();
        let error = read("a.zst", writer.finish().unwrap(), &Directory::declared()).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
        assert!(error.to_string().contains("8 MiB"), "{error}");
    }

    struct Failing;

    impl Read for Failing {
        fn read(&mut self, _: &mut [u8]) -> io::Result<usize> {
            Err(io::Error::from_raw_os_error(5))
        }
    }

    #[test]
    fn damage_is_invalid_data_and_a_failing_disk_is_not() {
        for (name, packed) in [("a.gz", gz(b"12345678\n")), ("a.zst", zst(b"12345678\n"))] {
            for damaged in [&packed[..packed.len() - 3], b"no archive", &[&packed[..], b"garbage"].concat()] {
                let error = read(name, damaged.to_vec(), &Directory::declared()).unwrap_err();
                assert_eq!(error.kind(), io::ErrorKind::InvalidData, "{name}: {error}");
            }
            let whole = io::Cursor::new(packed[..6].to_vec()).chain(Failing);
            let error = unpack(OsStr::new(name), whole, &Directory::declared())
                .unwrap()
                .read_to_end(&mut Vec::new())
                .unwrap_err();
            assert_ne!(error.kind(), io::ErrorKind::InvalidData, "{name}: {error}");
        }
    }
}
