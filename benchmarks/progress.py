"""A progress line with the time left, on a terminal; elsewhere nothing but the lines printed around it."""

import shutil
import sys
import time

BAR = 24


class Progress:
    """Counts weighted work; `show` redraws one line, `print` writes above it."""

    def __init__(self, total: float, stream=None) -> None:
        self.stream = sys.stderr if stream is None else stream
        self.live = self.stream.isatty()
        self.total = total
        self.done = 0.0
        self.start = time.monotonic()

    def print(self, text: str) -> None:
        self.clear()
        print(text, flush=True)

    def advance(self, weight: float) -> None:
        self.done += weight

    def show(self, what: str) -> None:
        if self.live:
            share = self.done / self.total
            bar = "#" * int(BAR * share)
            line = f"[{bar:<{BAR}}] {share:4.0%}  {self.left()}  {what}"
            self.stream.write("\r\x1b[K" + line[: shutil.get_terminal_size().columns - 1])
            self.stream.flush()

    def left(self) -> str:
        """Time left, from the time taken so far."""
        if not self.done:
            return "--:-- left"
        seconds = round((time.monotonic() - self.start) * (self.total - self.done) / self.done)
        return f"{seconds // 60:02d}:{seconds % 60:02d} left"

    def clear(self) -> None:
        if self.live:
            self.stream.write("\r\x1b[K")
            self.stream.flush()
