"""The pipeline's stages: each reads params, calls the library, writes its outs and logs to MLflow."""

import os
import signal
import sys
from pathlib import Path

# A queued experiment runs in a checkout of its own, and must use that checkout's library and not the installed one.
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from anneal.params import excepthook
from anneal.processes import end_with_parent, is_first_process

sys.excepthook = excepthook
if "DVC_STAGE" in os.environ:
    # A further process of a training run has nothing to save, and may wait for the first one without end.
    end_with_parent(signal.SIGTERM if is_first_process() else signal.SIGKILL)
