#!/usr/bin/env python3
"""Measures PyTorch's ways to load what bench/cuda loads: its DataLoader as most people write it and
tuned by hand, a ring of page-locked tensors written by hand, and a data set that lies on the GPU.

    python3 measure.py [--json FILE] [--seconds BUDGET] [--device cuda|cpu] [--quick]

Every way is first tried with each of its settings, and measured with the best of them. What it
delivers is compared with the source before it is timed. All contenders of a row run in turn. Needs
PyTorch and nothing else; on a CPU it runs to see that it works."""

import argparse
import copy
import json
import multiprocessing
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import torch
from torch.utils.data import DataLoader, Dataset

IMAGES, DIGITS = 28_672, 262_144
WORKERS = (0, 4, 8, 16)
# Batches that are compared, and what a worker of the DataLoader has ready, by its default.
COMPARED, PREFETCHED = 3, 2


def parse():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", help="every figure, written anew after each row")
    parser.add_argument("--seconds", type=float, default=150, help="what all of it may take, about")
    parser.add_argument("--span", type=float, default=1, help="how long a run takes at most")
    parser.add_argument("--rounds", type=int, default=5, help="runs that count of each")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--quick", action="store_true", help="tiny sizes; the figures mean nothing")
    return parser.parse_args()


class Rows:
    """Samples in memory, each of which begins with its own number."""

    def __init__(self, count, shape):
        size = 1
        for extent in shape:
            size *= extent
        self.shape, self.size, self.count = tuple(shape), size, count
        noise = torch.randint(0, 256, (min(1 << 24, count * size),), dtype=torch.uint8)
        flat = torch.empty(count * size, dtype=torch.uint8)
        for start in range(0, flat.numel(), noise.numel()):
            part = flat[start : start + noise.numel()]
            part.copy_(noise[: part.numel()])
        rows = flat.view(count, size)
        rows[:, :8] = torch.arange(count).view(count, 1).view(torch.uint8)
        self.data = rows.view(count, *shape)
        # Eight bytes at once, which index_select copies several times faster.
        self.words = rows.view(torch.int64) if size % 8 == 0 else rows

    def shaped(self, shape):
        """The same bytes as rows of another shape."""
        other = copy.copy(self)
        other.shape, other.data = shape, self.data.view(self.count, *shape)
        return other

    def check(self, batch):
        """Stops the program where a batch holds anything but rows of ours, each as it is."""
        flat = batch.cpu().reshape(len(batch), self.size)
        numbers = flat[:, :8].contiguous().view(torch.int64).view(-1)
        if not 0 <= int(numbers.min()) <= int(numbers.max()) < self.count:
            sys.exit(f"peers: a batch of {self.shape} has rows that there are not")
        if len(numbers.unique()) != len(numbers):
            sys.exit(f"peers: a batch of {self.shape} has a row twice")
        if not torch.equal(flat, self.data.view(self.count, self.size)[numbers]):
            sys.exit(f"peers: a batch of {self.shape} has other bytes than its rows")


class OneByOne(Dataset):
    """As most data sets are written: a sample at a time, collated by default."""

    def __init__(self, rows):
        self.data = rows.data

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        return self.data[index]


class Whole(Dataset):
    """Tuned by hand: the sampler gives the numbers of a whole batch, taken at once."""

    def __init__(self, rows):
        self.words, self.shape = rows.words, rows.shape

    def __len__(self):
        return len(self.words)

    def __getitem__(self, numbers):
        batch = torch.index_select(self.words, 0, numbers)
        return batch.view(torch.uint8).view(len(numbers), *self.shape)


class Order:
    """The numbers of each batch of an epoch, as a tensor."""

    def __init__(self, count, batch):
        self.count, self.batch = count, batch

    def __len__(self):
        return self.count // self.batch

    def __iter__(self):
        return iter(torch.randperm(self.count).split(self.batch)[: len(self)])


class Stream:
    """Batches on the device, for ever; so many of them may lie ready when nobody takes any."""

    def __init__(self, batches, close=lambda: None, ready=4):
        self.batches, self.close, self.ready = batches, close, ready

    def next(self):
        return next(self.batches)


def dataloader(rows, batch, device, workers, tuned):
    more = {"persistent_workers": True, "prefetch_factor": PREFETCHED} if workers else {}
    more |= {"num_workers": workers, "pin_memory": device == "cuda"}
    if tuned:
        loader = DataLoader(Whole(rows), batch_size=None, sampler=Order(rows.count, batch), **more)
    else:
        loader = DataLoader(OneByOne(rows), batch, shuffle=True, drop_last=True, **more)

    def forever():
        while True:
            for samples in loader:
                yield samples.to(device, non_blocking=True)

    batches = forever()
    return Stream(batches, batches.close, workers * PREFETCHED + 4)


def ring(rows, batch, device, threads, slots=4):
    """Page-locked tensors that are filled in turn, each copied on a stream of its own."""
    cuda = device == "cuda"
    words = rows.words
    pinned = [torch.empty((batch, words.shape[1]), dtype=words.dtype, pin_memory=cuda) for _ in range(slots)]
    # Threads of ours, each of which works alone; or one call that PyTorch shares out to its own.
    pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) if threads else None
    share = -(-batch // max(threads, 1))
    parts = [slice(start, start + share) for start in range(0, batch, share)]

    def fill(numbers, target):
        def take(part):
            torch.index_select(words, 0, numbers[part], out=target[part])

        if pool:
            list(pool.map(take, parts))
        else:
            torch.index_select(words, 0, numbers, out=target)

    def forever():
        outputs = [torch.empty_like(slot, device=device) for slot in pinned]
        if cuda:
            side, current = torch.cuda.Stream(), torch.cuda.current_stream()
            copied, free = ([torch.cuda.Event() for _ in range(slots)] for _ in range(2))
        place = 0
        while True:
            for numbers in Order(rows.count, batch):
                if cuda:
                    # The copy out of the slot, so many batches ago.
                    copied[place].synchronize()
                fill(numbers, pinned[place])
                if cuda:
                    with torch.cuda.stream(side):
                        side.wait_event(free[place])
                        outputs[place].copy_(pinned[place], non_blocking=True)
                        copied[place].record(side)
                    current.wait_event(copied[place])
                else:
                    outputs[place].copy_(pinned[place])
                yield outputs[place].view(torch.uint8).view(batch, *rows.shape)
                if cuda:
                    # What was done with the batch until the next one was asked for.
                    free[place].record(current)
                place = (place + 1) % slots

    return Stream(forever(), lambda: pool and pool.shutdown())


def on_device(rows, batch, device):
    """All of it on the GPU, as a user does whose data fit."""
    words = rows.words.to(device)

    def forever():
        while True:
            order = torch.randperm(rows.count, device=device)
            for start in range(0, rows.count - batch + 1, batch):
                taken = torch.index_select(words, 0, order[start : start + batch])
                yield taken.view(torch.uint8).view(batch, *rows.shape)

    return Stream(forever())


def planes(device):
    """u8 images with their channels last to normalised bf16 planes."""
    mean = torch.tensor([123.7, 116.3, 103.5], device=device, dtype=torch.bfloat16).view(3, 1, 1)
    std = torch.tensor([58.4, 57.1, 57.4], device=device, dtype=torch.bfloat16).view(3, 1, 1)

    def convert(batch):
        images = batch.permute(0, 3, 1, 2)
        images = images.to(torch.bfloat16, memory_format=torch.contiguous_format)
        return images.sub_(mean).div_(std)

    return convert


def floats(batch):
    return batch.to(torch.float32).sub_(33.3).div_(78.6)


def processor_time():
    """Of this process and of its workers, to a hundredth of a second."""
    ticks = 0
    for pid in [os.getpid()] + [child.pid for child in multiprocessing.active_children()]:
        try:
            with open(f"/proc/{pid}/stat") as file:
                fields = file.read().rsplit(")", 1)[1].split()
        except OSError:
            continue
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


class Bench:
    def __init__(self, options):
        self.options, self.device = options, options.device
        self.began = time.monotonic()
        self.rows = []
        self.about = {
            "program": "peers/measure.py",
            "torch": torch.__version__,
            "device": torch.cuda.get_device_name() if self.device == "cuda" else "cpu",
            "threads": torch.get_num_threads(),
            "quick": options.quick,
        }
        # The workers and threads that were best, by what was searched.
        self.best = {}

    def left(self):
        return self.options.seconds - (time.monotonic() - self.began)

    def synchronize(self):
        if self.device == "cuda":
            torch.cuda.synchronize()

    def stretch(self, stream, span, convert=None):
        """Samples per second and busy cores over about this long."""
        for _ in range(stream.ready):
            stream.next()
        self.synchronize()
        samples, cpu, began = 0, processor_time(), time.perf_counter()
        while True:
            batch = stream.next()
            samples += len(batch)
            if convert:
                convert(batch)
            if time.perf_counter() - began >= span:
                break
        self.synchronize()
        took = time.perf_counter() - began
        return samples / took, (processor_time() - cpu) / took

    def open(self, make, rows):
        stream = make()
        for _ in range(COMPARED):
            rows.check(stream.next())
        return stream

    def search(self, what, rows, settings, make):
        """The best of the settings, tried for a moment each."""
        rates = {}
        for setting in settings:
            try:
                stream = self.open(lambda: make(setting), rows)
                rates[setting] = self.stretch(stream, self.span / 4)[0]
                stream.close()
            except RuntimeError as error:
                # Such as workers for which shared memory does not suffice.
                print(f"{what} with {setting}: {str(error).splitlines()[0]}", flush=True)
        tried = ", ".join(f"{setting}: {rate:.0f}" for setting, rate in rates.items())
        print(f"{what}, samples/s by setting: {tried}", flush=True)
        return max(rates, key=rates.get) if rates else None

    def contenders(self, key, rows, batch, which):
        """Each with its best setting: its name, its kind, and what makes it."""
        device = self.device
        if key not in self.best:
            settings = WORKERS[:2] if self.options.quick else WORKERS
            make = lambda tuned: lambda workers: dataloader(rows, batch, device, workers, tuned)
            self.best[key] = {
                "default": self.search(f"{key}, DataLoader", rows, settings, make(False)),
                "tuned": self.search(f"{key}, DataLoader, tuned", rows, settings, make(True)),
                "ring": self.search(
                    f"{key}, ring", rows, settings, lambda threads: ring(rows, batch, device, threads)
                ),
            }
        best = self.best[key]
        makers = {
            "default": (
                f"DataLoader, {best['default']} workers", "DataLoader",
                lambda: dataloader(rows, batch, device, best["default"], False),
            ),
            "tuned": (
                f"DataLoader, tuned, {best['tuned']} workers", "DataLoader",
                lambda: dataloader(rows, batch, device, best["tuned"], True),
            ),
            "ring": (
                f"page-locked ring, {best['ring'] or 'PyTorch’s'} threads", "ring",
                lambda: ring(rows, batch, device, best["ring"]),
            ),
            "resident": (
                "index_select on the GPU", "resident", lambda: on_device(rows, batch, device),
            ),
        }
        return [makers[name] for name in which if name == "resident" or best[name] is not None]

    def measure(self, row, rows, contenders, convert=None, **facts):
        streams = [self.open(make, rows) for _, _, make in contenders]
        runs = [([], []) for _ in streams]
        for turn in range(self.options.rounds + 1):
            for place in range(len(streams)):
                who = (turn + place) % len(streams)
                rate, cores = self.stretch(streams[who], self.span, convert)
                if turn > 0:
                    runs[who][0].append(rate)
                    runs[who][1].append(cores)
        for stream in streams:
            stream.close()
        for (who, kind, _), (rates, cores) in zip(contenders, runs):
            rate = sorted(rates)[len(rates) // 2]
            print(
                f"{row}: {who} {rate:.0f} samples/s ({min(rates):.0f} to {max(rates):.0f}), "
                f"{rate * rows.size / 1e9:.2f} GB/s, {sorted(cores)[len(cores) // 2]:.2f} busy cores",
                flush=True,
            )
            self.rows.append(
                {"row": row, "who": who, "kind": kind, "unit": "samples/s", "runs": rates,
                 "busy_cores": cores, "sample_bytes": rows.size, **facts}
            )
        self.write()

    def write(self):
        if self.options.json:
            with open(self.options.json, "w") as file:
                json.dump({**self.about, "rows": self.rows}, file, indent=1)

    def run(self):
        quick, device = self.options.quick, self.device
        images = Rows(512 if quick else IMAGES, (3, 224, 224))
        last = images.shaped((224, 224, 3))
        digits = Rows(16_384 if quick else DIGITS, (1, 28, 28))
        few = 8 if quick else 256
        every = ["default", "tuned", "ring", "resident"]
        better = ["tuned", "ring", "resident"]

        def row(name, key, rows, batch, which, convert=None):
            contenders = lambda: self.contenders(key, rows, batch, which)
            measure = lambda: self.measure(name, rows, contenders(), convert)
            return name, len(which), 0.5 if convert else 1, measure

        # A name, how many contenders there are, how long their runs are beside others', and the rest.

        plan = [
            row("u8 3x224x224, batch 256", "u8 3x224x224", images, few, every),
            row("u8 1x28x28, batch 256", "u8 1x28x28 by 256", digits, few, every),
            row("u8 1x28x28, batch 4096", "u8 1x28x28 by 4096", digits, few * 16, every),
            row("u8 224x224x3 to bf16 planes, batch 256", "u8 3x224x224", last, few, better, planes(device)),
            row("u8 1x28x28 to f32, batch 256", "u8 1x28x28 by 256", digits, few, better, floats),
            row("u8 1x28x28 to f32, batch 4096", "u8 1x28x28 by 4096", digits, few * 16, better, floats),
        ]
        for size in (256, 784, 4 << 10, 16 << 10, 48 << 10, 150_528, 1 << 20):
            plan.append((f"rows of {size} B", 2, 0.2, lambda size=size: self.sweep(images, size)))
        for batch in (4, 16, 64, 256, 1024):
            batch = max(batch // 32, 1) if quick else batch
            name = f"u8 3x224x224, batches of {batch}"
            plan.append((name, 1, 0.2, lambda name=name, batch=batch: self.batches(name, images, batch)))
        for place, (name, _, weight, measure) in enumerate(plan):
            # Half of the time that is left goes for starting workers, comparing, and trying settings.
            runs = sum(count * weight for _, count, weight, _ in plan[place:]) * (self.options.rounds + 1)
            if self.left() <= 0:
                print(f"{name}: left out, out of time", flush=True)
                continue
            self.span = min(self.options.span, self.left() / runs / 2) * weight
            if quick:
                self.span = 0.02
            try:
                measure()
            except (RuntimeError, OSError) as error:
                print(f"{name}: {error}", flush=True)

    def sweep(self, images, size):
        """Rows of another size out of the same memory; only its first gibibyte."""
        batch = min(max(1 << ((32 << 20) // size - 1).bit_length(), 4), 16_384)
        if self.options.quick:
            batch = max(batch // 32, 4)
        limit = min(images.data.numel(), 1 << 30)
        rows = Rows(max(limit // size // batch, 1) * batch, (size,))
        best = self.best.get("u8 3x224x224" if size > 8192 else "u8 1x28x28 by 4096", {})
        workers, threads = best.get("tuned") or 0, best.get("ring") or 0
        contenders = [
            ("DataLoader, tuned", "DataLoader",
             lambda: dataloader(rows, batch, self.device, workers, True)),
            ("page-locked ring", "ring", lambda: ring(rows, batch, self.device, threads)),
        ]
        facts = {"sweep": "row_bytes", "row_bytes": size, "batch": batch}
        self.measure(f"rows of {size} B", rows, contenders, **facts)

    def batches(self, name, images, batch):
        threads = self.best.get("u8 3x224x224", {}).get("ring") or 0
        threads = min(threads, batch)
        make = lambda: ring(images, batch, self.device, threads)
        facts = {"sweep": "batch", "row_bytes": images.size, "batch": batch}
        self.measure(name, images, [("page-locked ring", "ring", make)], **facts)


def main():
    options = parse()
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit("peers: PyTorch finds no GPU; --device cpu runs without, to see that it works")
    if options.quick:
        options.rounds = 2
    bench = Bench(options)
    print(f"PyTorch {torch.__version__}, {bench.about['device']}, {bench.about['threads']} threads", flush=True)
    bench.run()
    print(f"peers: done in {time.monotonic() - bench.began:.0f} s", flush=True)


if __name__ == "__main__":
    main()
