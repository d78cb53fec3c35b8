"""Words that threads exchange by relaxed accesses: a load may give an old value where nothing orders it behind a newer.

PTX's memory model (ISA, "Memory Consistency Model") for ld.relaxed.gpu and st.relaxed.gpu of aligned words of 32 bits,
whose stores are numbered in the order of coherence. Every thread has a view: by word, the oldest store that it may
still read. Its own stores and loads raise it. A fence publishes the view with the thread's later stores (release), and
makes it heed what was published with the stores that it has read (acquire). bar.sync joins the views of a block's
threads. An atomic operation that releases or acquires does so with views too. A seed decides which of the allowed
stores a load gives. A load never gives a store that the machine has not yet run.
"""

import numpy as np

from ptx.memory import NOBODY, Device, Fault, Region

WORD = 4
NOTHING = -1
# Numbers of stores to a word. A block's threads have views of all words: for wide layers these are most of the memory.
STORE = np.int16


class Words:
    """The words of a region with all values that they have had, and what was published with each."""

    def __init__(self, region: Region, seed: int) -> None:
        self.region, self.random = region, np.random.default_rng(seed)
        self.values = region.content.view(np.uint32)[None].copy()  # [stores, words]
        self.latest = np.zeros(self.values.shape[1], STORE)
        self.messages = np.full_like(self.values, NOTHING, dtype=np.int64)  # numbers of published views
        self.published: list[np.ndarray] = []  # views [threads, words]

    def places(self, addresses: np.ndarray, count: int) -> np.ndarray:
        """The words that accesses of `count` words address: [accesses, count]."""
        return (self.region.offsets(addresses, WORD * count, relaxed=True) // WORD)[:, None] + np.arange(count)

    def message(self, number: int, threads: int) -> np.ndarray:
        return self.published[number // threads][number % threads]


def words_of(device: Device, region: Region) -> Words:
    """The words of a region that nothing but relaxed accesses touches."""
    if region.name not in device.exchanged:
        if (region.writer != NOBODY).any() or region.unwritten:
            raise Fault(f"relaxed accesses to {region.name} beside weak ones")
        region.relaxed = True
        device.exchanged[region.name] = Words(region, device.seed)
    return device.exchanged[region.name]


class Sight:
    """What the threads of a block see of the words of one region."""

    def __init__(self, words: Words, threads: int) -> None:
        self.words = words
        self.view = np.zeros((threads, words.latest.size), STORE)
        self.read = np.zeros(self.view.shape, STORE)  # what a fence would make it heed
        self.messages = np.full(threads, NOTHING, np.int64)  # what its stores carry

    def load(self, threads: np.ndarray, addresses: np.ndarray, count: int) -> tuple[np.ndarray, bool]:
        """The values of `count` words for each thread, and whether all of them are the latest."""
        words, places, rows = self.words, self.words.places(addresses, count), threads[:, None]
        least, most = self.view[rows, places], words.latest[places]
        latest = words.random.random() < 0.5
        stores = most if latest else words.random.integers(least, most + 1, dtype=STORE)
        self.view[rows, places] = stores
        newer = stores > least
        if newer.any():
            found = np.stack(
                [np.broadcast_to(rows, places.shape)[newer], words.messages[stores, places][newer]], axis=1
            )
            for thread, number in np.unique(found[found[:, 1] != NOTHING], axis=0).tolist():
                np.maximum(self.read[thread], words.message(number, len(self.view)), out=self.read[thread])
        return words.values[stores, places], bool((stores == most).all())

    def store(self, threads: np.ndarray, addresses: np.ndarray, values: np.ndarray) -> None:
        """Store a word for each thread."""
        words, places = self.words, self.words.places(addresses, 1)[:, 0]
        if np.unique(places).size < places.size:
            raise Fault(f"threads of one instruction store to one word of {words.region.name}")
        words.latest[places] += 1
        stores = words.latest[places]
        if stores.min() < 0:
            raise OverflowError(f"more stores to a word of {words.region.name} than can be numbered")
        if stores.max() == len(words.values):
            words.values = np.concatenate([words.values, words.values[-1:]])
            words.messages = np.concatenate([words.messages, np.full_like(words.messages[-1:], NOTHING)])
        words.values[stores, places] = values
        words.messages[stores, places] = self.messages[threads]
        self.view[threads, places] = stores

    def fence(self, threads: np.ndarray) -> None:
        self.view[threads] = np.maximum(self.view[threads], self.read[threads])
        self.messages[threads] = len(self.words.published) * len(self.view) + threads
        self.words.published.append(self.view.copy())

    def join(self) -> None:
        """All threads see what each of them does."""
        self.view[:] = self.view.max(0)

    def heed(self, threads: np.ndarray, seen: np.ndarray) -> None:
        self.view[threads] = np.maximum(self.view[threads], seen)
