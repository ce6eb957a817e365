//! Graphs: a chain of commands that comes again is given to the driver once, and launched with one
//! call ever after.
//!
//! The first time the commands are enqueued like any others, so the kernels are loaded and what
//! they need is on the device. Then they are captured, on a stream that nothing else uses: whatever
//! goes wrong, that stream goes, and the commands are enqueued anew each time.
#![allow(unsafe_code, reason = "calls the driver")]

use std::sync::{Arc, OnceLock};

use super::context::{Context, Entered, RELAXED};
use super::driver::{self, Graphs};
use super::execute::Encoder;
use super::kernels::Launch;
use super::lane;
use crate::Result;
use crate::backend::{Command, Kept};

/// The shortest chain that is worth a graph. On an H100, a launch took 0.10 to 0.34 of the host's
/// time and 0.65 to 0.89 of the device's time of enqueuing anew, for two to eight commands.
const SHORTEST: usize = 2;

/// What is kept of a chain of commands.
struct Chain {
    /// The graph; `None` in it where there is none to be had.
    graph: OnceLock<Option<Graph>>,
    /// For each command what it launches, if that is a conversion. They keep the factors that the
    /// kernels are told of on the device.
    launches: Vec<Option<Launch>>,
}

/// A chain that was enqueued, and of which a graph is to be made.
pub(super) struct Draft<'s, 'm> {
    commands: Vec<Command<'m>>,
    chain: &'s Chain,
    graphs: &'static Graphs,
}

/// Enqueues commands; launches the graph that was made of them, where there is one.
pub(super) fn enqueue<'s, 'm>(
    encoder: &mut Encoder<'_>,
    commands: &mut dyn Iterator<Item = Command<'m>>,
    kept: Option<&'s Kept>,
) -> Result<Option<Draft<'s, 'm>>> {
    let Some(kept) = kept else { return encoder.all(commands).map(|()| None) };
    let known = kept.get().and_then(|kept| kept.downcast_ref::<Chain>());
    match known.map(|chain| (chain, chain.graph.get())) {
        Some((_, Some(Some(graph)))) => return graph.launch(encoder).map(|()| None),
        Some((chain, Some(None))) => return chain.enqueue(encoder, commands).map(|()| None),
        Some((_, None)) | None => {}
    }
    let commands: Vec<_> = commands.collect();
    let chain = match known {
        Some(chain) => chain,
        None => {
            let chain = Chain::new(encoder, &commands)?;
            // From here on it lives until nothing of it is in flight, whatever fails.
            let kept = kept.get_or_init(|| Box::new(chain));
            kept.downcast_ref().expect("only this backend keeps something there")
        }
    };
    chain.enqueue(encoder, &mut commands.iter().map(again))?;
    let graphs = encoder.entered.driver().graphs.as_ref();
    let graphs = graphs.filter(|_| commands.len() >= SHORTEST);
    if graphs.is_none() {
        let _ = chain.graph.set(None);
    }
    Ok(graphs.map(|graphs| Draft { commands, chain, graphs }))
}

/// The same command.
fn again<'m>(command: &Command<'m>) -> Command<'m> {
    match *command {
        Command::Copy { src, dst } => Command::Copy { src, dst },
        Command::Fill { dst, element } => Command::Fill { dst, element },
        Command::Convert { src, dst, spec } => Command::Convert { src, dst, spec },
        _ => unreachable!("no other command comes again"),
    }
}

impl Chain {
    /// Gets the conversions ready.
    fn new(encoder: &mut Encoder<'_>, commands: &[Command<'_>]) -> Result<Self> {
        let launches = commands.iter().map(|command| match command {
            Command::Convert { spec, .. } => encoder.launch(spec).map(Some),
            _ => Ok(None),
        });
        Ok(Self { launches: launches.collect::<Result<_>>()?, graph: OnceLock::new() })
    }

    fn enqueue(
        &self,
        encoder: &mut Encoder<'_>,
        commands: &mut dyn Iterator<Item = Command<'_>>,
    ) -> Result<()> {
        for (command, launch) in commands.zip(&self.launches) {
            match (command, launch) {
                (Command::Convert { src, dst, .. }, Some(launch)) => {
                    encoder.convert(launch, src, dst)?;
                }
                (command, _) => encoder.command(command)?,
            }
        }
        Ok(())
    }
}

impl Draft<'_, '_> {
    /// Makes the graph. Where that fails, it is not tried again; an error that loses the device is
    /// told by the next call.
    pub(super) fn capture(&self, encoder: &Encoder<'_>) {
        let _ = self.chain.graph.set(self.make(encoder).ok());
    }

    fn make(&self, encoder: &Encoder<'_>) -> Result<Graph> {
        let (entered, graphs) = (encoder.entered, self.graphs);
        let capture = Capture::begin(entered, graphs)?;
        let commands = &mut self.commands.iter().map(again);
        self.chain.enqueue(&mut encoder.on(capture.stream), commands)?;
        let graph = capture.end()?;
        let mut executable = driver::GraphExec::NULL;
        // SAFETY: the graph exists; `executable` is a place for the answer.
        let code = unsafe { (graphs.cuGraphInstantiateWithFlags)(&raw mut executable, graph, 0) };
        // SAFETY: it exists, and what was made of it does not need it.
        unsafe { (graphs.cuGraphDestroy)(graph) };
        entered.call("making a graph", code)?;
        Ok(Graph { executable, graphs, context: Arc::clone(encoder.context()) })
    }
}

/// A chain that the driver was given.
struct Graph {
    executable: driver::GraphExec,
    graphs: &'static Graphs,
    context: Arc<Context>,
}

impl Graph {
    fn launch(&self, encoder: &mut Encoder<'_>) -> Result<()> {
        encoder.issued = true;
        // SAFETY: both exist. The memory that the graph names is that of the commands and of the
        // chain's factors, which are kept until the segment's fence has passed.
        let code = unsafe { (self.graphs.cuGraphLaunch)(self.executable, encoder.stream) };
        encoder.entered.call("launching a graph", code)
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        // What is left of a lost device is left alone.
        if let Ok(entered) = self.context.enter() {
            // SAFETY: made by `make`. It is dropped when no launch of it is in flight any more.
            let code = unsafe { (self.graphs.cuGraphExecDestroy)(self.executable) };
            let _ = entered.call("destroying a graph", code);
        }
    }
}

/// A capture under way, on a stream of its own. Dropping it ends both.
struct Capture<'e> {
    entered: &'e Entered<'e>,
    graphs: &'static Graphs,
    stream: driver::Stream,
    open: bool,
}

impl<'e> Capture<'e> {
    fn begin(entered: &'e Entered<'e>, graphs: &'static Graphs) -> Result<Self> {
        let stream = lane::new_stream(entered)?;
        // It may have begun though the call says that it failed.
        let capture = Self { entered, graphs, stream, open: true };
        // So that no call of another thread breaks it.
        // SAFETY: the stream exists.
        let code = unsafe { (graphs.cuStreamBeginCapture_v2)(stream, RELAXED) };
        entered.call("beginning a capture", code).map(|()| capture)
    }

    fn end(mut self) -> Result<driver::Graph> {
        let mut graph = driver::Graph::NULL;
        // SAFETY: the stream exists; `graph` is a place for the answer.
        let code = unsafe { (self.graphs.cuStreamEndCapture)(self.stream, &raw mut graph) };
        self.entered.call("ending a capture", code)?;
        self.open = false;
        Ok(graph)
    }
}

impl Drop for Capture<'_> {
    fn drop(&mut self) {
        // What is left of a lost device is left alone.
        if self.entered.context.check().is_err() {
            return;
        }
        if self.open {
            let mut graph = driver::Graph::NULL;
            // SAFETY: the stream exists; `graph` is a place for the answer.
            unsafe { (self.graphs.cuStreamEndCapture)(self.stream, &raw mut graph) };
            if graph != driver::Graph::NULL {
                // SAFETY: just made.
                unsafe { (self.graphs.cuGraphDestroy)(graph) };
            }
        }
        // SAFETY: ours, and nothing is on it.
        unsafe { (self.entered.driver().cuStreamDestroy_v2)(self.stream) };
    }
}
