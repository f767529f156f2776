//! What the kernel says of this process and of its disk: read when somebody asks for metrics.

use std::{fmt, fs, path::PathBuf, sync::OnceLock};

use postrider_sqlite::DATABASE;
use procfs::process::{LimitValue, Process};
use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeLabelSet, EncodeMetric as _, MetricEncoder},
    metrics::{MetricType, counter::ConstCounter, gauge::ConstGauge},
    registry::Unit,
};

/// Figures of the process, under the names that all client libraries of Prometheus give them.
#[derive(Debug)]
pub(super) struct ProcessFigures;

/// What of a process changes.
struct Figures {
    cpu_s: f64,
    resident_bytes: u64,
    virtual_bytes: u64,
    open_fds: Option<u64>,
    max_fds: Option<u64>,
    started_at_s: Option<f64>,
    threads: u64,
}

fn figures() -> Option<Figures> {
    let process = Process::myself().ok()?;
    let stat = process.stat().ok()?;
    let ticks_per_s = procfs::ticks_per_second() as f64;
    let max_fds = process.limits().ok().and_then(|limits| match limits.max_open_files.soft_limit {
        LimitValue::Value(max) => Some(max),
        LimitValue::Unlimited => None,
    });
    Some(Figures {
        cpu_s: (stat.utime + stat.stime) as f64 / ticks_per_s,
        resident_bytes: stat.rss * procfs::page_size(),
        virtual_bytes: stat.vsize,
        open_fds: process.fd_count().ok().map(|count| count as u64),
        max_fds,
        started_at_s: procfs::boot_time_secs()
            .ok()
            .map(|boot| boot as f64 + stat.starttime as f64 / ticks_per_s),
        threads: u64::try_from(stat.num_threads).unwrap_or_default(),
    })
}

/// A gauge; what is not known is absent.
fn gauge(
    encoder: &mut DescriptorEncoder,
    name: &str,
    help: &str,
    unit: Option<&Unit>,
    value: Option<f64>,
) -> fmt::Result {
    let Some(value) = value else { return Ok(()) };
    ConstGauge::new(value).encode(encoder.encode_descriptor(name, help, unit, MetricType::Gauge)?)
}

impl Collector for ProcessFigures {
    fn encode(&self, mut encoder: DescriptorEncoder) -> fmt::Result {
        let Some(figures) = figures() else { return Ok(()) };
        let to = &mut encoder;
        let cpu = ConstCounter::new(figures.cpu_s);
        let help = "User and system time of this process";
        cpu.encode(to.encode_descriptor("process_cpu", help, Some(&Unit::Seconds), MetricType::Counter)?)?;
        let bytes = Some(&Unit::Bytes);
        let (resident, virtual_) = (figures.resident_bytes as f64, figures.virtual_bytes as f64);
        gauge(to, "process_resident_memory", "Memory of this process that is in RAM", bytes, Some(resident))?;
        gauge(to, "process_virtual_memory", "Addresses that this process has mapped", bytes, Some(virtual_))?;
        let count = |count: Option<u64>| count.map(|count| count as f64);
        gauge(to, "process_open_fds", "Open file descriptors", None, count(figures.open_fds))?;
        gauge(to, "process_max_fds", "File descriptors that may be open", None, count(figures.max_fds))?;
        gauge(to, "process_threads", "Threads", None, Some(figures.threads as f64))?;
        let help = "When this process began, since 1970";
        gauge(to, "process_start_time", help, Some(&Unit::Seconds), figures.started_at_s)
    }
}

/// The disk of the state directory, and what the store takes of it.
#[derive(Debug, Default)]
pub(super) struct DiskFigures(OnceLock<PathBuf>);

impl DiskFigures {
    /// Looks at this directory from now on.
    pub(super) fn watch(&self, state_dir: PathBuf) {
        // A process has one state directory.
        let _ = self.0.set(state_dir);
    }
}

/// Names a part.
#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct Part {
    part: &'static str,
}

impl Collector for DiskFigures {
    fn encode(&self, mut encoder: DescriptorEncoder) -> fmt::Result {
        let Some(dir) = self.0.get() else { return Ok(()) };
        let encode_part = |to: &mut MetricEncoder<'_>, part: &'static str, bytes: u64| {
            ConstGauge::new(bytes as f64).encode(to.encode_family(&Part { part })?)
        };
        if let Ok(disk) = rustix::fs::statvfs(dir) {
            let help = "The disk of state.dir: all of it, and what is free for this user";
            let mut to = encoder.encode_descriptor("disk", help, Some(&Unit::Bytes), MetricType::Gauge)?;
            encode_part(&mut to, "size", disk.f_blocks * disk.f_frsize)?;
            encode_part(&mut to, "free", disk.f_bavail * disk.f_frsize)?;
        }
        let size = |name: &str| fs::metadata(dir.join(name)).ok().map(|file| file.len());
        let parts = [("database", size(DATABASE)), ("log", size(&format!("{DATABASE}-wal")))];
        if parts.iter().any(|(_, bytes)| bytes.is_some()) {
            let help = "Files of the embedded store";
            let mut to = encoder.encode_descriptor("store", help, Some(&Unit::Bytes), MetricType::Gauge)?;
            for (part, bytes) in parts {
                if let Some(bytes) = bytes {
                    encode_part(&mut to, part, bytes)?;
                }
            }
        }
        Ok(())
    }
}
