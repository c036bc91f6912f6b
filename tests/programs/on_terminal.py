"""Run a command on the terminal that is its input: on_terminal.py COMMAND ...

Opening it makes it the session's controlling terminal, whose Ctrl-C sends SIGINT.
"""

import os
import sys

os.close(os.open(os.ttyname(0), os.O_RDWR))
os.execvp(sys.argv[1], sys.argv[1:])  # noqa: S606
