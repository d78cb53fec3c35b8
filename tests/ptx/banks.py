"""Banks of shared memory: 32 of 4 bytes each, of which a warp's access takes as many turns as the fullest has words."""

import numpy as np

BANKS, WORD = 32, 4


def turns(threads: np.ndarray, addresses: np.ndarray, width: int) -> tuple[int, int]:
    """Turns that an access of `width` bytes per thread takes, and those that it would take if no two threads met.

    A turn moves 128 bytes, so a warp with more to move comes in groups of neighbouring threads.
    """
    taken = least = 0
    group = BANKS * WORD // max(width, WORD)
    for warp in np.unique(threads // 32):
        mine = addresses[threads // 32 == warp].astype(np.int64)
        for start in range(0, mine.size, group):
            words = np.unique(mine[start : start + group, None] // WORD + np.arange(max(width // WORD, 1)))
            taken += int(np.bincount(words % BANKS).max())
            least += 1
    return taken, least
