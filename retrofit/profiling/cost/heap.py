"""How much memory stays resident while a call allocates and frees: glibc's allocator, simulated.

What a network holds is not what its process takes. glibc maps large blocks one by one and gives
them back when they are freed, but every mapped block that is freed raises the size from which it
does so (`man 3 mallopt`, M_MMAP_THRESHOLD). Smaller ones come from a heap that shrinks at its end
only. There a tensor, which must be aligned, is cut out of a larger piece; now and then a small
object of the process holds on to what is left over, and then no tensor of that size fits again.
"""

from __future__ import annotations

import bisect
import platform
import random
from collections import deque
from collections.abc import Iterable, Sequence

KIB = 1024
FIRST_THRESHOLD = 128 * KIB
LARGEST_THRESHOLD = 32 * KIB**2
ALIGNMENT = 64  # of PyTorch's tensors
SMALLEST = 32  # block
HEADER = 16
PAGE = 4096
OBJECTS = 256  # bytes of what PyTorch allocates beside a tensor's numbers
HELD_ON_TO = 0.05  # of the leftovers; this and the next fit encoders, UNets, Wan and VGGT
MOST_HELD = 16  # at once: there are only so many small objects
DRAWS = 6
TINY = KIB  # bytes below which a block changes nothing

Event = tuple[int, int]
"""A block's number and its bytes where it is allocated, 0 where it is freed."""


def is_simulated() -> bool:
    """Whether this process allocates as `resident_peak` says."""
    return platform.libc_ver()[0] == "glibc"


def resident_peak(events: Sequence[Event]) -> float:
    """Most bytes resident during a call, one such call having been made before.

    A mean over draws of which leftovers are held on to.

    Args:
        events: In order; what is never freed is held to the end.
    """
    peaks = []
    tiny = {number for number, size in events if 0 < size < TINY}
    events = [event for event in events if event[0] not in tiny]
    for seed in range(DRAWS):
        first = Heap(seed)
        first.run(events)
        again = Heap(seed + DRAWS, threshold=first.threshold)
        again.run(events)
        peaks.append(again.peak)
    return sum(peaks) / DRAWS


class Heap:
    """Blocks below a threshold side by side, larger ones mapped.

    Attributes:
        threshold: Bytes from which a block is mapped.
        peak: Most bytes that were resident.
    """

    def __init__(
        self, seed: int, *, threshold: int = FIRST_THRESHOLD, held_on_to: float = HELD_ON_TO
    ) -> None:
        """Begin with nothing.

        Args:
            seed: Of what is held on to.
            threshold: To begin with.
            held_on_to: Share of the leftovers.
        """
        self.threshold = threshold
        self.held_on_to = held_on_to
        self.peak = 0
        self._draw = random.Random(seed).random  # noqa: S311 - nothing secret
        self._held: deque[tuple[int, int]] = deque()
        self._mapped = 0
        self._end = 0  # of the last block in use
        self._touched = 0  # end of what is resident
        self._blocks: dict[int, list[tuple[int | None, int]]] = {}  # start, None if mapped; size
        self._holes: list[tuple[int, int]] = []  # size and start, smallest first
        self._hole_at: dict[int, int] = {}  # size by start
        self._hole_before: dict[int, int] = {}  # start by end

    def run(self, events: Iterable[Event]) -> None:
        """Allocate and free."""
        for number, size in events:
            if size:
                self.allocate(number, size)
            else:
                self.free(number)

    def allocate(self, number: int, size: int) -> None:
        """A tensor and the objects that belong to it."""
        size = -(-(size + HEADER) // HEADER) * HEADER
        asked = size + ALIGNMENT + SMALLEST
        if asked >= self.threshold:
            mapped = -(-asked // PAGE) * PAGE
            self._mapped += mapped
            numbers: tuple[int | None, int] = None, mapped
        else:
            numbers = self._cut(self._place(asked), size, asked)
        self._blocks[number] = [numbers, (self._place(OBJECTS), OBJECTS)]
        self.peak = max(self.peak, self._mapped + self._touched)

    def free(self, number: int) -> None:
        """Unmap, or leave a hole; nothing if there is no such block."""
        for start, size in self._blocks.pop(number, ()):
            if start is not None:
                self._give_back(start, size)
                continue
            self._mapped -= size
            if self.threshold < size <= LARGEST_THRESHOLD:
                self.threshold = size

    def _cut(self, start: int, size: int, asked: int) -> tuple[int, int]:
        """The aligned part of a piece; what is left over on both sides is free, mostly."""
        before = -(start + HEADER) % ALIGNMENT
        if 0 < before < SMALLEST:
            before += ALIGNMENT
        after = asked - before - size
        if after < SMALLEST:
            size, after = size + after, 0
        for rest, length in ((start, before), (start + before + size, after)):
            if not length:
                continue
            if self._draw() >= self.held_on_to:
                self._give_back(rest, length)
                continue
            self._held.append((rest, length))
            if len(self._held) > MOST_HELD:
                self._give_back(*self._held.popleft())
        return start + before, size

    def _place(self, size: int) -> int:
        """The smallest hole that is large enough, else room at the end."""
        index = bisect.bisect_left(self._holes, (size, 0))
        if index == len(self._holes):
            start = self._end
            self._end += size
            self._touched = max(self._touched, self._end)
            return start
        start = self._holes[index][1]
        length = self._take(start)
        if length > size:
            self._leave(start + size, length - size)
        return start

    def _give_back(self, start: int, size: int) -> None:
        """A hole, joined with those beside it; a long free end shrinks."""
        if start in self._hole_before:
            start = self._hole_before[start]
            size += self._take(start)
        if start + size in self._hole_at:
            size += self._take(start + size)
        if start + size < self._end:
            self._leave(start, size)
            return
        self._end = start
        if self._touched - self._end > 2 * self.threshold:
            self._touched = self._end

    def _leave(self, start: int, size: int) -> None:
        bisect.insort(self._holes, (size, start))
        self._hole_at[start] = size
        self._hole_before[start + size] = start

    def _take(self, start: int) -> int:
        size = self._hole_at.pop(start)
        del self._hole_before[start + size]
        del self._holes[bisect.bisect_left(self._holes, (size, start))]
        return size
