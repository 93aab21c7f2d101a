"""Tests. Their home is an empty folder, so that no cache or setting of the user's changes them.

It is named here, before any library is imported, because some read it then. Processes that tests
start have the same one.
"""

import os
import tempfile

if not os.path.basename(os.environ.get("HOME", "")).startswith("home-of-tests-"):
    _home = tempfile.TemporaryDirectory(prefix="home-of-tests-")
    os.environ["HOME"] = _home.name
    for _name in ("HF_HOME", "HF_HUB_CACHE", "TORCH_HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME"):
        os.environ.pop(_name, None)
