//! A detector's hold on its library, which others may ask it to loosen: some resets are refused while anybody has the
//! device open, the one who only reads its temperature included.

use std::sync::Arc;

use tokio::sync::watch;

/// Asks a detector to let go of its library, and to take it up again. Clones share it.
#[derive(Clone, Debug)]
pub struct Grip(Arc<Hold>);

#[derive(Debug)]
struct Hold {
    asked: watch::Sender<bool>,
    held: watch::Sender<bool>,
}

impl Default for Grip {
    fn default() -> Self {
        Self(Arc::new(Hold { asked: watch::Sender::new(false), held: watch::Sender::new(false) }))
    }
}

impl Grip {
    /// Asks, and waits until nobody holds the library. Not bounded: give it a deadline.
    pub async fn loosen(&self) {
        self.0.asked.send_replace(true);
        let _ = self.0.held.subscribe().wait_for(|held| !held).await;
    }

    /// The library may be taken up again.
    pub fn restore(&self) {
        self.0.asked.send_replace(false);
    }

    /// Waits until it is asked to let go.
    pub(crate) async fn asked(&self) {
        let _ = self.0.asked.subscribe().wait_for(|asked| *asked).await;
    }

    /// Waits until it may take the library up again.
    pub(crate) async fn restored(&self) {
        let _ = self.0.asked.subscribe().wait_for(|asked| !asked).await;
    }

    /// Says whether the library is held.
    pub(crate) fn hold(&self, held: bool) {
        self.0.held.send_replace(held);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn who_asks_waits_until_the_holder_has_let_go() {
        let grip = Grip::default();
        grip.loosen().await;
        grip.restore();
        grip.hold(true);
        let holder = grip.clone();
        let letting_go = tokio::spawn(async move {
            holder.asked().await;
            holder.hold(false);
            holder.restored().await;
        });
        grip.loosen().await;
        assert!(!letting_go.is_finished());
        grip.restore();
        letting_go.await.unwrap();
    }
}
