"""Put the repository's root on Python's path; for the scripts of this folder, which import it first.

Python itself puts only a script's own folder there. Installs the error hook as well, because the next imports
need the extras.
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from nanosync.errors import install_error_hook

install_error_hook(forks=True)
