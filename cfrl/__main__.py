"""`cfrl` and `python -m cfrl`: the command line, with a quiet Ctrl-C from the first moment on."""

import os
import signal
import sys
from types import FrameType


def main() -> None:
    """Entry point. Status 130 after Ctrl-C."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupt)
    try:
        from cfrl.cli import main as run

        run()
    except KeyboardInterrupt:
        sys.exit(130)


def _interrupt(_number: int, frame: FrameType | None) -> None:
    """KeyboardInterrupt; but the end at once during an import, where libraries swallow it or print tracebacks."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            os._exit(130)
        frame = frame.f_back
    raise KeyboardInterrupt


if __name__ == "__main__":
    main()
