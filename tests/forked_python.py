"""Stand for `python script args` in a script under test: fork the script from a process with torch imported.

    python -IS forked_python.py SOCKET PYTHON script args    # what helpers.python_command writes into a file

Only for scripts that end by themselves: the forked process is no descendant of the one that started it.
"""

import json
import os
import socket
import sys

path, python, script, *args = sys.argv[1:]
if script.startswith("-") or os.path.basename(script) == "supervise.py":  # which ends its descendants
    os.execv(python, [python, script, *args])
output = f"/proc/{os.getpid()}/fd/"
with socket.socket(socket.AF_UNIX) as server:
    server.connect(path)
    request = script, args, os.getcwd(), dict(os.environ), output + "1", output + "2"
    server.sendall(json.dumps(request).encode())
    server.shutdown(socket.SHUT_WR)
    code = server.makefile().read()
sys.exit(int(code or 1))
