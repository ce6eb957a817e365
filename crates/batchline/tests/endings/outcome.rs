//! Plays a scene to its end, and looks at what is left.

use std::sync::Arc;

use batchline::testing::Fault;
use batchline::{AsyncDataLoader, Error};

use crate::gate::Verdict;
use crate::scene::{
    Answer, BATCHES, ROWS, Scene, Way, assert_home, assert_told, eventually, expected, values,
};
use crate::stages::{Stage, set};
use crate::{Ending, threads};

/// What everybody is told once the device was lost on demand.
const LOST: &str = "faulty is lost (a test lost it); open the device anew, or restart the process";
/// What everybody is told after `stop`.
const STOPPED: &str = "the loader is stopped: call `start` to begin a new generation";

/// Bytes of a block: a batch fits one.
const BLOCK: u64 = 256;

/// Plays the scene, and says in a word how it ended.
pub(crate) fn play(stage: Stage, ending: Ending, unified: bool) -> &'static str {
    let mut scene = set(stage, ending, unified);
    let outcome = match ending {
        Ending::Error | Ending::Panic => fail(&mut scene, stage, ending),
        Ending::Lost => lose(&mut scene, stage),
        Ending::Stop => stop(&mut scene, stage),
        Ending::LoaderFirst => loader_first(&mut scene, stage),
        Ending::BatchesFirst => batches_first(&mut scene),
        Ending::Elsewhere => elsewhere(&mut scene),
        Ending::Hangs => hang(&mut scene, stage),
    };
    clear_away(scene, stage, ending);
    outcome
}

/// A call fails or panics: the batches before it, then the error.
fn fail(scene: &mut Scene, stage: Stage, ending: Ending) -> &'static str {
    let fails = ending == Ending::Error;
    match (stage, &scene.completion) {
        (Stage::Slot | Stage::Submit, _) => {
            scene.control.inject(if fails { Fault::Submit } else { Fault::PanicInSubmit });
            scene.control.release();
        }
        (Stage::Fence, _) => {
            scene.control.inject(if fails { Fault::Wait } else { Fault::PanicInWait });
        }
        (_, Some(completion)) => completion.keeper.open(Verdict::Panic),
        _ => scene.source.open(if fails { Verdict::Fail } else { Verdict::Panic }),
    }
    let (text, outcome) = match (stage, fails) {
        (Stage::Completion, _) => return go_on(scene),
        (Stage::Slot | Stage::Submit, true) => (
            "submitter: batch 2 of epoch 0: faulty: submitting failed: a test made it fail",
            "submitter's",
        ),
        (Stage::Slot | Stage::Submit, false) => (
            "faulty is lost (the backend panicked: a test made the driver panic); open the device \
             anew, or restart the process",
            "lost",
        ),
        (Stage::Fence, true) => (
            "faulty is lost (faulty: waiting failed: a test made it fail); open the device anew, \
             or restart the process",
            "lost",
        ),
        (Stage::Fence, false) => (
            "faulty is lost (the end of a submission panicked: a test made the driver panic); open \
             the device anew, or restart the process",
            "lost",
        ),
        (Stage::Sampler, true) => (
            "worker: sample 99 in batch 2 of epoch 0: the sampler named sample 99 of 40",
            "worker's",
        ),
        (Stage::Sampler, false) => {
            ("sampler: batch 2 of epoch 0: the sampler panicked: no such luck", "sampler's")
        }
        (Stage::Pull, true) => ("source: batch 2 of epoch 0: no such luck", "source's"),
        (Stage::Pull, false) => {
            ("source: batch 2 of epoch 0: the source panicked: no such luck", "source's")
        }
        (Stage::Reset, true) => ("source: batch 0 of epoch 1: no such luck", "source's"),
        (Stage::Reset, false) => {
            ("source: batch 0 of epoch 1: the source panicked: no such luck", "source's")
        }
        (Stage::Output, true) => {
            ("worker: sample 17 in batch 4 of epoch 0: no such luck", "worker's")
        }
        (Stage::Output, false) => (
            "worker: sample 17 in batch 4 of epoch 0: the source panicked: no such luck",
            "worker's",
        ),
        (_, true) => ("worker: sample 9 in batch 2 of epoch 0: no such luck", "worker's"),
        (_, false) => (
            "worker: sample 9 in batch 2 of epoch 0: the source panicked: no such luck",
            "worker's",
        ),
    };
    if outcome == "lost" {
        scene.wait_for_the_loss();
    }
    if stage == Stage::Output {
        // The batch that waits for an output is before the error.
        scene.keep(2);
        scene.take();
        scene.keep(1);
    } else if stage.leaves_a_batch() && outcome != "lost" {
        // As is the batch that nobody has asked for yet.
        eventually("the stream to end", || !scene.loader().stats().is_running);
        threads::settle();
        scene.take();
    }
    scene.assert_waiting_is_told(text);
    scene.assert_told(text);
    if outcome != "lost" {
        scene.assert_held_are_good();
    }
    assert_threads_left(0);
    scene.loader().stop().unwrap();
    // The error before it counts.
    assert_told(scene.loader(), text);
    outcome
}

/// It does not end at all.
fn go_on(scene: &mut Scene) -> &'static str {
    while scene.taken < BATCHES {
        scene.keep(1);
        scene.take();
    }
    scene.keep(1);
    for way in [Way::Get, Way::Poll] {
        assert!(matches!(way.ask(scene.loader()), Answer::End));
    }
    assert_threads_left(0);
    let submission = &scene.completion.as_ref().unwrap().submission;
    assert_eq!(submission.wait().unwrap_err().chain(), "a completion panicked: no such luck");
    scene.assert_held_are_good();
    scene.loader().stop().unwrap();
    "goes on"
}

/// Everybody is told, whatever the source does meanwhile.
fn lose(scene: &mut Scene, stage: Stage) -> &'static str {
    scene.lose(matches!(stage, Stage::Slot | Stage::Submit | Stage::Fence));
    scene.assert_waiting_is_told(LOST);
    scene.assert_told(LOST);
    for batch in &scene.held {
        assert!(batch.input_tensor().to_vec::<i64>().unwrap_err().is_device_lost());
    }
    assert_threads_left(usize::from(scene.source.is_inside()));
    scene.let_go();
    scene.loader().stop().unwrap();
    assert_told(scene.loader(), LOST);
    "lost"
}

/// Everybody is told at once; `stop` itself returns when the call under way does, and no other
/// call is made.
fn stop(scene: &mut Scene, stage: Stage) -> &'static str {
    let loader = Arc::clone(scene.loader());
    let calls = scene.source.calls();
    let result = scene.meanwhile(
        || loader.stop(),
        |scene| {
            eventually("the stop to begin", || !scene.loader().stats().is_running);
            scene.assert_waiting_is_told(STOPPED);
            scene.assert_told(STOPPED);
            scene.let_go();
        },
    );
    result.unwrap();
    drop(loader);
    assert_eq!(threads::marked(), 0, "a worker was not joined");
    assert_no_more_calls(scene, stage, calls);
    scene.assert_held_are_good();
    assert_told(scene.loader(), STOPPED);
    assert_eq!(scene.loader().stats().queued_batches, 0);
    scene.loader().stop().unwrap();
    "stopped"
}

/// The loader's threads end by themselves, but for those that can't.
fn assert_threads_left(left: usize) {
    eventually("the loader's threads to end", || {
        threads::count(threads::is_of_loader).is_none_or(|count| count == left)
    });
}

/// The call that was under way when the loader was stopped was the last one.
fn assert_no_more_calls(scene: &Scene, stage: Stage, calls: usize) {
    // A sampler is asked for the rows of a claim one by one.
    let more = if stage == Stage::Sampler { 2 } else { 0 };
    // Where the system does not tell whether a thread waits, the call may have come too early.
    if threads::own_number().is_some() {
        assert!(scene.source.calls() <= calls + more, "more was read after the stop");
    }
}

fn loader_first(scene: &mut Scene, stage: Stage) -> &'static str {
    let calls = scene.source.calls();
    let loader = Arc::into_inner(scene.loader.take().unwrap()).expect("nobody else has it");
    scene.meanwhile(|| drop(loader), |scene| scene.let_go());
    assert_eq!(threads::marked(), 0, "a worker was not joined");
    assert_no_more_calls(scene, stage, calls);
    scene.assert_held_are_good();
    scene.held.clear();
    "home"
}

fn batches_first(scene: &mut Scene) -> &'static str {
    scene.held.clear();
    let loader = Arc::into_inner(scene.loader.take().unwrap()).expect("nobody else has it");
    scene.meanwhile(|| drop(loader), |scene| scene.let_go());
    assert_eq!(threads::marked(), 0, "a worker was not joined");
    "home"
}

/// The loader goes on another thread, the batches on this one, while that thread waits. Where there
/// is a completion, the loader goes in it: on the very thread that brings its memory home.
fn elsewhere(scene: &mut Scene) -> &'static str {
    let loader = Arc::into_inner(scene.loader.take().unwrap()).expect("nobody else has it");
    if let Some(completion) = &scene.completion {
        completion.drops.send(loader).unwrap();
        scene.let_go();
        completion.submission.wait().unwrap();
        scene.held.clear();
        return "home";
    }
    let other = std::thread::Builder::new().name("elsewhere".to_owned());
    let other = other.spawn(move || drop(loader)).unwrap();
    threads::settle();
    scene.held.clear();
    scene.let_go();
    eventually("the loader to be dropped", || other.is_finished());
    other.join().unwrap();
    assert_eq!(threads::marked(), 0, "a worker was not joined");
    "home"
}

/// `stop` gives up what does not return, and remembers it.
fn hang(scene: &mut Scene, stage: Stage) -> &'static str {
    let source_hangs = !matches!(stage, Stage::Slot | Stage::Submit);
    let loader = Arc::clone(scene.loader());
    loader.stop().unwrap_err();
    scene.assert_waiting_is_told(STOPPED);
    scene.assert_told(STOPPED);
    // However slow the machine is, the others end.
    assert_threads_left(usize::from(!matches!(stage, Stage::Fence | Stage::Completion)));
    // It is remembered.
    let outcome = match loader.stop() {
        Err(Error::Detached { workers: 1, .. }) => "detached",
        Err(Error::Timeout { .. }) => "timeout",
        other => panic!("{other:?}"),
    };
    if outcome == "detached" {
        match stage {
            // The source itself is in use.
            Stage::Pull | Stage::Reset => {
                let error = loader.start().unwrap_err();
                assert!(matches!(error, Error::Lifecycle { state: "still stopping", .. }));
            }
            // A data set may be read again meanwhile.
            _ if source_hangs => {
                loader.start().unwrap();
                let answer = Way::Get.ask(&loader);
                let Answer::Batch(batch) = answer else { panic!("{answer:?}") };
                assert_eq!((batch.batch_id(), values(&batch)), (0, expected(0)));
                drop(batch);
                eventually("the new generation to stop", || loader.stop().is_ok());
            }
            _ => {}
        }
    } else {
        assert!(scene.memory.stats().staging_in_use > 0, "a slot in flight is not free");
    }
    scene.let_go();
    eventually("the call to return", || threads::marked() == 0);
    eventually("the stop to succeed", || loader.stop().is_ok());
    scene.assert_held_are_good();
    outcome
}

/// What is left, whatever the ending was: no thread, no memory in use, and what there was before is
/// there again for the next loader.
fn clear_away(mut scene: Scene, stage: Stage, ending: Ending) {
    // The batches that the consumer holds, and slot and output of what is in flight.
    let in_doubt = match (stage, ending) {
        (Stage::Fence | Stage::Completion, Ending::Lost) => scene.held.len() + 4,
        (_, Ending::Lost) => scene.held.len(),
        (Stage::Fence, Ending::Error | Ending::Panic) => 4,
        (Stage::Slot | Stage::Submit, Ending::Panic) => 2,
        _ => 0,
    };
    scene.held.clear();
    scene.let_go();
    assert_eq!(threads::marked(), 0, "a worker was not joined");
    assert_threads_left(0);
    assert_home(&scene.memory);
    if let Some(waker) = &scene.waker {
        eventually("the waker to be let go of", || waker.strong_count() == 0);
    }
    let Scene { loader, memory, control, source, completion, make, .. } = scene;
    let stats = memory.stats();
    assert_eq!(stats.quarantined, in_doubt as u64 * BLOCK, "memory that is given up");
    let loader = loader.unwrap_or_else(|| Arc::new(make()));
    if memory.device().check().is_ok() {
        play_again(&loader, stage);
        drop(loader);
        assert_eq!(memory.stats().allocations, stats.allocations, "memory was lost");
        assert_home(&memory);
    } else {
        assert!(loader.start().unwrap_err().is_device_lost());
        drop(loader);
    }
    drop((make, memory, source, completion));
    eventually("the device to be closed", || control.is_closed());
    eventually("the device's threads to end", || {
        threads::count(threads::is_of_device).is_none_or(|count| count == 0)
    });
}

/// All of the stream, by the same loader or one like it.
fn play_again(loader: &AsyncDataLoader, stage: Stage) {
    let (samples, epochs) = stage.size();
    let per_epoch = samples / ROWS.unsigned_abs();
    loader.start().unwrap();
    for number in 0..per_epoch * epochs {
        let answer = Way::Get.ask(loader);
        let Answer::Batch(batch) = answer else { panic!("{answer:?} instead of {number}") };
        assert_eq!((batch.batch_id(), values(&batch)), (number, expected(number % per_epoch)));
    }
    assert!(matches!(Way::Get.ask(loader), Answer::End));
    eventually("the stop to succeed", || loader.stop().is_ok());
}
