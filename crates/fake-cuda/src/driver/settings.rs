//! Settings in text: `devices=2,latency_us=50,seed=7`. From the environment variable `FAKE_CUDA`
//! when the library is loaded, from a test at any time.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use super::rules::Rule;

/// What the driver is to be like. The crate's documentation tells of each.
#[derive(Debug, Clone)]
pub(crate) struct Settings {
    pub(crate) devices: usize,
    pub(crate) memory: usize,
    pub(crate) version: i32,
    pub(crate) init: u32,
    pub(crate) latency_us: u64,
    pub(crate) random_latency_us: u64,
    pub(crate) seed: u64,
    pub(crate) patience: Duration,
    pub(crate) missing: BTreeSet<String>,
    pub(crate) pageable: bool,
    pub(crate) held: bool,
    pub(crate) trace: bool,
    pub(crate) print: bool,
    pub(crate) attributes: BTreeMap<i32, i32>,
    pub(crate) rules: Vec<Rule>,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            devices: 2,
            memory: 1 << 30,
            version: 13000,
            init: 0,
            latency_us: 0,
            random_latency_us: 0,
            seed: 0,
            patience: Duration::from_secs(10),
            missing: BTreeSet::new(),
            pageable: false,
            held: false,
            trace: false,
            print: false,
            attributes: BTreeMap::new(),
            rules: Vec::new(),
        }
    }
}

impl Settings {
    /// Changes what `text` names.
    ///
    /// # Errors
    /// What can't be read.
    pub(crate) fn apply(&mut self, text: &str) -> Result<(), String> {
        for setting in text.split(',').map(str::trim).filter(|setting| !setting.is_empty()) {
            self.apply_one(setting).ok_or_else(|| format!("the setting '{setting}' is none"))?;
        }
        Ok(())
    }

    fn apply_one(&mut self, setting: &str) -> Option<()> {
        let (key, value) = setting.split_once('=')?;
        match key {
            "devices" => self.devices = value.parse().ok()?,
            "memory_mib" => self.memory = value.parse::<usize>().ok()?.checked_mul(1 << 20)?,
            "version" => self.version = value.parse().ok()?,
            "init" => self.init = value.parse().ok()?,
            "latency_us" => self.latency_us = value.parse().ok()?,
            "random_latency_us" => self.random_latency_us = value.parse().ok()?,
            "seed" => self.seed = value.parse().ok()?,
            "patience_ms" => self.patience = Duration::from_millis(value.parse().ok()?),
            "missing" => self.missing.extend(value.split('+').map(str::to_owned)),
            "no_batch" => {
                let names = ["cuMemcpyBatchAsync", "cuMemcpyBatchAsync_v2"].map(str::to_owned);
                if flag(value)? {
                    self.missing.extend(names);
                } else {
                    self.missing.retain(|name| !names.contains(name));
                }
            }
            "pageable" => self.pageable = flag(value)?,
            "held" => self.held = flag(value)?,
            "trace" => self.trace = flag(value)?,
            "print" => self.print = flag(value)?,
            "attribute" => {
                let (attribute, value) = value.split_once(':')?;
                self.attributes.insert(attribute.parse().ok()?, value.parse().ok()?);
            }
            "fail" => self.rules.push(Rule::parse(value)?),
            _ => return None,
        }
        Some(())
    }
}

fn flag(value: &str) -> Option<bool> {
    match value {
        "0" => Some(false),
        "1" => Some(true),
        _ => None,
    }
}
