//! Whether something grew over the run.

use crate::measure::Row;

/// Fewer rows than this say nothing.
pub const LEAST_ROWS: usize = 20;

const MIB: f64 = 1024.0 * 1024.0;

/// What grew, in words; nothing if all stayed flat. A driver in the process may take memory of its
/// own late.
pub fn judge(rows: &[Row], with_driver: bool) -> Vec<String> {
    let memory = |start: f64| start * 0.05 + if with_driver { 64.0 } else { 8.0 } * MIB;
    // A device that lives through the run keeps the records of its last submissions; wgpu's keeps
    // kernels too, and up to 256 parameter buffers that it throws away all at once.
    let lives = cfg!(any(feature = "wgpu", feature = "cuda"));
    let heap = |_| if lives { 2.0 * MIB } else { 64.0 * 1024.0 };
    // Next to each block that is given up its handle of 24 bytes stays, and the page by which it is
    // longer than asked for, so that it can begin at one. A device has up to some 16 blocks.
    let (given_up, lost) = rows.last().map_or((0, 0), |row| (row.given_up, row.lost));
    let handles = |_| 64.0 * 1024.0 * (1 + lost) as f64 + given_up as f64 / 8.0;
    let half = |_| 0.5;
    // A driver has two to five more open at times.
    let files = |_| if with_driver { 5.5 } else { 0.5 };
    // What is kept for later use is as large as the largest round asked for.
    let device = |start: f64| start * 0.05 + 256.0 * MIB;
    let resident = |row: &Row| row.resident as f64 - row.given_up as f64;
    [
        grew("resident memory", "bytes", rows, resident, memory),
        grew("the heap between rounds", "bytes", rows, |row| row.left_behind as f64, heap),
        grew(
            "the heap beside what was given up",
            "bytes",
            rows,
            |row| row.left_by_lost as f64,
            handles,
        ),
        grew("memory of the GPU", "bytes", rows, |row| row.device_bytes as f64, device),
        grew("threads between rounds", "threads", rows, |row| row.idle_threads as f64, half),
        grew("open files between rounds", "files", rows, |row| row.idle_files as f64, files),
    ]
    .into_iter()
    .flatten()
    .collect()
}

/// Says how much a series grew, by a line through its second half and by the largest values of its
/// second and of its last fifth, where that is more than `allowed` of what it was.
fn grew(
    what: &str,
    unit: &str,
    rows: &[Row],
    value: impl Fn(&Row) -> f64,
    allowed: impl Fn(f64) -> f64,
) -> Option<String> {
    let points: Vec<(f64, f64)> = rows.iter().map(|row| (row.seconds, value(row))).collect();
    let half = &points[points.len() / 2..];
    let (start, end) = line(half);
    let fifth = points.len() / 5;
    let most = |part: &[(f64, f64)]| part.iter().map(|(_, y)| *y).fold(f64::MIN, f64::max);
    let (early, late) = (most(&points[fifth..2 * fifth]), most(&points[points.len() - fifth..]));
    let by_line = end - start > allowed(start);
    let by_most = late - early > allowed(early);
    (by_line || by_most).then(|| {
        format!(
            "{what} grew: by {:.0} {unit} over the second half, and from at most {early:.0} in the \
             second fifth to {late:.0} in the last",
            end - start
        )
    })
}

/// The least-squares line through the points: its values at the first and the last of them.
fn line(points: &[(f64, f64)]) -> (f64, f64) {
    let count = points.len() as f64;
    let mean = |of: fn(&(f64, f64)) -> f64| points.iter().map(of).sum::<f64>() / count;
    let (mean_x, mean_y) = (mean(|point| point.0), mean(|point| point.1));
    let slope = points.iter().map(|(x, y)| (x - mean_x) * (y - mean_y)).sum::<f64>()
        / points.iter().map(|(x, _)| (x - mean_x).powi(2)).sum::<f64>().max(f64::MIN_POSITIVE);
    let at = |x: f64| mean_y + slope * (x - mean_x);
    (at(points[0].0), at(points[points.len() - 1].0))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows(change: impl Fn(u64, &mut Row)) -> Vec<Row> {
        (0..100)
            .map(|second| {
                let mut row = Row {
                    seconds: second as f64,
                    rounds: second,
                    samples: second,
                    // Warms up, then swings by 5 MiB.
                    resident: (30 << 20) - (20 << 20) / (second + 1) + second % 7 * (5 << 20) / 6,
                    threads: second % 9,
                    files: second % 5,
                    left_behind: 1000,
                    left_by_lost: 0,
                    idle_threads: 2,
                    idle_files: 5,
                    given_up: 0,
                    lost: 0,
                    device_bytes: 3 << 30,
                };
                change(second, &mut row);
                row
            })
            .collect()
    }

    #[test]
    fn what_is_flat_passes() {
        assert_eq!(judge(&rows(|_, _| {}), false), Vec::<String>::new());
    }

    #[test]
    fn memory_that_was_given_up_by_design_is_taken_off() {
        let given_up = |second: u64, row: &mut Row| {
            row.given_up = second << 20;
            row.resident += second << 20;
            row.left_by_lost += (second << 13).cast_signed();
        };
        assert_eq!(judge(&rows(given_up), false), Vec::<String>::new());
    }

    #[test]
    fn a_driver_may_open_files_for_a_while_but_not_more_and_more() {
        let judged = |change: fn(u64) -> u64, with_driver| {
            judge(&rows(|second, row| row.idle_files += change(second)), with_driver).len()
        };
        let at_times = |second| if second % 30 == 29 { 2 } else { 0 };
        let late = |second| if second == 95 { 2 } else { 0 };
        assert_eq!((judged(at_times, true), judged(late, true), judged(late, false)), (0, 0, 1));
        assert_eq!(judged(|second| second / 8, true), 1);
    }

    #[test]
    fn each_series_that_grows_is_named() {
        let growing = rows(|second, row| {
            row.resident += second * (400 << 10);
            row.left_behind += second.cast_signed() << 16;
            row.left_by_lost += second.cast_signed() * 2048;
            row.device_bytes += second * (16 << 20);
            // Late, and by one only.
            row.idle_threads += u64::from(second > 90);
            row.idle_files += second / 30;
        });
        let found = judge(&growing, false);
        let all = [
            "resident",
            "the heap between",
            "the heap beside",
            "memory of",
            "threads",
            "open files",
        ];
        for (found, what) in found.iter().zip(all) {
            assert!(found.starts_with(what), "{found}");
        }
        assert_eq!(found.len(), all.len());
    }
}
