"""Tests. Their home is an empty folder, so that no cache or setting of the user's changes them.

It is named here, before any library is imported, for some read it then.
"""

import os
import tempfile

_home = tempfile.TemporaryDirectory(prefix="home-")
os.environ["HOME"] = _home.name
for _variable in ("HF_HOME", "HF_HUB_CACHE", "TORCH_HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME"):
    os.environ.pop(_variable, None)
