//! The library's threads, counted in two ways: by their names, where the system tells them, and by
//! a mark that workers carry until they are joined. Nothing else in this test's process starts a
//! loader, so all of them belong to the scene that is being played.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

/// Workers that have called the test's code and are not over.
static MARKED: AtomicUsize = AtomicUsize::new(0);

struct Mark;

impl Drop for Mark {
    fn drop(&mut self) {
        // A thread that nobody joins shows by this.
        std::thread::sleep(Duration::from_millis(2));
        MARKED.fetch_sub(1, Ordering::SeqCst);
    }
}

thread_local! {
    static MARK: Mark = {
        MARKED.fetch_add(1, Ordering::SeqCst);
        Mark
    };
}

/// Marks the calling thread, if it is a worker.
pub(crate) fn mark() {
    if std::thread::current().name().is_some_and(|name| name.starts_with("worker-")) {
        MARK.with(|_| {});
    }
}

/// Marked threads that are not over.
pub(crate) fn marked() -> usize {
    MARKED.load(Ordering::SeqCst)
}

/// A thread of this process: its number, its name, and whether it sleeps.
#[derive(Debug)]
pub(crate) struct Listed {
    number: String,
    name: String,
    sleeps: bool,
}

/// The threads of this process that are not about to end; `None` where the system does not tell.
fn listed() -> Option<Vec<Listed>> {
    // The kernel's flag for a thread on its way out: it may be listed after it was joined.
    const EXITING: u64 = 4;
    let mut threads = Vec::new();
    for entry in std::fs::read_dir("/proc/self/task").ok()? {
        let folder = entry.ok()?.path();
        // It may end while we look.
        let Ok(stat) = std::fs::read_to_string(folder.join("stat")) else { continue };
        let (front, back) = stat.rsplit_once(')')?;
        let (number, name) = front.split_once(" (")?;
        let fields: Vec<&str> = back.split_whitespace().collect();
        if fields.get(6)?.parse::<u64>().ok()? & EXITING != 0 {
            continue;
        }
        let (number, name) = (number.to_owned(), name.to_owned());
        threads.push(Listed { number, name, sleeps: fields[0] == "S" });
    }
    Some(threads)
}

/// The number of the calling thread, by which others find it.
pub(crate) fn own_number() -> Option<String> {
    let link = std::fs::read_link("/proc/thread-self").ok()?;
    Some(link.file_name()?.to_string_lossy().into_owned())
}

/// The loader's threads and the device's.
pub(crate) fn is_of_loader(name: &str) -> bool {
    name.starts_with("worker-")
}

pub(crate) fn is_of_device(name: &str) -> bool {
    matches!(name, "reaper" | "faulty-device" | "free memory")
}

/// How many threads there are with such a name; `None` where the system does not tell.
pub(crate) fn count(is_counted: impl Fn(&str) -> bool) -> Option<usize> {
    Some(listed()?.iter().filter(|thread| is_counted(&thread.name)).count())
}

/// Waits until all other threads sleep: whatever they wait for, they have come there. Where the
/// system does not tell, it gives them a moment; no outcome depends on it.
pub(crate) fn settle() {
    let me = own_number();
    let rests = |thread: &Listed| thread.sleeps || Some(&thread.number) == me.as_ref();
    wait_for(|threads| threads.iter().all(rests));
}

/// Waits until a thread sleeps, or `over` says that it need not.
pub(crate) fn wait_until_asleep(number: Option<&str>, over: impl Fn() -> bool) {
    wait_for(|threads| {
        over() || !threads.iter().any(|thread| Some(&*thread.number) == number && !thread.sleeps)
    });
}

fn wait_for(condition: impl Fn(&[Listed]) -> bool) {
    let deadline = Instant::now() + Duration::from_secs(4);
    // Twice: between two locks a thread may sleep for a moment.
    let mut seen = 0;
    while seen < 2 && Instant::now() < deadline {
        std::thread::sleep(Duration::from_micros(500));
        match listed() {
            Some(threads) if condition(&threads) => seen += 1,
            Some(_) => seen = 0,
            None => seen += 1,
        }
    }
}
