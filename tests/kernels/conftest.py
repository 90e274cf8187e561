"""Puts Triton in interpreter mode, before any test imports it, and this folder's shared cases in reach."""

import os
import sys
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"
sys.path.insert(0, str(Path(__file__).parent))
