//! A pod that only sleeps: the cost of a checkpoint itself.

use std::net::SocketAddr;
use std::path::Path;

use anyhow::Result;

use super::{Offer, Recipe, Workload};
use crate::lab::{Lab, Netns};

/// `sleep infinity`.
#[derive(Clone, Copy, Debug)]
pub struct Sleep;

impl Workload for Sleep {
    fn name(&self) -> &'static str {
        "sleep"
    }

    fn claim(&self) -> &'static str {
        "sub-second checkpoint and restart: the smallest pod"
    }

    fn in_pod(&self, _lab: &Lab) -> Result<Recipe> {
        Ok(Recipe { command: vec!["sleep".into(), "infinity".into()], ..Recipe::default() })
    }

    fn natively(&self, lab: &Lab, _directory: &Path) -> Result<Recipe> {
        self.in_pod(lab)
    }

    fn offers(&self) -> Offer {
        Offer::Nothing
    }

    fn ready_for(&self, _from: &Netns, _address: SocketAddr) -> Result<()> {
        Ok(())
    }

    fn health(&self, _lab: &Lab, _address: SocketAddr) -> Result<()> {
        Ok(())
    }
}
