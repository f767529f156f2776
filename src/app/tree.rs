//! One supervision tree of the daemon: a part that starts, ends and gives up by itself.

use std::{pin::pin, time::Duration};

use actix::{Actor as _, Addr};
use futures_util::future::{join_all, select_all};
use postrider_actors::supervision::{ChildSpec, Shutdown, Supervisor, SupervisorSettings};
use tokio::sync::oneshot;

use crate::exit::Exit;

/// A running tree.
pub(super) struct Tree {
    root: Addr<Supervisor>,
    ended: oneshot::Receiver<i32>,
}

impl Tree {
    /// Starts a tree. No other one of the process ever had this `name`.
    pub(super) fn start(name: String, specs: Vec<ChildSpec>, settings: SupervisorSettings) -> Self {
        let (ended_to, ended) = oneshot::channel();
        Self { root: Supervisor::root(name, specs, settings, ended_to).start(), ended }
    }

    /// Asks it to finish what it has begun and to end. Asked again, it has `within` from then on.
    pub(super) fn ask_to_end(&self, within: Duration) {
        // Nobody else sends it anything but the exits of its children, which need no room. One that is gone has ended.
        let _ = self.root.try_send(Shutdown { code: 0, within });
    }

    /// Waits for its end. Not to be called again after that.
    async fn end(&mut self) -> Exit {
        // A tree that did not end in order has used its restarts up.
        if (&mut self.ended).await == Ok(0) { Exit::Done } else { Exit::Software }
    }
}

/// Ends trees side by side.
pub(super) async fn end_all(trees: &mut Vec<Tree>, within: Duration) -> Exit {
    for tree in &*trees {
        tree.ask_to_end(within);
    }
    let exits = join_all(trees.iter_mut().map(Tree::end)).await;
    trees.clear();
    exits.into_iter().find(|exit| *exit != Exit::Done).unwrap_or(Exit::Done)
}

/// Waits until one of the trees ends by itself, and takes it out. Without any trees it waits for ever.
pub(super) async fn first_end(trees: &mut Vec<Tree>) -> Exit {
    if trees.is_empty() {
        return std::future::pending().await;
    }
    let (exit, ended, _) = {
        let ends: Vec<_> = trees.iter_mut().map(|tree| Box::pin(tree.end())).collect();
        pin!(select_all(ends)).await
    };
    drop(trees.swap_remove(ended));
    exit
}
