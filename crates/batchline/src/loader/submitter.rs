//! The submitter: takes full tickets in order, has the device fetch them, and queues the batches
//! for the consumer. It is no thread of its own: the worker that completes the ticket in front has
//! the turn.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use smallvec::{SmallVec, smallvec};

use super::config::ErrorPolicy;
use super::deliver::{Ending, Ready};
use super::pipeline::Pipeline;
use super::slot::Slot;
use super::ticket::{Place, SkippedRow, Ticket};
use crate::backend::{ConvertSpec, GatherBy, MAX_PARTS};
use crate::batch::BatchInfo;
use crate::command::{CommandBuffer, GatherParts, Source, Submission};
use crate::memory::{Patience, Share, Tensor};
use crate::source::{BatchLayout, Part};
use crate::staging::StagingBuffer;
use crate::stats::{Doing, Lap, StageClock};
use crate::{DType, Error, GpuBatch, Result, Shape, Skipped};

/// Batches that are submitted as one, at most.
const TOGETHER: usize = 4;
type Together<T> = SmallVec<[T; TOGETHER]>;

/// What is known of a batch before it has memory.
#[derive(Debug)]
struct Prepared {
    about: BatchInfo,
    place: Place,
    skipped: Vec<Skipped>,
}

impl Pipeline {
    /// Submits the tickets that are full, in order, until the one in front is not; nothing, where
    /// another thread is at it. Whoever completes the ticket in front calls this, so that no thread
    /// has to be woken for it.
    pub(super) fn submit_full(&self, worker: &mut Lap<'_>) {
        // Where there is nothing to hand to the device the time is the worker's.
        let own = StageClock::default();
        let is_batch = self.slots_are_batches();
        let mut lap = Lap::start(if is_batch { &own } else { &self.counters.submitter });
        let mut turn = false;
        while let Some(next) = self.ring.next_to_submit(&mut turn)
            && self.submit_next(next, &mut lap)
        {}
        if is_batch {
            worker.spent(Doing::Working);
        } else {
            worker.skip();
        }
    }

    /// Makes a batch of the next ticket, or several of those behind it too, and queues them; false
    /// when there is none, or that failed, and the ending is set.
    fn submit_next(&self, next: Result<Option<Ticket>>, lap: &mut Lap<'_>) -> bool {
        let ending = match next {
            Ok(Some(ticket)) => {
                let place = ticket.place;
                crate::trace::span!("submit", epoch = place.epoch, batch = place.batch);
                match self.submit(ticket, lap) {
                    Ok(batches) => {
                        batches.into_iter().for_each(|ready| self.push(ready));
                        lap.spent(Doing::Working);
                        return true;
                    }
                    // Errors of samples say where they come from.
                    Err(error @ (Error::Stage { .. } | Error::TooManySkipped { .. })) => {
                        Ending::Failed(error)
                    }
                    Err(error) => Ending::Failed(Error::Stage {
                        stage: "submitter",
                        epoch: place.epoch,
                        batch: place.batch,
                        sample: None,
                        source: Arc::new(error),
                    }),
                }
            }
            Ok(None) => match self.count_skips(self.ring.take_trailing()) {
                Ok(trailing) => {
                    *self.trailing.lock() = trailing;
                    Ending::End
                }
                Err(error) => Ending::Failed(error),
            },
            Err(error) => Ending::Failed(error),
        };
        // Where the ring was stopped, the ending has been set already, and that one counts.
        self.finish(ending);
        false
    }

    /// Makes a batch of a ticket. Where batches are brief it takes the full tickets behind it along,
    /// as far as there are outputs.
    fn submit(&self, ticket: Ticket, lap: &mut Lap<'_>) -> Result<Together<Ready>> {
        let buffers = self.buffers();
        let (first, slot) = self.prepare(ticket)?;
        let Some(outputs) = &buffers.outputs else {
            let Slot::Unified(loan) = slot else {
                unreachable!("only a unified device goes without outputs")
            };
            return Ok(smallvec![self.ready(first, &Share::lent(loan), None)?]);
        };
        let new_output = || buffers.new_output();
        lap.spent(Doing::Working);
        let output = Share::lent(outputs.acquire(Patience::Forever, new_output)?);
        let mut commands = buffers.commands.get_buffer()?;
        let raw = match (&slot, &buffers.raws) {
            (Slot::Staging(_), Some(raws)) => {
                Some(Share::lent(raws.acquire(Patience::Forever, || buffers.new_raw())?))
            }
            _ => None,
        };
        lap.spent(Doing::WaitingForRoom);
        let alone = raw.is_some() || !self.route.is_brief(buffers.output_layout.bytes);
        self.transfer(slot, raw, &output, first.about.rows, &mut commands)?;
        let mut batches: Together<_> = smallvec![(first, output)];
        while !alone && batches.len() < TOGETHER && self.ring.has_plain() {
            // The consumer may hold all of them until he has those that are made here.
            let Ok(output) = outputs.acquire(Patience::None, new_output) else { break };
            let Some(ticket) = self.ring.take_plain() else { break };
            let (next, slot) = self.prepare(ticket)?;
            let output = Share::lent(output);
            self.transfer(slot, None, &output, next.about.rows, &mut commands)?;
            batches.push((next, output));
        }
        let transfer = if commands.is_empty() { None } else { Some(commands.execute()?) };
        let ready = |(next, output): (Prepared, Share)| self.ready(next, &output, transfer.clone());
        batches.into_iter().map(ready).collect()
    }

    /// What a ticket becomes, and its slot, without the rows that are left out.
    fn prepare(&self, ticket: Ticket) -> Result<(Prepared, Slot)> {
        let Ticket { number, place, mut slot, layout, failure, mut skipped, .. } = ticket;
        if let Some((_, error)) = failure {
            return Err(error);
        }
        skipped.sort_by_key(|skip| skip.row);
        let left_out: Vec<u64> = skipped.iter().filter_map(|skip| skip.row).collect();
        let skipped = self.count_skips(skipped)?;
        // Padding rows are the last ones.
        let real = place.rows.rows - place.rows.padding;
        let padding =
            place.rows.padding - left_out.iter().filter(|row| **row >= real).count() as u64;
        close_up(&mut slot, &layout, &left_out);
        let about = BatchInfo {
            batch_id: number,
            generation: self.generation,
            epoch: place.epoch,
            batch_in_epoch: place.batch,
            last_in_epoch: place.last,
            rows: place.rows.rows - left_out.len() as u64,
            padding,
        };
        Ok((Prepared { about, place, skipped }, slot))
    }

    /// The batch that lies in an output, or will once it is transferred.
    fn ready(
        &self,
        prepared: Prepared,
        output: &Share,
        transfer: Option<Submission>,
    ) -> Result<Ready> {
        let Prepared { about, place, skipped } = prepared;
        let buffers = self.buffers();
        let mut tensors = buffers.lists.take();
        for part in &buffers.output_layout.parts {
            tensors.push(view(output, part, about.rows)?);
        }
        let spec = Arc::clone(&buffers.spec);
        let batch = GpuBatch::new(tensors, spec, about, transfer, &buffers.lists);
        Ok(Ready { batch, place, skipped })
    }

    /// Counts what was left out, in order, against what the policy allows.
    fn count_skips(&self, skips: Vec<SkippedRow>) -> Result<Vec<Skipped>> {
        let mut list = Vec::with_capacity(skips.len());
        for SkippedRow { skipped, error, .. } in skips {
            let count = self.counters.skipped.fetch_add(1, Ordering::Relaxed) + 1;
            if let ErrorPolicy::Skip { at_most } = self.config.error_policy
                && count > at_most
            {
                let source = Arc::new(error);
                return Err(Error::TooManySkipped { skipped: count, at_most, source });
            }
            list.push(skipped);
        }
        Ok(list)
    }

    /// Records what gets the slot's content, or the samples that it names, into an output.
    fn transfer(
        &self,
        slot: Slot,
        raw: Option<Share>,
        output: &Share,
        rows: u64,
        commands: &mut CommandBuffer,
    ) -> Result<()> {
        if rows == 0 {
            return Ok(());
        }
        match slot {
            Slot::Unified(loan) => self.convert(&Share::lent(loan), output, rows, commands),
            Slot::Staging(slot) if self.route.is_staged() => {
                self.upload(slot, raw.as_ref().unwrap_or(output), rows, commands)?;
                raw.map_or(Ok(()), |raw| self.convert(&raw, output, rows, commands))
            }
            Slot::Staging(slot) => self.gather(slot, raw.as_ref(), output, rows, commands),
        }
    }

    /// Records the copy of a slot: one for all tensors. Between them it carries bytes of no meaning.
    fn upload(
        &self,
        slot: StagingBuffer,
        target: &Share,
        rows: u64,
        commands: &mut CommandBuffer,
    ) -> Result<()> {
        let layout = &self.buffers().layout;
        let last = layout.parts.last().expect("an input at least");
        let used = last.offset + rows * last.row_bytes;
        let alignment = self.config.memory.device().info().copy_alignment;
        let used = used.next_multiple_of(alignment).min(layout.bytes);
        commands.upload_range(slot, 0..used, &whole(target, layout.bytes)?, 0)?;
        self.counters.transferred.fetch_add(used, Ordering::Relaxed);
        Ok(())
    }

    /// Records what makes an output of a batch as the source has it.
    fn convert(
        &self,
        raw: &Share,
        output: &Share,
        rows: u64,
        commands: &mut CommandBuffer,
    ) -> Result<()> {
        let buffers = self.buffers();
        let pairs = buffers.raw_layout.parts.iter().zip(&buffers.output_layout.parts);
        for (number, (from, to)) in pairs.enumerate() {
            let (from, to) = (view(raw, from, rows)?, view(output, to, rows)?);
            match (number, &buffers.convert) {
                (0, Some(conversion)) => commands.convert(&from, &to, conversion)?,
                _ => commands.copy(&from, &to)?,
            }
        }
        Ok(())
    }

    /// Records what fetches the samples that a slot names: each tensor straight into the output, but
    /// for an input that is converted later.
    fn gather(
        &self,
        slot: StagingBuffer,
        raw: Option<&Share>,
        output: &Share,
        rows: u64,
        commands: &mut CommandBuffer,
    ) -> Result<()> {
        let buffers = self.buffers();
        let indices = commands.keep_indices(slot, rows);
        let input = match raw {
            Some(raw) => view(raw, &buffers.raw_layout.parts[0], rows)?,
            None => view(output, &buffers.output_layout.parts[0], rows)?,
        };
        let mut transferred = rows * 8;
        // Copies first: a kernel that they would wait for leaves the link idle.
        for by in [GatherBy::Copies, GatherBy::Kernel] {
            let mut parts = GatherParts::default();
            for (number, source) in self.route.sources.iter().enumerate() {
                let Some(source) = source.as_ref().filter(|_| self.route.by[number] == by) else {
                    continue;
                };
                let row_bytes = buffers.raw_layout.parts[number].row_bytes;
                if matches!(source, Source::Registered(_)) {
                    transferred += rows * row_bytes;
                }
                if number == 0 {
                    let spec = self.fused_spec(&input, rows)?;
                    parts.push(source, row_bytes, &input, spec);
                } else {
                    let target = view(output, &buffers.output_layout.parts[number], rows)?;
                    parts.push(source, row_bytes, &target, None);
                }
                if parts.len() == MAX_PARTS {
                    commands.gather(&indices, by, std::mem::take(&mut parts));
                }
            }
            commands.gather(&indices, by, parts);
        }
        if let (Some(_), Some(conversion)) = (raw, &buffers.convert) {
            let target = view(output, &buffers.output_layout.parts[0], rows)?;
            commands.convert(&input, &target, conversion)?;
        }
        self.counters.transferred.fetch_add(transferred, Ordering::Relaxed);
        Ok(())
    }

    /// What is made of the input on the way, if that is so.
    fn fused_spec(&self, target: &Tensor, rows: u64) -> Result<Option<ConvertSpec>> {
        let buffers = self.buffers();
        let Some(conversion) = buffers.convert.as_ref().filter(|_| self.route.fused) else {
            return Ok(None);
        };
        let input = &buffers.raw_layout.parts[0];
        conversion.spec_for(input.dtype, target.dtype(), input.shape.batched(rows)?).map(Some)
    }
}

/// One tensor of a batch of so many rows.
fn view(share: &Share, part: &Part, rows: u64) -> Result<Tensor> {
    let shape = part.shape.batched(rows)?;
    Ok(Tensor::new(share.clone(), part.offset, shape, part.dtype))
}

/// All bytes of a batch.
fn whole(share: &Share, bytes: u64) -> Result<Tensor> {
    Ok(Tensor::new(share.clone(), 0, Shape::new(&[bytes])?, DType::U8))
}

/// Moves rows together over those that are left out.
fn close_up(slot: &mut Slot, layout: &BatchLayout, left_out: &[u64]) {
    if left_out.is_empty() {
        return;
    }
    let mut rows = slot.rows(layout);
    for (number, part) in layout.parts.iter().enumerate() {
        let row_bytes = usize::try_from(part.row_bytes).expect("within memory that exists");
        let bytes = rows.all(number);
        let mut kept = 0;
        let mut left_out = left_out.iter().peekable();
        let count = bytes.len().checked_div(row_bytes).unwrap_or(0);
        for row in 0..count {
            if left_out.next_if(|left| **left == row as u64).is_some() {
                continue;
            }
            if kept != row {
                bytes.copy_within(row * row_bytes..(row + 1) * row_bytes, kept * row_bytes);
            }
            kept += 1;
        }
    }
}
