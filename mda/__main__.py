"""The entry: `receive` straight to its own file, everything else to the commands.

Run as a file (`python -I -S .../mda/__main__.py receive`) it finds its own packages, so
that the interpreter need not look through site-packages before the greeting.
"""

import os
import sys

if __name__ == "__main__":
    sys.path.append(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


def main() -> int:
    """Run the command that `sys.argv` names; returns the exit status."""
    if sys.argv[1:2] == ["receive"]:
        from mda.receiver import inetd

        return inetd.main(sys.argv[2:])
    from mda.cli import run

    return run()


if __name__ == "__main__":
    sys.exit(main())
