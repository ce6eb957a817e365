//! Where and of what the figures are.

use std::process::Command;

use serde::Serialize;

#[derive(Debug, Serialize)]
pub struct Machine {
    cpu: String,
    cores: usize,
    last_level_cache: String,
    kernel: String,
    rustc: String,
    /// `-dirty` where the tree differs from it.
    commit: String,
    command: String,
    date: String,
    load_before: String,
}

impl Machine {
    pub fn look() -> Self {
        Self {
            cpu: cpu(),
            cores: std::thread::available_parallelism().map_or(0, usize::from),
            last_level_cache: last_level_cache(),
            kernel: output("uname", &["-srm"]),
            rustc: output("rustc", &["--version"]),
            commit: output("git", &["describe", "--always", "--dirty", "--abbrev=10"]),
            command: std::env::args().collect::<Vec<_>>().join(" "),
            date: output("date", &["-u", "+%Y-%m-%dT%H:%M:%SZ"]),
            load_before: read("/proc/loadavg"),
        }
    }

    pub fn print(&self) {
        println!("{}, {} cores, last-level cache {}", self.cpu, self.cores, self.last_level_cache);
        println!("{}, {}, commit {}", self.kernel, self.rustc, self.commit);
        println!("{}, load {}: {}", self.date, self.load_before, self.command);
    }
}

fn cpu() -> String {
    read("/proc/cpuinfo")
        .lines()
        .find_map(|line| line.strip_prefix("model name")?.split(':').nth(1).map(str::trim))
        .map_or_else(|| output("uname", &["-p"]), str::to_owned)
}

fn last_level_cache() -> String {
    let sizes =
        (0..8).map(|level| read(&format!("/sys/devices/system/cpu/cpu0/cache/index{level}/size")));
    sizes.rev().find(|size| !size.is_empty()).unwrap_or_default()
}

fn read(path: &str) -> String {
    std::fs::read_to_string(path).unwrap_or_default().trim().to_owned()
}

fn output(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).output();
    output.map_or_else(
        |error| format!("{program}: {error}"),
        |output| String::from_utf8_lossy(&output.stdout).trim().to_owned(),
    )
}
