//! Each way to the device, beside the others, on the same rows in random order.

use std::time::Duration;

use batchline::{Conversion, DType, MemoryManager};

use crate::data::{Data, Rows};
use crate::device::{IMAGE, LOOP, link, planes, threads};
use crate::driver::Driver;
use crate::flow::{Work, contender};
use crate::path::Path;
use crate::report::{Contender, Entry, Report, in_turn};
use crate::settings::Settings;

/// Samples of 28 × 28: several times MNIST, and whole batches of 256 and of 4,096.
pub(crate) const DIGITS: u64 = 262_144;

pub(crate) fn measure(
    settings: &Settings,
    memory: &MemoryManager,
    driver: &Driver,
    data: Data,
    report: &mut Report,
) {
    let mut lab = Lab { settings, memory, driver, data, span: settings.span };
    lab.images(report);
    lab.images_to_planes(report);
    for (batch, gathered, resident) in [(256, 10e6, 20e6), (4096, 30e6, 200e6)] {
        lab.digits(batch, gathered, report);
        lab.digits_to_floats(batch, resident, report);
    }
    // Many figures, for a picture.
    lab.span /= 3;
    lab.row_sizes(report);
    lab.batch_sizes(report);
}

struct Lab<'a> {
    settings: &'a Settings,
    memory: &'a MemoryManager,
    driver: &'a Driver,
    data: Data,
    span: Duration,
}

impl<'a> Lab<'a> {
    fn loads(
        &self,
        row: &str,
        rows: &Rows,
        path: Path,
        convert: Option<(DType, Conversion)>,
    ) -> Contender<'a> {
        self.loads_as(Entry::ours(row, path.name(), "samples/s"), rows, path, convert)
    }

    fn loads_as(
        &self,
        entry: Entry,
        rows: &Rows,
        path: Path,
        convert: Option<(DType, Conversion)>,
    ) -> Contender<'a> {
        let mut work = Work::new(rows.batch, self.settings.workers, path);
        work.convert = convert;
        contender(self.memory, rows, rows.dataset(), &work, entry, self.span)
    }

    /// The plain loop, in samples.
    fn link(&self, row: &str, rows: &Rows) -> Contender<'a> {
        let (bytes, sample) = (rows.batch_bytes(), rows.row as f64);
        link(self.driver, row, bytes, "samples/s", sample, self.span).with("sample_bytes", rows.row)
    }

    fn threads(&self, row: &str, rows: &Rows) -> Contender<'a> {
        threads(row, rows, self.settings.workers, self.span)
    }

    fn images(&self, report: &mut Report) {
        let row = "u8 3x224x224, batch 256";
        let rows = self.data.rows(&IMAGE, self.settings.pick(256, 4), u64::MAX);
        let mut contenders = vec![self.link(row, &rows), self.threads(row, &rows)];
        for path in Path::ALL {
            let entry = Entry::ours(row, path.name(), "samples/s");
            let entry = if path == Path::Gathered {
                entry.at_least(50e9 / rows.row as f64).with("cores_below", 1.0)
            } else {
                entry
            };
            contenders.push(self.loads_as(entry, &rows, path, None));
        }
        in_turn(report, self.settings.rounds, contenders);
    }

    /// Beside the same rows without a conversion.
    fn images_to_planes(&self, report: &mut Report) {
        let row = "u8 224x224x3 to bf16 planes, batch 256";
        let rows = self.data.rows(&[224, 224, 3], self.settings.pick(256, 4), u64::MAX);
        let plain = format!("{}, not converted", Path::Gathered.name());
        let entry = Entry::ours(row, &plain, "samples/s");
        let mut contenders =
            vec![self.link(row, &rows), self.loads_as(entry, &rows, Path::Gathered, None)];
        for path in Path::PLAIN {
            let entry = Entry::ours(row, path.name(), "samples/s");
            let entry = if path == Path::Gathered { entry.share_of(&plain, 0.95) } else { entry };
            let convert = Some((DType::BF16, planes()));
            contenders.push(self.loads_as(entry, &rows, path, convert));
        }
        in_turn(report, self.settings.rounds, contenders);
    }

    fn digits_of(&self, batch: u64) -> Rows {
        self.data.rows(&[1, 28, 28], self.settings.pick(batch, batch / 64), DIGITS)
    }

    fn digits(&self, batch: u64, aim: f64, report: &mut Report) {
        let row = format!("u8 1x28x28, batch {batch}");
        let rows = self.digits_of(batch);
        let mut contenders = vec![self.link(&row, &rows), self.threads(&row, &rows)];
        for path in Path::ALL {
            let entry = Entry::ours(&row, path.name(), "samples/s");
            let entry = if path == Path::Gathered { entry.at_least(aim) } else { entry };
            contenders.push(self.loads_as(entry, &rows, path, None));
        }
        in_turn(report, self.settings.rounds, contenders);
    }

    fn digits_to_floats(&self, batch: u64, aim: f64, report: &mut Report) {
        let row = format!("u8 1x28x28 to f32, batch {batch}");
        let rows = self.digits_of(batch);
        let mut contenders = Vec::new();
        for path in Path::PLAIN {
            let entry = Entry::ours(&row, path.name(), "samples/s");
            let entry = if path == Path::Resident { entry.at_least(aim) } else { entry };
            let conversion = Conversion::new().normalize(&[33.3], &[78.6]);
            contenders.push(self.loads_as(entry, &rows, path, Some((DType::F32, conversion))));
        }
        in_turn(report, self.settings.rounds, contenders);
    }

    /// Which path is best for which size of rows, in batches of about 32 MiB.
    fn row_sizes(&self, report: &mut Report) {
        let data = self.sweep_data();
        for bytes in [256u64, 784, 4 << 10, 16 << 10, 48 << 10, 150_528, 1 << 20] {
            let most = self.settings.pick(32 << 20, 1 << 20);
            let batch = (most / bytes).next_power_of_two().clamp(4, 16_384);
            let row = format!("rows of {bytes} B");
            let rows = data.rows(&[bytes], batch, u64::MAX);
            let contenders = Path::PURE.into_iter().map(|path| {
                self.swept("row_bytes", self.loads(&row, &rows, path, None), bytes, batch)
            });
            in_turn(report, self.settings.rounds, contenders.collect());
        }
    }

    /// How much of the link batches of each size use, in rows of 150,528 bytes.
    fn batch_sizes(&self, report: &mut Report) {
        let data = self.sweep_data();
        for batch in [4, 16, 64, 256, 1024] {
            let batch = self.settings.pick(batch, (batch / 32).max(1));
            let row = format!("u8 3x224x224, batches of {batch}");
            let rows = data.rows(&IMAGE, batch, u64::MAX);
            let swept = |contender| self.swept("batch", contender, rows.row as u64, batch);
            let mut contenders = vec![swept(self.link(&row, &rows))];
            for path in Path::PURE.into_iter().filter(|path| *path != Path::Resident) {
                let entry = Entry::ours(&row, path.name(), "samples/s").with("of", LOOP);
                contenders.push(swept(self.loads_as(entry, &rows, path, None)));
            }
            in_turn(report, self.settings.rounds, contenders);
        }
    }

    /// A part, so that what is made once for each path takes less time.
    fn sweep_data(&self) -> Data {
        self.data.part(self.settings.pick(1 << 30, 8 << 20))
    }

    fn swept(
        &self,
        over: &str,
        contender: Contender<'a>,
        row_bytes: u64,
        batch: u64,
    ) -> Contender<'a> {
        contender.with("sweep", over).with("row_bytes", row_bytes).with("batch", batch)
    }
}
