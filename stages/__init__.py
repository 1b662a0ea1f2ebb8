"""The pipeline's stages: each reads params, calls the library, writes its outs and logs to MLflow."""

import sys
from pathlib import Path

# A queued experiment runs in a checkout of its own, and must use that checkout's library and not the installed one.
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from anneal.params import excepthook

sys.excepthook = excepthook
