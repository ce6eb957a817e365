#!/usr/bin/env python3
"""Promise: each invariant is guarded. Breaks the library in a copy, one break at
a time, and expects the test that ARCHITECTURE.md names to fail.

    ci/invariants.py            all breaks, about ten minutes on 2 cores
    ci/invariants.py 3 7        those of invariants 3 and 7
    ci/invariants.py --list     what is broken, as a table

A script of its own: `.ci/run` does not call it. A break that no longer applies to
the code is a failure too.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COPY = ROOT / "target" / "invariants"
# A test that hangs has failed.
LIMIT_S = 120

# invariant, what is broken, file under src/, the code, what it becomes, target, test
BREAKS = [
    (1, "a batch is dropped on a full queue", "loader/deliver.rs",
     "if state.ending.is_none() {\n            state.ready.push_back(ready);",
     "if state.ending.is_none() && state.ready.len() < 2 {\n            state.ready.push_back(ready);",
     "loader", "the_shuffle_is_the_same_for_any_workers"),
    (1, "a sample is skipped without being listed", "loader/worker.rs",
     "outcome.skipped.push(SkippedRow {", "let _ = (SkippedRow {",
     "loader", "skipped_samples_are_left_out_counted_and_listed"),
    (2, "full tickets leave in any order", "loader/ticket.rs",
     "if self.tickets.front().is_some_and(Ticket::is_full) {\n            self.front += 1;\n"
     "            return Some(Ok(self.tickets.pop_front()));",
     "if let Some(at) = self.tickets.iter().rposition(Ticket::is_full) {\n            self.front += 1;\n"
     "            return Some(Ok(self.tickets.remove(at)));",
     "loader", "any_settings_any_delays_any_fault"),
    (2, "two workers submit at once", "loader/ticket.rs",
     "if state.submitting && !*turn {", "if state.submitting && !*turn && self.is_stopped() {",
     "loader", "any_settings_any_delays_any_fault"),
    (3, "a slot is free at submission", "command/reaper.rs",
     "fences.into_iter().try_for_each(|fence| health.wait(fence))",
     "fences.into_iter().try_for_each(|fence| { health.known_passed(fence); Ok(()) })",
     "loader", "a_slot_is_free_only_when_its_transfer_is_over"),
    (3, "memory of an unknown state is used again", "command/execute.rs",
     "(Progress::Quarantined(error.clone()), Err(error))",
     "(Progress::Refused(error.clone(), ends), Err(error))",
     "loader", "what_may_have_reached_the_device_is_quarantined"),
    (4, "an operation in flight does not hold its memory", "memory/storage.rs",
     "self.0.parts.lock().holds += 1;\n        Hold(Arc::clone(&self.0))",
     "self.0.parts.lock().holds += 0;\n        Hold(Arc::clone(&self.0))",
     "loader", "any_settings_any_delays_any_fault"),
    (5, "the consumer's position is not noted", "memory/storage.rs",
     "Ok(fence) => self.0.block().usage.lock().note_read(fence),", "Ok(_) => {}",
     "loader", "an_output_is_rewritten_only_after_the_consumers_work_on_it"),
    (5, "the consumer does not wait for the batch", "loader/pipeline.rs",
     "core.backend().consumer_after(stream, written.as_slice())",
     "core.backend().consumer_after(stream, &written.as_slice()[..0])",
     "loader", "any_settings_any_delays_any_fault"),
    (5, "streams do not wait for one another", "command/execute.rs",
     ".filter(|fence| fence.value > 0 && fence.stream != own.stream)",
     ".filter(|fence| fence.value > 0 && fence.stream != own.stream && fence.value == 0)",
     "loader", "any_settings_any_delays_any_fault"),
    (6, "the byte limit is not looked at", "memory/shelf.rs",
     "if existing <= self.limit - capacity {", "if existing <= self.limit.saturating_mul(1000) {",
     "loader", "limits_bound_the_buffers_and_one_of_each_is_enough"),
    (6, "a batch allocates", "batch.rs",
     "self.0.lock().pop().unwrap_or_default()", "Vec::with_capacity(self.0.lock().len())",
     "allocations", "batches_are_delivered_without_allocating"),
    (7, "slots are grabbed out of order", "loader/ticket.rs",
     "            if !state.opening {\n                state.opening = true;\n                return Task::Open;",
     "            if !state.ended {\n                state.opening = true;\n                return Task::Open;",
     "loader", "any_settings_any_delays_any_fault"),
    (7, "a consumer that holds everything waits", "loader/deliver.rs",
     "(held >= self.outputs.load(Ordering::Acquire)).then_some(held)",
     "(held > self.outputs.load(Ordering::Acquire)).then_some(held)",
     "loader", "a_consumer_that_holds_everything_is_told_so"),
    (8, "stop does not wake who waits for a slot", "loader/pipeline.rs",
     "        self.ring.stop();\n        if let Some(buffers) = self.buffers.get() {\n            buffers.close(error);\n        }",
     "        self.ring.stop();\n        let _ = error;",
     "endings", "every_ending_at_every_stage"),
    (8, "stop joins nobody", "loader/pipeline.rs",
     "let workers = self.threads.join(timeout);", "let workers = self.threads.join(Duration::ZERO) * 0;",
     "endings", "every_ending_at_every_stage"),
    (9, "a worker's panic is swallowed", "loader/worker.rs",
     ".unwrap_or_else(|panic| Err(Error::panicked(who, &*panic).into()))",
     ".unwrap_or_else(|panic| std::panic::resume_unwind(panic))",
     "endings", "every_ending_at_every_stage"),
    (9, "the error that comes first wins, whatever its row", "loader/ticket.rs",
     "if ticket.failure.as_ref().is_none_or(|(lowest, _)| row < *lowest) {", "if ticket.failure.is_none() {",
     "loader", "of_several_errors_the_first_sample_counts"),
    (9, "a batch that failed goes along with the one before it", "loader/ticket.rs",
     "self.is_full() && is_whole && self.returned > 0", "self.is_full() && self.returned > 0",
     "loader", "a_batch_that_fails_takes_no_full_ones_with_it"),
    (9, "an error overtakes the batches before it", "loader/deliver.rs",
     "        state.ending.get_or_insert(ending);\n        self.wake(state);\n    }\n\n    /// Ends the stream at once",
     "        if matches!(ending, Ending::Failed(_)) { state.ready.clear(); }\n        state.ending.get_or_insert(ending);\n"
     "        self.wake(state);\n    }\n\n    /// Ends the stream at once",
     "loader", "an_error_comes_behind_the_batches_before_it"),
    (10, "who waits is not told of a lost device", "device.rs",
     "listener.device_lost(error);\n        }\n    }", "let _ = (&listener, error);\n        }\n    }",
     "loader", "a_device_that_is_lost_while_everybody_waits"),
    (10, "a lost device is forgotten", "device.rs",
     "self.lost.get().map_or(Ok(()), |error| Err(error.clone()))", "Ok(())",
     "loader", "a_lost_device_ends_every_wait"),
    (11, "a tensor is written while a slice of it is out", "command/execute.rs",
     "if span.block().usage.lock().views > 0 {", "if span.block().usage.lock().views > 1000 {",
     "pools", "a_tensor_that_is_seen_on_the_host_is_not_written"),
    (11, "the device is told of samples that are not there", "loader/worker.rs",
     "if indices.iter().any(|index| *index >= len) {\n        return false;",
     "if indices.iter().any(|index| *index >= u64::MAX - len) {\n        return false;",
     "loader", "numbers_beyond_the_samples_are_errors"),
    (12, "the state counts what was read ahead", "loader/pipeline.rs",
     "if place.last { (place.epoch + 1, 0) } else { (place.epoch, place.batch + 1) };",
     "if place.last { (place.epoch + 1, 0) } else { (place.epoch, self.counters.produced.load(Ordering::Relaxed)) };",
     "loader", "what_was_read_ahead_is_not_in_the_state"),
    (12, "random numbers depend on the batch", "loader/worker.rs",
     "let key = SampleKey { seed: self.config.seed, epoch: place.epoch, index };",
     "let key = SampleKey { seed: self.config.seed + row, epoch: place.epoch, index };",
     "loader", "random_seeds_depend_on_seed_epoch_and_sample_alone"),
]


def cargo(target, test, run):
    command = ["cargo", "test", "--quiet", "-p", "batchline", "--no-default-features",
               "--features", "formats", "--test", target, *([] if run else ["--no-run"]),
               test, "--", *([] if run else [])]
    environment = {**os.environ, "CARGO_TARGET_DIR": str(COPY / "target"), "CARGO_INCREMENTAL": "1"}
    # A session of its own, so that a test that hangs can be ended with all that it started.
    process = subprocess.Popen(command, cwd=COPY, env=environment, stdin=subprocess.DEVNULL, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)
    try:
        out, err = process.communicate(timeout=LIMIT_S if run else None)
        return subprocess.CompletedProcess(command, process.returncode, out, err)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return None


def main():
    wanted = {int(argument) for argument in sys.argv[1:] if argument.isdigit()}
    breaks = [one for one in BREAKS if not wanted or one[0] in wanted]
    if "--list" in sys.argv:
        for number, what, file, _, _, target, test in breaks:
            print(f"| {number} | {what} | `{test}` |")
        return 0
    COPY.mkdir(parents=True, exist_ok=True)
    for name in ["Cargo.toml", "Cargo.lock", "clippy.toml", "crates", "data"]:
        source, copy = ROOT / name, COPY / name
        if not source.exists():
            continue
        if source.is_dir():
            # Files keep their times, so that only what changed is built again.
            subprocess.run(["cp", "-rupT", source, copy], check=True)
        else:
            shutil.copy2(source, copy)
    faults = 0
    for number, what, file, code, broken, target, test in breaks:
        path = COPY / "crates/batchline/src" / file
        whole = path.read_text()
        label = f"{number:>2}  {what}"
        if whole.count(code) != 1:
            print(f"{label}: the code is there {whole.count(code)} times", flush=True)
            faults += 1
            continue
        path.write_text(whole.replace(code, broken))
        try:
            built = cargo(target, test, run=False)
            if built.returncode != 0:
                error = re.search(r"^error.*(?:\n.*){0,6}", built.stderr, re.M)
                print(f"{label}: does not build\n{error and error[0]}", flush=True)
                faults += 1
                continue
            ran = cargo(target, test, run=True)
            if ran is None:
                print(f"{label}: {test} hangs, as it should fail", flush=True)
            elif ran.returncode != 0 and "test result: FAILED" in ran.stdout or ran.returncode < 0:
                print(f"{label}: {test} fails, as it should", flush=True)
            elif ran.returncode != 0:
                print(f"{label}: {test} ends the process, as it should fail", flush=True)
            else:
                print(f"{label}: {test} PASSES", flush=True)
                faults += 1
        finally:
            path.write_text(whole)
            os.utime(path)
    print(f"invariants: {faults} faults" if faults else f"invariants: ok, {len(breaks)} breaks were noticed")
    return 1 if faults else 0


sys.exit(main())
