use tokio::sync::watch;

/// Which of a worker's destinations are held, by their indexes: disabled for all, or gone. Looked at before every request
/// (B11).
pub struct Holds(Vec<watch::Sender<bool>>);

impl Holds {
    /// None of `destinations` is.
    pub fn new(destinations: usize) -> Self {
        Self((0..destinations).map(|_| watch::Sender::new(false)).collect())
    }

    /// Whether nothing may be begun for it now.
    pub fn is_held(&self, destination: usize) -> bool {
        *self.0[destination].borrow()
    }

    /// Returns when it is held.
    pub async fn held(&self, destination: usize) {
        // It can't be dropped while it is borrowed.
        let _ = self.0[destination].subscribe().wait_for(|held| *held).await;
    }

    /// From here on it is held, or not. Whether it becomes held with this.
    pub fn set(&self, destination: usize, held: bool) -> bool {
        !self.0[destination].send_replace(held) && held
    }
}
