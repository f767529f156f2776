//! The service manager's end of `sd_notify`: a datagram socket that collects what the daemon says.

use std::{
    os::unix::net::UnixDatagram,
    path::{Path, PathBuf},
};

use super::{LIVENESS, wait_for};

pub(crate) struct NotifySocket {
    socket: UnixDatagram,
    path: PathBuf,
    /// Assignments so far, `KEY=value`, in order.
    said: Vec<String>,
}

impl NotifySocket {
    pub(crate) fn bind(path: &Path) -> Self {
        let socket = UnixDatagram::bind(path).expect("a new socket");
        socket.set_nonblocking(true).expect("sockets can be non-blocking");
        Self { socket, path: path.to_owned(), said: Vec::new() }
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Everything said so far.
    pub(crate) fn said(&mut self) -> &[String] {
        let mut buffer = [0; 4096];
        while let Ok(length) = self.socket.recv(&mut buffer) {
            let text = String::from_utf8_lossy(&buffer[..length]);
            self.said.extend(text.lines().map(str::to_owned));
        }
        &self.said
    }

    /// Drops what an earlier process said.
    pub(crate) fn forget(&mut self) {
        self.said();
        self.said.clear();
    }

    /// Waits until something that begins with `prefix` was said; returns it.
    pub(crate) fn wait(&mut self, prefix: &str) -> String {
        wait_for(LIVENESS, &format!("`{prefix}` on the notify socket"), || {
            self.said().iter().find(|line| line.starts_with(prefix)).cloned()
        })
    }

    pub(crate) fn count(&mut self, prefix: &str) -> usize {
        self.said().iter().filter(|line| line.starts_with(prefix)).count()
    }
}
