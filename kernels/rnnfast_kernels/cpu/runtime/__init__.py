"""From equations to machine code, its cache on disk, and the threads that run it."""
