"""The command line: `python -m pi0`, and the script `pi0`."""

import signal
import sys

from pi0 import _native


def main() -> int:
    # Native code does not look for Python's signals; Ctrl-C ends the program as it ends the binary.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    return _native.main(["pi0", *sys.argv[1:]])


if __name__ == "__main__":
    sys.exit(main())
